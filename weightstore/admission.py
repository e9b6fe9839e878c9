"""Whether the host can really give so many bytes of shared memory, asked before a page is touched.

A page of shared memory costs three budgets at once: the file system behind /dev/shm (when it is
full a touch is SIGBUS), the memory cgroup of whoever touches the page first and all of that cgroup's
ancestors (when one is full the kernel kills somebody), and the host's memory. `Admission` reads all of
them fresh at every question and refuses when the tightest cannot give what is asked.

Invariants:
- nothing is cached: other processes use the same memory;
- a limit that cannot be read is left out, one that is read is never rounded in the asker's favour;
- `reserve` is kept free of memory (host and cgroups) for the processes that share them; it is not asked
  of the shm file system, whose free space nobody needs in order to live.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from weightstore.errors import ArenaFull
from weightstore.mounts import read_mounts
from weightstore.sizes import format_size

SHM_PATH: Final = "/dev/shm"

_UNLIMITED: Final = 1 << 60
"""cgroup v1 has no word for 'no limit', only a number near 2**63 rounded to pages."""


@dataclass(frozen=True)
class Limit:
    """One budget in bytes: `available` of `total` are free, of which `reserved` must stay free."""

    source: str
    available: int
    total: int
    reserved: int = 0

    @property
    def usable(self) -> int:
        return max(0, self.available - self.reserved)


class Admission:
    """Reads the memory budgets that bind this process.

    Args:
        reserve: bytes that must stay available to others on the host and in every cgroup.
        shm_path: where the shared-memory file system is mounted.
        proc_root: the proc file system.
        cgroup_root: the cgroup v2 hierarchy, or the directory above the v1 controller `memory`;
            None finds what is mounted.
    """

    def __init__(
        self,
        reserve: int = 0,
        shm_path: str | os.PathLike[str] = SHM_PATH,
        proc_root: str | os.PathLike[str] = "/proc",
        cgroup_root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.reserve = reserve
        self._shm = Path(shm_path)
        self._proc = Path(proc_root)
        self._cgroup_root = None if cgroup_root is None else Path(cgroup_root)

    def available(self) -> list[Limit]:
        """Every limit found, tightest first."""
        limits = [*self._shm_limits(), *self._memory_limits(), *self._cgroup_limits()]
        return sorted(limits, key=lambda limit: limit.usable)

    def check(self, nbytes: int) -> None:
        """Return if `nbytes` more bytes of shared memory fit now.

        Raises:
            ArenaFull: they do not; the message names the tightest limit and what to do, `details` all.
        """
        limits = self.available()
        if not limits or nbytes <= limits[0].usable:
            return
        tightest = limits[0]
        reserved = f", {format_size(tightest.reserved)} of that reserved" if tightest.reserved else ""
        others = "; ".join(f"{limit.source}: {format_size(limit.usable)}" for limit in limits[1:])
        raise ArenaFull(
            f"{format_size(nbytes)} ({nbytes} bytes) of shared memory do not fit: {tightest.source} has "
            f"{format_size(tightest.available)} of {format_size(tightest.total)} left{reserved}. "
            f"{self._advice(tightest)}" + (f" (other limits: {others})" if others else ""),
            requested=nbytes,
            limit=tightest.source,
            usable=tightest.usable,
            limits=[asdict(limit) for limit in limits],
        )

    def _advice(self, limit: Limit) -> str:
        if limit.source == str(self._shm):
            return (
                f"Make it larger (mount -o remount,size=SIZE {self._shm}; Docker: --shm-size; Kubernetes: an "
                "emptyDir of medium Memory), or store fewer versions."
            )
        if limit.source == "MemAvailable":
            return "Free host memory, remove versions from the store, or lower --reserve."
        return "Raise the memory limit of this cgroup (container), remove versions, or lower --reserve."

    def _shm_limits(self) -> Iterator[Limit]:
        try:
            stats = os.statvfs(self._shm)
        except OSError:
            return
        # A tmpfs mounted with size=0 has no limit of its own and reports zero blocks.
        if stats.f_blocks:
            yield Limit(str(self._shm), stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize)

    def _memory_limits(self) -> Iterator[Limit]:
        fields = _fields(self._proc / "meminfo")
        if "MemAvailable:" in fields:
            available, total = fields["MemAvailable:"] << 10, fields.get("MemTotal:", 0) << 10
            yield Limit("MemAvailable", available, total, self.reserve)

    def _cgroup_limits(self) -> Iterator[Limit]:
        for line in _lines(self._proc / "self" / "cgroup"):
            hierarchy, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if hierarchy == "0" and not controllers:
                names = ("memory.max", "memory.current", "inactive_file")
                mounts = self._mounts("cgroup2", None)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                mounts = self._mounts("cgroup", "memory")
            else:
                continue
            for root, mount in mounts:
                for directory in _ancestry(mount, root, path):
                    limit = self._cgroup_limit(directory, *names)
                    if limit is not None:
                        yield limit

    def _cgroup_limit(self, directory: Path, maximum: str, current: str, inactive: str) -> Limit | None:
        total, used = _number(directory / maximum), _number(directory / current)
        if total is None or used is None or total >= _UNLIMITED:
            return None
        # Inactive page cache is counted as used, but the kernel drops it before it kills anybody.
        used -= min(used, _fields(directory / "memory.stat").get(inactive, 0))
        return Limit(f"cgroup {directory / maximum}", max(0, total - used), total, self.reserve)

    def _mounts(self, fstype: str, controller: str | None) -> list[tuple[str, Path]]:
        """(root of the mount within its hierarchy, mount point) of every cgroup mount of that kind."""
        if self._cgroup_root is not None:
            return [("/", self._cgroup_root / controller if controller else self._cgroup_root)]
        return [
            (mount.root, mount.point)
            for mount in read_mounts(self._proc)
            if mount.fstype == fstype and (controller is None or controller in mount.options.split(","))
        ]


def _ancestry(mount: Path, root: str, path: str) -> Iterator[Path]:
    """The directory of cgroup `path` under `mount` (which shows `root`), then its parents up to `mount`.

    In a container the path may lie outside what is mounted (a host path, or '/..'): then the mount itself
    is the nearest cgroup that can be seen.
    """
    relative = os.path.relpath(path, root)
    directory = mount if relative.startswith("..") else mount / relative
    if not directory.is_dir():
        directory = mount
    yield directory
    for parent in directory.parents:
        if directory == mount or not parent.is_relative_to(mount):
            return
        yield parent


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)[:1]).strip()
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """'name value …' lines as a dict; lines of another form are left out."""
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) >= 2 and pair[1].isdigit()}
