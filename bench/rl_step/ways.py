"""The ways to come from an image on the old weights to one on the new: what each does in each phase.

A `Way` is driven phase by phase, and every phase is timed from outside. To add one, say what it does to
sleep, to refit and to wake, and in which order the last two come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

from bench.rl_step.memory import cached_share, drop_cache
from bench.rl_step.processes import Engine, Trainer, WayFailed

PHASES: Final = ("drain", "sleep", "memory", "refit", "wake", "image")
"""What is timed, by name; the trainer's step, between `memory` and `refit`, is timed apart."""
GIB: Final = 1 << 30


class Bench(Protocol):
    """What a way needs of the run."""

    model: str
    device: str
    seed: int
    configs: Path
    scratch: Path

    def engine(self) -> Engine: ...
    def trainer(self) -> Trainer: ...
    def relaunched(self) -> Engine: ...
    def store(self) -> str: ...
    def left(self) -> float: ...


@dataclass
class Marks:
    """Phases of one cycle: seconds of each, and where they lie in time."""

    origin: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.seconds[name] = ended - began
        self.spans.append((name, began - self.origin, ended - self.origin))


class Way:
    """One way; a context manager, in which the engine and the trainer run.

    Attributes:
        key, title: how it is called on the command line and in the report.
        after: the phases after the trainer's step, in order.
        slow: a cycle takes long, so that two (the first, and a steady one) must do.
        cold: once, with the page cache dropped before the relaunch.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    what: ClassVar[str]
    resident: ClassVar[str] = "random"
    after: ClassVar[tuple[str, ...]] = ("refit", "wake")
    slow: ClassVar[bool] = True
    cold: ClassVar[bool] = False
    needs_gpu: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.notes: dict[str, Any] = {}

    @classmethod
    def impossible(cls, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if cls.needs_gpu and device == "cpu":
            return "needs an NVIDIA GPU; this run has none"
        missing = [name for name in cls.packages if find_spec(name) is None]
        return f"not installed here: {', '.join(missing)}" if missing else None

    def config(self, **more: Any) -> dict[str, Any]:
        bench = self.bench
        return {
            "model": bench.model,
            "device": bench.device,
            "seed": bench.seed,
            "directory": str(bench.configs),
            "tag": "policy",
            **more,
        }

    def begin(self) -> dict[str, Any]:
        """Start both sides; returns what that took."""
        began = time.perf_counter()
        self.trainer = self.bench.trainer()
        self.engine = self.bench.engine()
        self.trainer.start(self.config())
        self.engine.start(self.config(resident=self.resident))
        trainer = self.trainer.ready()
        engine = self.engine.ready()
        return {"engine": engine, "trainer": trainer, "seconds": time.perf_counter() - began}

    def sleep(self) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it sleeps")

    def refit(self) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it refits")

    def wake(self) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it wakes")

    def end(self) -> None:
        for child in (getattr(self, "engine", None), getattr(self, "trainer", None)):
            if child is not None:
                child.end()

    def pids(self) -> list[int]:
        return [child.pid for child in (self.engine, self.trainer) if child.running]

    def __enter__(self) -> Way:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class _Stored(Way):
    """Through the store."""

    def begin(self) -> dict[str, Any]:
        began = time.perf_counter()
        socket = self.bench.store()
        self.trainer = self.bench.trainer()
        self.trainer.start(self.config(socket=socket))
        trainer = self.trainer.ready()
        published = self.trainer.do("publish")
        prepared = self.trainer.do("prepare")
        self._launch = self.config(resident="store", socket=socket)
        self.engine = self.bench.engine()
        self.engine.start(self._launch)
        engine = self.engine.ready()
        seconds = time.perf_counter() - began
        trained = {"published": published, "prepared": prepared}
        return {"engine": engine, "trainer": trainer, **trained, "seconds": seconds}

    def refit(self) -> None:
        self.version = self.trainer.do("refit")["version"]


class SleepRefitWake(_Stored):
    key = "1"
    title = "weightstore: sleep → refit → wake"
    what = (
        "the engine's memory is unmapped; the trainer writes into the arena, where Store.prepare made room "
        "before the first cycle; the engine wakes on that"
    )
    slow = False

    def sleep(self) -> None:
        answer = self.engine.post("/release_memory_occupation")
        if not answer["success"]:
            raise WayFailed(f"the engine did not sleep: {answer['message']}")

    def wake(self) -> None:
        self._require_written("woke", self.engine.post("/resume_memory_occupation"))

    def _require_written(self, did: str, answer: dict[str, Any]) -> None:
        if answer.get("version") != self.version:
            raise WayFailed(f"the engine {did} on {answer}, and the trainer wrote version {self.version}")


class FrozenBeside(SleepRefitWake):
    """As way 1, with what needs no refit out of the way of what does.

    A refit copies from the device to the host, a wake from the host to the device, and the link does both at
    once. Frozen components are the same in every version: they can wake while the trainer still writes, on
    whichever is the newest by then. The trained part sleeps on. When the new version is there, an update
    moves the engine's lease to it without a copy, for nothing that is awake has changed; the trained part
    takes it at its wake, which is all that is left to do.
    """

    key = "1s"
    title = "weightstore: the frozen parts wake during the refit"
    what = (
        "as before, but the frozen parts, which a refit does not change, wake while the trainer writes, "
        "since the link copies in both directions at once; then the trained part wakes on what was written"
    )

    def begin(self) -> dict[str, Any]:
        from bench.rl_step.models import MODELS, TRAINED, frozen

        self._frozen = list(frozen(MODELS[self.bench.model]))
        self._trained = TRAINED
        return super().begin()

    def refit(self) -> None:
        with ThreadPoolExecutor(1) as beside:
            waking = beside.submit(self.engine.post, "/resume_memory_occupation", {"tags": self._frozen})
            super().refit()
            woken = waking.result()
        self._require_woken(self._frozen, woken)
        self.notes.setdefault("frozen_wake_seconds", []).append(woken["seconds"])

    def wake(self) -> None:
        moved = self.engine.post("/update_weights_from_store")
        self._require_written("was updated", moved)
        if moved["copied_bytes"]:
            raise WayFailed(f"what was awake is frozen, and the update copied {moved['copied_bytes']} bytes")
        woken = self.engine.post("/resume_memory_occupation")
        self._require_written("woke", woken)
        self._require_woken([self._trained], woken)

    def _require_woken(self, expected: Collection[str], answer: dict[str, Any]) -> None:
        if set(answer["components"]) != set(expected):
            raise WayFailed(f"{', '.join(expected)} were to wake, and the engine says {answer}")


class _Relaunched(Way):
    """The engine is killed, and another one started from nothing."""

    def sleep(self) -> None:
        self.engine.kill()

    def wake(self) -> None:
        self.engine = self.bench.relaunched()
        self.engine.start(self._relaunch())
        self.notes.setdefault("relaunches", []).append(self.engine.ready())

    def _relaunch(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} does not say how it is launched")


class RelaunchWarm(_Relaunched, _Stored):
    key = "2"
    title = "weightstore: kill → relaunch, store warm"
    what = "the engine is killed; the trainer writes into the arena; a new engine process attaches to it"

    def _relaunch(self) -> dict[str, Any]:
        return self._launch


class RelaunchFromDisk(_Relaunched):
    key = "3"
    title = "kill → checkpoint → relaunch, page cache warm"
    what = "the engine is killed; the trainer saves safetensors; from_pretrained in a new engine process"

    def begin(self) -> dict[str, Any]:
        from bench.rl_step.models import MODELS, write_configs

        self.directory = write_configs(MODELS[self.bench.model], self.bench.scratch / self.bench.model)
        found = super().begin()
        found["saved_frozen"] = self.trainer.do("save_frozen", directory=str(self.directory))
        return found

    def refit(self) -> None:
        self.trainer.do("save", directory=str(self.directory))

    def _relaunch(self) -> dict[str, Any]:
        return self.config(resident="disk", directory=str(self.directory))

    def files(self) -> list[Path]:
        return sorted(self.directory.rglob("*.safetensors"))


class RelaunchCold(RelaunchFromDisk):
    key = "3c"
    title = "kill → checkpoint → relaunch, page cache cold"
    what = "as before, and the page cache has dropped the files before the new engine reads them"
    cold = True

    def drop(self) -> None:
        """Between the trainer's save and the relaunch, not timed: as if the files had been read long ago."""
        why = drop_cache(self.files())
        share = cached_share(self.files())
        if why is not None or share > 0.02:
            raise WayFailed(
                f"the page cache could not be dropped: {share:.0%} of the files is still in memory"
                + (f" ({why})" if why else f" ({_filesystem(self.directory)})")
            )


