"""The driver: whose turn it is, as a loop of rollouts and training phases on shared memory.

draw → sleep → train → refit → wake → draw …: the engine gives its memory back before the trainer
works, and has the trainer's newest weights when it wakes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import weightstore
from engine_hooks.demo import MODEL
from engine_hooks.demo.digits import SIDE, Judge, Pixels
from engine_hooks.demo.memory import MemorySampler, gpu_bytes, private_bytes, segment_bytes
from engine_hooks.demo.pictures import Grid, paint_grids, paint_memory
from engine_hooks.demo.role import Role
from engine_hooks.demo.timeline import Timeline, duration, summary
from weightstore.errors import DeviceError, EngineAsleep, WeightstoreError
from weightstore.sizes import format_size

ROUNDS = (40, 60, 80, 140)
"""Training steps of each round: early ones are short, because most of the progress happens there."""

FULL = 256 << 20
SMALL = 40 << 20
"""Arena capacity in bytes with the full text encoder, and with the small one for hosts whose /dev/shm
is small (64 MiB is what containers get by default)."""

WINDOW = 8 << 20
"""Bytes by which the arena grows: small, so that the chart shows what is needed and no more."""


@dataclass(frozen=True)
class Settings:
    """`rounds` are training steps, `per_digit` how many images of each digit are drawn; `socket` names a
    running store to use instead of a private one."""

    out: Path
    socket: str | None = None
    device: str = "auto"
    rounds: tuple[int, ...] = ROUNDS
    per_digit: int = 10
    seed: int = 7


@dataclass(frozen=True)
class Result:
    grids: list[Grid]
    tensors_equal: int
    freed_bytes: list[int]
    pictures: list[Path]


def run(settings: Settings, timeline: Timeline) -> Result:
    """Play all rounds, print them, paint the pictures.

    Raises:
        WeightstoreError: something failed, or the engine's weights differ from the trainer's.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        store, text_size = _open_store(settings, stack)
        status = store.status()
        timeline.say(
            "store",
            f"process {status.pid} serves arena {status.arena.name}, up to "
            f"{format_size(status.arena.capacity)}",
        )
        config = {
            "socket": store.socket,
            "device": settings.device,
            "seed": settings.seed,
            "text_size": text_size,
            "total_steps": sum(settings.rounds),
        }
        # Both start at once: importing torch and diffusers takes a while.
        started = timeline.now
        trainer = stack.enter_context(Role("trainer", "engine_hooks.demo.trainer", config))
        engine = stack.enter_context(Role("engine", "engine_hooks.demo.engine", config))
        sampler = stack.enter_context(_sampling(timeline, trainer, engine, status.arena.name))
        play = _Play(settings, timeline, store, trainer, engine, Judge())
        play.start(started)
        if play.device.startswith("cuda"):
            _watch_gpu(sampler, timeline)
        grids, freed = play.rounds()
        equal = play.compare()
        play.account()
        sampler.close()
    pictures = [settings.out / "digits.png", settings.out / "memory.png"]
    paint_grids(pictures[0], grids)
    gpu = {label: values for label, values in sampler.series.items() if label.startswith("GPU")}
    where = "GPU memory" if gpu else "host memory"
    paint_memory(pictures[1], sampler.times, gpu or sampler.series, timeline.spans, where)
    play.summarise(grids, pictures)
    return Result(grids, equal, freed, pictures)


