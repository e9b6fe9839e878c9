"""How long a store takes from nothing to its first answer, and what it has loaded by then."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.record import ROOT
from bench.rows import Goal, Row, clock
from bench.settings import Settings
from bench.waiting import Quiet
from weightstore.client import connect
from weightstore.errors import StoreGone, StoreSilent

GOAL = Goal(0.5, at_least=False)
HEAVY = ("torch", "numpy")
_POLL = 0.001
_PATIENCE = 30.0


def start(settings: Settings) -> Iterator[Row]:
    """`python -m weightstore serve` until it has answered its first request."""
    samples, interpreter = [], []
    loaded: set[str] = set()
    resident = 0
    quiet = Quiet.of(settings)
    for _ in range(settings.starts):
        quiet()
        interpreter.append(clock(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)))
        with tempfile.TemporaryDirectory(prefix="weightstore-bench-") as directory:
            socket = os.path.join(directory, "store.sock")
            command = [sys.executable, "-m", "weightstore", "serve", "--socket", socket]
            began = time.perf_counter()
            service = subprocess.Popen([*command, "--capacity", "1GiB"], cwd=ROOT, stdout=subprocess.DEVNULL)
            try:
                _first_answer(socket, service, began)
                samples.append(time.perf_counter() - began)
                loaded |= heavy_libraries(service.pid)
                resident = _resident(service.pid)
            finally:
                service.terminate()
                service.wait()
    yield Row(
        "start",
        "start of a service, from fork to the answer to its first request",
        {"measured": samples, "python alone": interpreter},
        goal=GOAL,
        notes={"resident_bytes": resident, **quiet.notes()},
    )
    yield Row(
        "start/torch",
        "libraries of torch or numpy mapped by the service by then",
        {},
        value=float(len(loaded)),
        unit="libraries",
        goal=Goal(0, at_least=False),
        notes={"libraries": sorted(loaded)},
    )


def _first_answer(socket: str, service: subprocess.Popen[bytes], began: float) -> None:
    while True:
        try:
            with connect(socket) as store:
                store.status()
            return
        except (StoreGone, StoreSilent):
            if service.poll() is not None or time.perf_counter() - began > _PATIENCE:
                raise
        time.sleep(_POLL)


def heavy_libraries(pid: int) -> set[str]:
    """Shared libraries of torch and numpy that a process has mapped."""
    paths = {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    return {path for path in paths if any(f"/{name}/" in path for name in HEAVY)}


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
