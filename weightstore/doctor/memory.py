"""Checks of the memory an arena lives in: size of /dev/shm, cgroup limits, huge pages, locked memory.

The numbers in the advice on huge pages were measured on one H100 host: populating 4.5 → 19 GB/s (4.3
times), registering with CUDA 17-25 → 37-42 GB/s (1.8 to 3 times).
"""

from __future__ import annotations

import os
import re
import resource
from typing import Final

from weightstore.admission import Admission, Limit
from weightstore.doctor.finding import Finding, Host
from weightstore.mounts import read_mounts
from weightstore.sizes import format_size

SMALLEST_USEFUL: Final = 256 << 20
"""Below this not even a small model with its second copy fits; Docker's default is 64 MiB."""


def check_shared_memory(host: Host, capacity: int | None = None) -> list[Finding]:
    """Whether /dev/shm exists, may be written, and is large enough (for `capacity` bytes, if given)."""
    name = "shared memory"
    grow = (
        f"Enlarge it: mount -o remount,size=SIZE {host.shm} (as root); in Docker --shm-size=SIZE or "
        f"--ipc=host; in Kubernetes mount an emptyDir of medium Memory at {host.shm}."
    )
    shm = next((limit for limit in _limits(host) if limit.source == str(host.shm)), None)
    if not host.shm.is_dir():
        mount = f"Mount one: mount -t tmpfs -o size=SIZE,mode=1777 tmpfs {host.shm}."
        return [Finding(name, "fail", f"{host.shm} does not exist", mount)]
    if not os.access(host.shm, os.W_OK | os.X_OK):
        return [Finding(name, "fail", f"{host.shm} is not writable for uid {os.geteuid()}", "chmod 1777 it.")]
    if shm is None:
        return [Finding(name, "ok", f"{host.shm} has no size limit of its own")]
    seen = f"{host.shm} has {format_size(shm.available)} of {format_size(shm.total)} free"
    if capacity is not None and shm.available < capacity:
        return [Finding(name, "fail", f"{seen}, less than the capacity of {format_size(capacity)}", grow)]
    if shm.total < SMALLEST_USEFUL:
        return [Finding(name, "fail", seen, f"Hardly a model fits. {grow}")]
    if shm.available < shm.total // 10:
        return [Finding(name, "warn", seen, f"See below for leftover arenas, or: ls -l {host.shm}. {grow}")]
    return [Finding(name, "ok", seen)]


def check_memory_limits(host: Host, capacity: int | None = None) -> list[Finding]:
    """Host memory and every cgroup limit above this process, against what /dev/shm seems to offer."""
    limits = _limits(host)
    offered = next((limit.total for limit in limits if limit.source == str(host.shm)), 0)
    findings = []
    for limit in limits:
        if limit.source == str(host.shm):
            continue
        name = "host memory" if limit.source == "MemAvailable" else "cgroup limit"
        seen = f"{limit.source}: {format_size(limit.available)} of {format_size(limit.total)} available"
        if name == "host memory":
            advice = "Stop what uses the memory, or serve with a smaller --capacity."
        else:
            advice = (
                "Pages count against the cgroup of the store that touches them first. Raise the limit "
                "(docker --memory, Kubernetes resources.limits.memory, systemd MemoryMax=), or serve with a "
                "smaller --capacity."
            )
        if capacity is not None and limit.available < capacity:
            seen += f", less than the capacity of {format_size(capacity)}"
            findings.append(Finding(name, "fail", seen, advice))
        elif name == "cgroup limit" and limit.total < offered:
            seen += f", although {host.shm} looks like {format_size(offered)}"
            findings.append(Finding(name, "warn", seen, advice))
        else:
            findings.append(Finding(name, "ok", seen))
    if not any(finding.name == "cgroup limit" for finding in findings):
        findings.append(Finding("cgroup limit", "ok", "no memory limit on this process or above it"))
    return findings


def check_huge_pages(host: Host) -> list[Finding]:
    """Whether arena pages will be huge: the mount's `huge=`, and the knob that overrides it."""
    name = "huge pages"
    knob_path = host.sys / "kernel/mm/transparent_hugepage/shmem_enabled"
    knobs = host.read(knob_path)
    if knobs is None:
        seen = f"{knob_path} is absent: this kernel has no transparent huge pages for shared memory"
        return [Finding(name, "warn", seen, "Works, with slower populating and pinning; use another kernel.")]
    match = re.search(r"\[(\w+)\]", knobs)
    knob = match[1] if match else knobs
    options = next((m.options for m in reversed(read_mounts(host.proc)) if m.point == host.shm), "")
    match = re.search(r"(?:^|,)huge=(\w+)", options)
    policy = match[1] if match else "never"
    seen = f"{host.shm} is mounted huge={policy}, shmem_enabled is {knob}"
    if knob == "deny":
        allow = f"Allow them (as root): echo never > {knob_path} (which leaves the choice to each mount)"
        remount = f", and mount -o remount,huge=advise {host.shm}" if policy == "never" else ""
        return [
            Finding(name, "warn", f"{seen}, which forbids them everywhere", f"{allow}{remount}. {_why()}")
        ]
    if policy == "never" and knob != "force":
        advice = (
            f"As root: mount -o remount,huge=advise {host.shm} (for memory committed afterwards; containers "
            "have a mount of their own). To keep it: huge=advise in /etc/fstab, or the kernel parameter "
            f"transparent_hugepage_tmpfs=advise (Linux 6.14). {_why()}"
        )
        return [Finding(name, "warn", seen, advice)]
    return [Finding(name, "ok", seen)]


def check_locked_memory(limit: int | None = None) -> list[Finding]:
    """RLIMIT_MEMLOCK (soft), or `limit` bytes in its place."""
    name = "locked memory"
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY:
        return [Finding(name, "ok", "RLIMIT_MEMLOCK is unlimited")]
    return [
        Finding(
            name,
            "ok",
            f"RLIMIT_MEMLOCK is {format_size(soft)}; registering with CUDA is not bound by it",
            "Only RDMA (NICs) and mlock need more: ulimit -l unlimited; docker --ulimit memlock=-1; systemd "
            "LimitMEMLOCK=infinity.",
        )
    ]


def _limits(host: Host) -> list[Limit]:
    return Admission(shm_path=host.shm, proc_root=host.proc, cgroup_root=host.cgroup).available()


def _why() -> str:
    return (
        "With huge pages, committing the arena was 4.3 times and pinning it for a GPU 1.8 to 3 times as fast "
        "(measured on an H100 host)."
    )