class _Play:
    """The three actors and what they have said so far."""

    def __init__(
        self,
        settings: Settings,
        timeline: Timeline,
        store: weightstore.Store,
        trainer: Role,
        engine: Role,
        judge: Judge,
    ) -> None:
        self._settings = settings
        self._timeline = timeline
        self._store = store
        self._trainer = trainer
        self._engine = engine
        self._judge = judge
        self._asked = np.repeat(np.arange(10), settings.per_digit)
        self._rows: list[tuple[str, ...]] = []
        self._first = 0
        self.device = "cpu"

    def start(self, started: float) -> None:
        say, span = self._timeline.say, self._timeline.span
        say("judge", f"reads {self._judge.skill:.1%} of the real digits it never saw correctly")
        with span("trainer", "starts", since=started), span("engine", "starts", since=started):
            told = self._trainer.ask("publish")
        self.device, self._first = told["device"], told["version"]
        say(
            "trainer",
            f"on {self.device}: UNet2DConditionModel, {told['unet_parameters'] / 1e6:.1f} M parameters, to "
            f"train; T5 text encoder, {told['text_parameters'] / 1e6:.1f} M, frozen",
        )
        say(
            "trainer",
            f"published [bold]version {told['version']}[/], untrained: {told['tensors']} tensors, "
            f"{format_size(told['bytes'])} in {duration(told['seconds'])}",
        )
        with span("engine", "attaches"):
            told = self._engine.ask("attach")
        say(
            "engine",
            f"attached to version {told['version']}: {format_size(told['copied'])} came from the arena into "
            f"empty modules in {duration(told['seconds'])}, no checkpoint was read",
        )

    def rounds(self) -> tuple[list[Grid], list[int]]:
        """All rounds: what was drawn with each version, and the bytes each sleep freed."""
        grids = [self._draw(self._first, steps=0)]
        self._rows.append((str(self._first), "0", "", "", "", "", f"{grids[0].share_read:.0%}"))
        freed: list[int] = []
        for steps in self._settings.rounds:
            slept = self._sleep()
            freed.append(slept["freed"])
            with self._timeline.span("engine", "asleep", f"{format_size(slept['freed'])}\nfreed") as nap:
                if len(freed) == 1:
                    self._disturb()
                refitted = self._train(steps)
            woken = self._wake(after=grids[-1].version)
            grids.append(self._draw(woken["version"], grids[-1].steps + steps))
            self._rows.append(
                (
                    str(woken["version"]),
                    str(grids[-1].steps),
                    f"{format_size(refitted['bytes'])}, {duration(refitted['seconds'])}",
                    f"{format_size(slept['freed'])}, {duration(slept['seconds'])}",
                    duration(nap.seconds),
                    f"{format_size(woken['copied'])}, {duration(woken['seconds'])}",
                    f"{grids[-1].share_read:.0%}",
                )
            )
        return grids, freed

    def compare(self) -> int:
        """How many tensors the engine and the trainer hold alike, bit for bit: all of them, or an error."""
        mine, theirs = self._engine.ask("digests"), self._trainer.ask("digests")["digests"]
        held = mine["digests"]
        different = {name for name in held.keys() | theirs.keys() if held.get(name) != theirs.get(name)}
        different.update(mine["unlike_arena"])
        if different:
            raise WeightstoreError(
                f"{len(different)} of {len(theirs)} tensors differ between the engine and the trainer or the "
                f"arena, first {min(different)}; this is a bug in weightstore, please report it",
                different=sorted(different),
            )
        self._timeline.say(
            "engine",
            f"[bold green]all {len(held)} tensors equal the trainer's, bit for bit[/] (SHA-256 of every one, "
            "in both processes)",
        )
        return len(held)

    def account(self) -> None:
        """Say what the arena holds of the demo's model after all refits."""
        (versions,) = (known.versions for known in self._store.status().models if known.name == MODEL)
        self._timeline.say(
            "store",
            f"keeps {len(versions)} of {versions[-1].number - self._first + 1} versions of "
            f"{format_size(versions[-1].nbytes)}: what no tag names and nobody leases is gone; the frozen "
            "text encoder was written once",
        )

    def summarise(self, grids: list[Grid], pictures: list[Path]) -> None:
        header = ("v", "steps", "refit", "freed by sleep", "slept", "copied by wake", "read")
        console = self._timeline.console
        console.print()
        console.print(summary(self._rows, header))
        console.print()
        for picture in pictures:
            console.print(f"[bold]{picture}[/]", highlight=False, soft_wrap=True)
        first, last = grids[0].share_read, grids[-1].share_read
        console.print(
            f"From {first:.0%} to {last:.0%} of digits read correctly in {self._timeline.now:.0f} s."
        )

    def _draw(self, version: int, steps: int) -> Grid:
        with self._timeline.span("engine", "draws", f"v{version}"):
            told = self._engine.ask("draw", per_digit=self._settings.per_digit)
        images = _pixels(told["pixels"])
        grid = Grid(version, steps, images, self._judge.share_read(images, self._asked))
        self._timeline.say(
            "engine", f"drew {len(images)} digits with version {version} in {duration(told['seconds'])}"
        )
        self._timeline.show_digits(images[:: self._settings.per_digit])
        self._timeline.say("judge", f"reads [bold]{grid.share_read:.0%}[/] of them as the digit asked for")
        return grid

    def _sleep(self) -> dict[str, Any]:
        told = self._engine.ask("sleep")
        self._timeline.say(
            "engine",
            f"[bold]asleep[/] after {duration(told['seconds'])}: {format_size(told['freed'])} freed, "
            f"{format_size(told['saved'])} of engine state saved, no weights copied",
        )
        return told

    def _disturb(self) -> None:
        """Ask the sleeping engine for digits, to show that it says no instead of touching freed memory."""
        try:
            self._engine.ask("draw", per_digit=1)
        except EngineAsleep:
            self._timeline.say("engine", "a request that comes now is refused with EngineAsleep")

    def _train(self, steps: int) -> dict[str, Any]:
        timeline = self._timeline
        with timeline.steps("trainer", "trains", steps) as move, timeline.span("trainer", "trains"):
            told = self._trainer.ask("train", lambda progress: move(progress["done"]), steps=steps)
        timeline.say(
            "trainer", f"trained {steps} steps in {duration(told['seconds'])}, mean loss {told['loss']:.2f}"
        )
        with timeline.span("trainer", "refits"):
            refitted = self._trainer.ask("refit")
        timeline.say(
            "trainer",
            f"refitted to [bold]version {refitted['version']}[/]: {refitted['tensors']} tensors, "
            f"{format_size(refitted['bytes'])} in {duration(refitted['seconds'])}",
        )
        return refitted

    def _wake(self, after: int) -> dict[str, Any]:
        # The driver does not tell the engine which version to take: it follows the tag.
        with self._timeline.span("engine", "wakes"):
            told = self._engine.ask("wake", after=after)
        self._timeline.say(
            "engine",
            f"[bold]awake[/] on version {told['version']} after {duration(told['seconds'])}: "
            f"{format_size(told['copied'])} copied at {_rate(told['copied'], told['seconds'])}",
        )
        return told


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / max(seconds, 1e-9) / 1e9:.1f} GB/s"


