"""What about this host will make a store slow or fail, and what to do about it.

Every check is a function from a `Host` to findings, tries what can be tried, and changes nothing. The
CUDA checks lie beside the rest of the CUDA code and are loaded only when asked for.
"""

from __future__ import annotations

from weightstore.doctor.arenas import check_arenas
from weightstore.doctor.finding import Finding, Host, Status
from weightstore.doctor.kernel import check_kernel
from weightstore.doctor.memory import (
    check_huge_pages,
    check_locked_memory,
    check_memory_limits,
    check_shared_memory,
)

__all__ = ["Finding", "Host", "Status", "examine"]


def examine(host: Host | None = None, capacity: int | None = None, gpu: bool = True) -> list[Finding]:
    """All findings about `host` (this one by default); `capacity` bytes is what a store is to offer."""
    host = host or Host()
    findings = [
        *check_shared_memory(host, capacity),
        *check_memory_limits(host, capacity),
        *check_huge_pages(host),
        *check_locked_memory(),
        *check_kernel(host),
        *check_arenas(host),
    ]
    if gpu:
        from weightstore.cuda.doctor import check_cuda

        findings += check_cuda(host)
    return findings