class ToCpu(Way):
    key = "4"
    title = 'pipe.to("cpu") → load_state_dict → pipe.to("cuda")'
    what = "the pipeline goes to pageable memory; the trainer saves safetensors; load_state_dict; and back"
    resident = "pageable"

    def begin(self) -> dict[str, Any]:
        self.directory = self.bench.scratch / self.bench.model
        self.directory.mkdir(parents=True, exist_ok=True)
        return super().begin()

    def sleep(self) -> None:
        self.engine.post("/to_cpu")

    def refit(self) -> None:
        self.trainer.do("save", directory=str(self.directory))
        self.engine.post(f"/load?directory={self.directory / 'transformer'}")

    def wake(self) -> None:
        self.engine.post("/to_device")


class Saver(Way):
    key = "6"
    title = "torch_memory_saver, CPU backup; IPC buckets"
    what = "pause copies to pinned memory; resume copies back; then the trainer sends 512 MiB IPC buckets"
    resident = "paused"
    after = ("wake", "refit")
    needs_gpu = True
    packages = ("torch_memory_saver",)

    def sleep(self) -> None:
        self.engine.post("/pause")

    def wake(self) -> None:
        self.engine.post("/resume")

    def refit(self) -> None:
        self.trainer.do("send", port=self.engine.port)