def _pixels(text: str) -> Pixels:
    levels = np.frombuffer(bytes.fromhex(text), dtype=np.uint8).reshape(-1, SIDE, SIDE)
    return (levels / 127.5 - 1).astype(np.float32)


def _open_store(settings: Settings, stack: ExitStack) -> tuple[weightstore.Store, str]:
    """The store to use, closed with `stack`, and the size of text encoder that has room in it."""
    if settings.socket is not None:
        store = stack.enter_context(weightstore.connect(settings.socket))
        return store, "full" if store.status().arena.capacity >= FULL else "small"
    shm = os.statvfs("/dev/shm")
    size, capacity = ("full", FULL) if shm.f_bavail * shm.f_frsize > 2 * FULL else ("small", SMALL)
    return stack.enter_context(weightstore.local_store(capacity, window=WINDOW)), size


@contextmanager
def _sampling(timeline: Timeline, trainer: Role, engine: Role, arena: str) -> Iterator[MemorySampler]:
    sampler = MemorySampler(timeline.origin)
    sampler.watch("engine, private", lambda: private_bytes(engine.pid))
    sampler.watch("trainer, private", lambda: private_bytes(trainer.pid))
    sampler.watch("arena, shared by both", lambda: segment_bytes(arena))
    sampler.start()
    try:
        yield sampler
    finally:
        sampler.close()


def _watch_gpu(sampler: MemorySampler, timeline: Timeline) -> None:
    try:
        gpu_bytes()
    except DeviceError as error:
        timeline.say("store", f"the chart shows host memory only: {error.message}")
    else:
        sampler.watch("GPU memory in use", gpu_bytes)
