"""What a host pays for: weights once however many engines map them, two copies at most during refits.

Counted is the arena, by the kernel's proportional set size (PSS): each page is divided among the
processes that map it, so over all of them it sums to the pages there are. Engines on the host backend
also have private images while awake; on a GPU those lie in device memory, so they are not counted.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine_process import ROWS, build
from hooked import addresses

import weightstore
from engine_hooks import EngineHook, State
from weightstore.client import Store
from weightstore.errors import EngineAsleep, StoreGone

MIB = 1 << 20
COLUMNS = 12 * 1024  # 48 MiB of float32
MODEL = "m"


class Engine:
    """`engine_process.py`, asked line by line."""

    def __init__(self, socket: str) -> None:
        here = Path(__file__).parent
        self.process = subprocess.Popen(
            [sys.executable, str(here / "engine_process.py"), socket, MODEL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"},
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine ended with {self.process.wait()}"
        return line.strip()

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.read()


@contextmanager
def engines(socket: str, count: int) -> Iterator[list[Engine]]:
    started = [Engine(socket) for _ in range(count)]
    try:
        for engine in started:
            assert engine.read() == "ready"
        yield started
    finally:
        for engine in started:
            engine.process.stdin.close()  # type: ignore[union-attr]
            engine.process.wait()
            engine.process.stdout.close()  # type: ignore[union-attr]


def arena_bytes(pids: Iterable[int], arena: str, measure: str = "Pss") -> int:
    """Bytes of the arena that the kernel charges to the processes, in sum: Pss shares, Rss counts anew."""
    total = 0
    for pid in pids:
        mapped = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                mapped = line.endswith(f"/{arena}")
            elif mapped and line.startswith(f"{measure}:"):
                total += int(line.split()[1]) * 1024
    return total


def put(store: Store, version: int, *components: str) -> None:
    columns = {"dit": COLUMNS, "te": 2048}
    with store.refit(MODEL, components=list(components) if store.models() else None) as refit:
        for name in components:
            generator = torch.Generator().manual_seed(version)
            refit.put(f"{name}.weight", torch.randn(ROWS, columns[name], generator=generator))


def test_four_engines_on_one_model_cost_it_once() -> None:
    with weightstore.local_store(capacity="96MiB", window="4MiB") as store:
        put(store, 1, "dit")
        weights = store.status().arena.reachable
        assert weights == ROWS * COLUMNS * 4
        with engines(store.socket, 4) as started:
            status = store.status()
            pids = [status.pid, os.getpid(), *(engine.process.pid for engine in started)]
            awake = arena_bytes(pids, status.arena.name)
            for engine in started:
                assert engine.ask("sleep") == "1"
            asleep = arena_bytes(pids, status.arena.name)
            for engine in started:
                assert engine.ask("wake") == "1"
            again = arena_bytes(pids, status.arena.name)
            apart = arena_bytes(pids[2:], status.arena.name, "Rss")
        for pss in (awake, asleep, again):
            assert pss == pytest.approx(weights, rel=0.02)
        assert apart > 3.9 * weights  # each of them really maps all of it


@pytest.mark.parametrize("killed", [False, True], ids=["store alive", "store killed"])
def test_a_sleeping_engine_through_three_refits(killed: bool) -> None:
    with weightstore.local_store(capacity="192MiB", window="8MiB") as store:
        put(store, 1, "dit", "te")
        modules = {"dit": build(COLUMNS), "te": build(2048)}
        hook = EngineHook.attach(store, MODEL, modules)
        where = addresses(modules)
        trained, frozen = ROWS * COLUMNS * 4, ROWS * 2048 * 4
        hook.sleep()
        used = []
        for version in (2, 3, 4):
            with store.refit(MODEL, components=["dit"]) as refit:
                refit.put("dit.weight", torch.full((ROWS, COLUMNS), float(version)))
                used.append(store.status().arena.used)  # the old version and the new one
            used.append(store.status().arena.used)
        assert max(used) <= frozen + 2 * trained
        assert used[1::2] == [frozen + trained] * 3
        # What was ever taken stays committed, so this is the most there was at any moment.
        assert store.status().arena.committed <= frozen + 2 * trained + 8 * MIB
        with pytest.raises(EngineAsleep):
            modules["te"](torch.ones(1, 2048))
        if killed:
            os.kill(store.status().pid, signal.SIGKILL)
            with pytest.raises(StoreGone):
                store.status()
        assert hook.version == 4
        assert hook.wake().version == 4
        assert hook.state is State.AWAKE
        assert addresses(modules) == where
        assert bool((modules["dit"].weight == 4).all())
        generator = torch.Generator().manual_seed(1)
        assert torch.equal(modules["te"].weight, torch.randn(ROWS, 2048, generator=generator))
        if killed:  # and goes on so
            assert hook.refit().changed == ()
            hook.sleep()
            assert hook.wake().version == 4
        assert hook.verify().ok
        hook.close()


def test_engines_in_other_processes_follow_and_outlive_the_store() -> None:
    with weightstore.local_store(capacity="96MiB", window="4MiB") as store:
        put(store, 1, "te")
        with engines(store.socket, 2) as (awake, asleep):
            asleep.ask("sleep")
            put(store, 2, "te")
            assert awake.ask("version") == "1"
            assert awake.ask("refit") == "2"
            assert asleep.ask("refit") == "2"
            with store.lease(MODEL) as snapshot:
                expected = hashlib.sha256(snapshot.numpy("te.weight").tobytes()).hexdigest()
            os.kill(store.status().pid, signal.SIGKILL)
            assert asleep.ask("wake") == "2"
            assert asleep.ask("digest") == awake.ask("digest") == expected
            assert awake.ask("sleep") == awake.ask("wake") == "2"