class SaverKept(Saver):
    key = "6k"
    title = "torch_memory_saver, backup kept; IPC buckets"
    what = "as before with retain_cpu_backup: its pinned memory stays from one sleep to the next"
    slow = False

    def begin(self) -> dict[str, Any]:
        found = super().begin()
        self.engine.post("/keep_backups")
        return found


class CheckpointEngine(SaverKept):
    key = "7"
    title = "torch_memory_saver; checkpoint-engine"
    what = "sleep and wake as before; the refit by checkpoint-engine's ParameterServer, buckets of 2 GiB"
    packages = ("torch_memory_saver", "checkpoint_engine", "zmq")

    def refit(self) -> None:
        found = self.trainer.do("checkpoint_engine", port=self.engine.port)
        self.notes.setdefault("checkpoint_engine", []).append(found["seconds"])


WAYS: Final[dict[str, type[Way]]] = {
    way.key: way
    for way in (
        SleepRefitWake,
        FrozenBeside,
        RelaunchWarm,
        Saver,
        SaverKept,
        ToCpu,
        RelaunchFromDisk,
        CheckpointEngine,
        RelaunchCold,
    )
}
"""By key, in the order in which they run: those that take longest last."""


def _filesystem(path: Path) -> str:
    """What the path lies on, for saying why its pages stay."""
    best = ("", "an unknown file system")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind = line.split()[:3]
        if os.path.commonpath([where, path.resolve()]) == where and len(where) >= len(best[0]):
            best = (where, f"{kind} at {where}")
    return best[1]
