"""What a check reports, and where checks look: paths are values, so tests can point them at made-up hosts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One fact about the host.

    Attributes:
        name: what was looked at, e.g. 'shared memory'.
        status: 'ok'; 'warn' works, but slowly or not for long; 'fail' will not work.
        seen: what was found, with numbers.
        advice: what to do about it, commands included; empty when nothing is to be done.
    """

    name: str
    status: Status
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class Host:
    """The file trees that describe a host."""

    shm: Path = Path("/dev/shm")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    cgroup: Path | None = None
    dev: Path = Path("/dev")

    def read(self, path: Path) -> str | None:
        """The stripped text of a small file, or None if it cannot be read."""
        try:
            return path.read_text(errors="replace").strip()
        except OSError:
            return None
