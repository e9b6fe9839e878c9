"""One run: each way's cycles, driven phase by phase, timed and compared.

What goes wrong in a way is that way's result; the others go on.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click

from bench.rl_step import summary
from bench.rl_step.found import Found
from bench.rl_step.memory import Sampler, point
from bench.rl_step.processes import Child, Engine, Trainer, WayFailed
from bench.rl_step.ways import GIB, PHASES, WAYS, Marks, RelaunchCold, Way

ANSWER: Final = 300.0
"""Seconds that any one answer may take."""
OWN_IMAGES: Final = 2
"""Pictures drawn again in each cycle: they say how long one usually takes."""
OVER: Final = "the time that the run was given (--budget) was over"
GRACE: Final = 60.0
"""Seconds past the budget in which what was begun may end."""
TAKE_MORE: Final = 2 * GIB
"""How much more than is free beside the awake engine the trainer needs."""
TAKE_LITTLE: Final = 32 << 20
"""What it takes on a CPU, and where the engine's weights are too small to make room for anything."""


class Run:
    """What all ways of a run share: the children started ahead, the store, the time, the pictures."""

    def __init__(
        self,
        held: ExitStack,
        found: Found,
        sampler: Sampler,
        *,
        model: str,
        device: str,
        seed: int,
        cycles: int,
        slow_cycles: int,
        budget: float | None,
        scratch: Path,
        logs: Path,
        configs: Path,
    ) -> None:
        """What it starts ends with `held`, except the store (see `close_store`)."""
        self._held = held
        self.found = found
        self.sampler = sampler
        self.model = model
        self.device = "cuda:0" if device == "cuda" else "cpu"
        self.seed = seed
        self.cycles = cycles
        self.slow_cycles = slow_cycles
        self.scratch = scratch
        self.logs = logs
        self.configs = configs
        self._deadline = time.monotonic() + budget if budget else None
        self._ahead: dict[str, list[Child]] = {"engine": [], "trainer": []}
        self._store: Any = None
        self._arena: Path | None = None
        self._service: int | None = None
        self._take: int | None = None
        self.capacity = 0
        self.pictures: dict[int, tuple[str, str, bytes]] = {}

    # -- time --------------------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds left of the budget; many if there is none."""
        return 1e9 if self._deadline is None else self._deadline - time.monotonic()

    def patience(self) -> float:
        return min(ANSWER, max(self.left() + GRACE, 1.0))

    # -- children ----------------------------------------------------------------------------------

    def start_ahead(self, count: int) -> None:
        """Start engines and trainers for `count` ways, which import what they will need and then wait."""
        for role, waiting in self._ahead.items():
            for _ in range(count):
                child = self._new(role)
                waiting.append(child)
                self._held.callback(child.end)

    def wait_for_imports(self) -> None:
        for waiting in self._ahead.values():
            for child in waiting:
                child.imported()

    def engine(self) -> Engine:
        waiting = self._ahead["engine"]
        found = waiting.pop(0) if waiting else self._new("engine")
        assert isinstance(found, Engine)
        return found

    def trainer(self) -> Trainer:
        waiting = self._ahead["trainer"]
        found = waiting.pop(0) if waiting else self._new("trainer")
        assert isinstance(found, Trainer)
        return found

    def relaunched(self) -> Engine:
        """An engine started from nothing, now."""
        found = self._new("engine")
        assert isinstance(found, Engine)
        return found

    def _new(self, role: str) -> Child:
        log = self.logs / f"{role}-{len(list(self.logs.iterdir()))}.log"
        kind = Engine if role == "engine" else Trainer
        return kind(self.model, log, self.patience)

    # -- the store ---------------------------------------------------------------------------------

    def store(self) -> str:
        """The socket of the run's store, which is started when it is first needed."""
        from bench.rl_step.models import MODELS
        from bench.rl_step.sharing import service_of
        from weightstore.local import local_store
        from weightstore.paths import arena_name

        if self._store is None:
            window = MODELS[self.model].window
            self._store = ExitStack()
            store = self._store.enter_context(local_store(self.capacity, window=window))
            self._socket = store.socket
            self._arena = Path("/dev/shm") / arena_name(store.socket)
            self._service = service_of(store.socket)
        return self._socket

    def close_store(self) -> None:
        """Give the host's memory back, for ways that need it for themselves."""
        if self._store is not None:
            self._store.close()
            self._store = self._arena = self._service = None

    def memory(self, way: Way) -> dict[str, Any]:
        service = [] if self._service is None else [self._service]
        found: dict[str, Any] = point([*way.pids(), *service], self._arena)
        found["device"] = self.sampler.device_used()
        return found

    # -- one way -----------------------------------------------------------------------------------

    def measure(self, kind: type[Way]) -> None:
        """All cycles of one way, into the results; what goes wrong is its result."""
        found, key = self.found, kind.key
        found.way(key, title=kind.title, what=kind.what, status="running", reason=None, cycles=[])
        began = time.perf_counter()
        reason = kind.impossible(self.device)
        if reason is not None:
            found.way(key, status="cannot run", reason=reason)
            return
        if self.left() <= 0:
            found.way(key, status="skipped", reason=OVER)
            return
        if not issubclass(kind, (WAYS["1"], WAYS["2"])):
            self.close_store()
        way = kind(self)
        before = point([], self._arena)
        found.way(key, baseline={"host": before["used"] - before["arena"]})
        try:
            with way:
                self._cycles(way)
        except WayFailed as error:
            found.way(key, status="failed", reason=str(error))
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            found.way(key, status="failed", reason=f"{type(error).__name__}: {error}")
        found.way(key, notes=way.notes, wall=time.perf_counter() - began)

    def _cycles(self, way: Way) -> None:
        found, key = self.found, way.key
        setup = way.begin()
        first = self._picture(way, 0)
        own = self._picture(way, 0)["seconds"]
        if self._take is None:
            free = way.trainer.do("facts").get("free")
            much = free is not None and found.all["model"]["whole_bytes"] > 2 * TAKE_MORE
            self._take = free + TAKE_MORE if much else TAKE_LITTLE
            found.note("trainer_needs", self._take)
        found.way(key, setup=setup | {"first_image": first["seconds"], "own_image": own})
        found.way(key, awake=self.memory(way))
        count = 1 if way.cold else self.slow_cycles if way.slow else self.cycles
        took = 0.0
        for number in range(1, count + 1):
            if took > self.left():
                reason = f"{number - 1} of {count} cycles: the time that the run was given was over"
                found.way(key, status="cut", reason=reason)
                return
            started = time.monotonic()
            cycle = self._cycle(way, number)
            took = time.monotonic() - started
            found.cycle(key, cycle)
            so_far = summary.cycle_overhead(found.all["ways"][key], cycle)  # by the images until now
            click.echo(
                f"  {key} cycle {number}: about {so_far:.3f} s "
                + " ".join(f"{name} {seconds:.3f}" for name, seconds in cycle["phases"].items()),
                err=True,
            )
        found.way(key, status="ok")

    def _cycle(self, way: Way, number: int) -> dict[str, Any]:
        self.sampler.begin()
        marks = Marks()
        with marks.phase("drain"):
            way.engine.post("/drain")
        with marks.phase("sleep"):
            way.sleep()
        with marks.phase("memory"):
            way.trainer.do("take", nbytes=self._take)
        asleep = self.memory(way)
        with marks.phase("step"):
            way.trainer.do("step", number=number)
        for name in way.after:
            if name == "wake" and isinstance(way, RelaunchCold):
                way.drop()
            with marks.phase(name):
                getattr(way, name)()
        with marks.phase("image"):
            picture = self._picture(way, number)
        curve = self.sampler.curve(marks.origin)
        again = [self._picture(way, number) for _ in range(OWN_IMAGES)]
        step = marks.seconds.pop("step")
        return {
            "number": number,
            "phases": {name: marks.seconds[name] for name in PHASES},
            "step": step,
            "own_images": [each["seconds"] for each in again],
            "image": picture["sha256"],
            "same": all(each["same"] for each in (picture, *again)),
            "differs": next((each["differs"] for each in (picture, *again) if each["differs"]), None),
            "spread": picture["spread"],
            "spans": [[name, began, ended] for name, began, ended in marks.spans],
            "memory": {"asleep": asleep, "awake": self.memory(way)},
            "curve": curve,
        }

    def _picture(self, way: Way, number: int) -> dict[str, Any]:
        """One picture, timed, and compared with what the first way drew after as many steps."""
        began = time.perf_counter()
        facts, pixels = way.engine.image()
        seconds = time.perf_counter() - began
        sha = facts["x-pixels-sha256"]
        differs = None
        if number not in self.pictures:
            self.pictures[number] = (way.key, sha, pixels)
        key, expected, reference = self.pictures[number]
        if sha != expected:
            differs = f"from way {key}: {_difference(pixels, reference)}"
        if number and self.pictures.get(number - 1, ("", "", b""))[1] == sha:
            differs = "it is the picture from before the step: the new weights did not arrive"
        return {
            "seconds": seconds,
            "sha256": sha,
            "same": differs is None,
            "differs": differs,
            "spread": float(facts["x-spread"]),
        }


def _difference(pixels: bytes, reference: bytes) -> str:
    import numpy as np

    ours, others = (np.frombuffer(data, np.float32) for data in (pixels, reference))
    if ours.shape != others.shape:
        return f"{ours.size} values, not {others.size}"
    apart = np.abs(ours - others)
    return f"{float((apart > 0).mean()):.2%} of the values, by up to {float(apart.max()):.3g}"
