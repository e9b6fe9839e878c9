"""The mount table of this process, from /proc/self/mountinfo."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mount: the directory `root` of a file system, seen at `point`; `options` are the file system's."""

    root: str
    point: Path
    fstype: str
    options: str


def read_mounts(proc_root: Path) -> list[Mount]:
    """Every mount in the order it was made (the last one at a point is the one seen there); none if /proc
    cannot be read."""
    try:
        lines = (proc_root / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        # id parent major:minor root point options [optional fields] - fstype source super-options
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) >= 5 and len(tail) >= 3:
            found.append(Mount(_unescape(fields[3]), Path(_unescape(fields[4])), tail[0], tail[2]))
    return found


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
