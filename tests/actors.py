"""What trainers and engines do in `test_kills`: one step after the other, each of which may be their last.

Every function runs in a process of its own (see `children`), and gets there the `step` that tells the
parent where it is.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from children import Step
from processes import Raw, Sizes, eventually, fill, specs

from engine_hooks import EngineHook
from engine_hooks.host import HostBackend
from weightstore import wire
from weightstore.client import connect
from weightstore.types import Box
from weightstore.wire import Write

MODEL: Sizes = {"t.0.weight": (96, 64), "t.1.weight": (64, 96), "vae.weight": (32, 32)}
TRAINED: Sizes = {name: shape for name, shape in MODEL.items() if name.startswith("t.")}


def train(step: Step, socket: str, model: str, value: int) -> None:
    """A trainer's refit of component `t`, with one tensor more than before, from beginning to end."""
    extra: Sizes = {"t.extra": (7, 9)}
    with connect(socket) as store:
        step("connected")
        refit = store.refit(model, components=["t"], extend=True)
        step("refit open")
        records = refit.reserve(specs({**TRAINED, **extra}))
        step("reserved")
        first = records[0]
        refit.mapping.view(first.offset, first.nbytes)[:] = bytes([value]) * first.nbytes
        refit.wrote([first.name])
        step("first tensor written")
        for record in records[1:]:
            refit.mapping.view(record.offset, record.nbytes)[:] = bytes([value]) * record.nbytes
        refit.wrote(record.name for record in records[1:])
        step("all written")
        refit.commit()
        step("committed")


def train_in_a_view(step: Step, socket: str, model: str, value: int) -> None:
    """A trainer that computes on the arena itself, and goes on writing there until it dies."""
    with connect(socket) as store:
        refit = store.refit(model, components=["t"])
        view = refit.view("t.0.weight")
        stop = threading.Event()

        def scribble() -> None:
            while not stop.is_set():
                view.add_(1)

        thread = threading.Thread(target=scribble)
        thread.start()
        step("view in use")
        stop.set()
        thread.join()


def train_in_place(step: Step, socket: str, model: str, value: int) -> None:
    """A trainer that overwrites the only copy."""
    with connect(socket) as store:
        refit = store.refit(model, components=["t"], in_place=True)
        step("in-place refit open")
        view = refit.view("t.0.weight")
        view.view(torch.uint8)[: view.shape[0] // 2] = value
        step("half written")
        fill(refit, {"t.1.weight": MODEL["t.1.weight"]}, value)
        refit.view("t.0.weight").view(torch.uint8).fill_(value)
        refit.commit()
        step("committed")


def train_in_place_unheard(step: Step, socket: str, model: str, value: int) -> None:
    """The same without a client that would tell a store, once it is back, that its copies have landed."""
    with Raw(socket) as raw:
        raw.hello(instance="quiet")
        raw.ask(wire.OpenRefit(id=0, model=model, tag="latest", components=["t"], in_place=True))
        step("half written")
    step("hung up")


def commit_and_not_listen(step: Step, socket: str, model: str, value: int) -> None:
    """A trainer that dies between sending its commit and reading what became of it."""
    with connect(socket) as store, Raw(socket) as raw:
        raw.hello(instance="deaf")
        opened = raw.ask(wire.OpenRefit(id=0, model=model, tag="latest", components=["t"]))
        mapping = store.link.open_writer(raw.fds.pop())
        for record in opened.targets:
            mapping.view(record.offset, record.nbytes)[:] = bytes([value]) * record.nbytes
        raw.post(wire.CommitRefit(id=0, refit=opened.refit, writes=[Write(r.name) for r in opened.targets]))
        step("commit sent")


def declare_first(step: Step, socket: str, model: str, value: int) -> None:
    """A trainer whose copies land while the store makes the version ready: it commits in two steps."""
    with connect(socket) as store, Raw(socket) as raw:
        raw.hello(instance="early")
        opened = raw.ask(wire.OpenRefit(id=0, model=model, tag="latest", components=["t"]))
        writes = [Write(record.name) for record in opened.targets]
        raw.ask(wire.DeclareWrites(id=0, refit=opened.refit, writes=writes))
        mapping = store.link.open_writer(raw.fds.pop())
        for record in opened.targets:
            mapping.view(record.offset, record.nbytes)[:] = bytes([value]) * record.nbytes
        step("declared")
        raw.ask(wire.CommitRefit(id=0, refit=opened.refit))
        step("committed")


def train_rank(step: Step, socket: str, model: str, value: int, rank: int, size: int) -> int:
    """One rank of a shared refit: writes its rows of each tensor of `t`."""
    with connect(socket) as store:
        refit = store.refit(model, components=["t"], key="step 1", rank=rank, world_size=size)
        for name, (rows, columns) in TRAINED.items():  # type: ignore[misc]
            share = rows // size
            part = torch.full((share, columns * 4), value, dtype=torch.uint8).view(torch.float32)
            refit.put_part(name, part, at=(rank * share, 0))
        step("own part written")
        return refit.commit()


def vote_and_not_listen(step: Step, socket: str, model: str, value: int, rank: int, size: int) -> None:
    """The same for a rank that dies after its vote, while it would wait for the others'."""
    with connect(socket) as store, Raw(socket) as raw:
        raw.hello(instance="deaf")
        opened = raw.ask(
            wire.OpenRefit(
                id=0, model=model, tag="latest", components=["t"], key="step 1", rank=rank, world_size=size
            )
        )
        mapping = store.link.open_writer(raw.fds.pop())
        writes = []
        for record in opened.targets:
            share, nbytes = record.shape[0] // size, record.nbytes // size
            mapping.view(record.offset + rank * nbytes, nbytes)[:] = bytes([value]) * nbytes
            writes.append(Write(record.name, Box((rank * share, 0), ((rank + 1) * share, record.shape[1]))))
        raw.post(wire.CommitRefit(id=0, refit=opened.refit, writes=writes))
        raw.status()  # answered after the vote has been taken
        step("voted")


def hang_up_and_live(step: Step, socket: str, model: str, value: int) -> None:
    """A trainer whose connection ends while its process goes on, and says no word about its copies."""
    with Raw(socket) as raw:
        raw.hello(instance="quiet")
        raw.ask(wire.OpenRefit(id=0, model=model, tag="latest", components=["t"]))
    step("hung up")


def hold(step: Step, socket: str, model: str) -> None:
    """A reader that learns only much later that the store was restarted."""
    with connect(socket) as store:
        lease = store.lease(model)
        step("holding", lease.version)
        eventually(lambda: lease.lost, "the store no longer honours the lease")
        _ = lease.snapshot


# -- engines ---------------------------------------------------------------------------------------


class StoppingBackend(HostBackend):
    """The host's device, on which a copy can be stopped half way."""

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.step: Step | None = None

    def _copy(self, fills: Any, source: Any) -> None:
        step, self.step = self.step, None
        if step is None:
            super()._copy(fills, source)
            return
        halves = [(image, runs[: len(runs) // 2], runs[len(runs) // 2 :]) for image, runs in fills]
        super()._copy([(image, first) for image, first, _ in halves[:1]], source)
        step("mid-copy")
        super()._copy([(image, [*first, *rest]) for image, first, rest in halves], source)


def modules() -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        return {
            "t": torch.nn.Sequential(
                torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(96, 64, bias=False)
            ),
            "vae": torch.nn.Linear(32, 32, bias=False),
        }


def seen(parts: dict[str, torch.nn.Module]) -> dict[str, set[int]]:
    """The distinct bytes of every weight on the device."""
    return {
        f"{part}.{name}": set(weight.detach().view(torch.uint8).flatten().tolist())
        for part, module in parts.items()
        for name, weight in module.named_parameters()
    }


def serve_images(step: Step, socket: str, model: str) -> None:
    """An engine: attaches, sleeps, wakes, refits, whatever it is told; says what it then holds."""
    backend = StoppingBackend()
    parts = modules()
    with connect(socket) as store:
        hook = EngineHook.attach(store, model, parts, device="cpu", backend=backend)
        order = step("attached", (hook.version, seen(parts)))
        while order != "end":
            if order.endswith(", stopping half way"):
                backend.step = step
                order = order.partition(",")[0]
            if order == "sleep":
                hook.sleep()
                fact: Any = hook.version
            elif order == "wake":
                hook.wake()
                fact = (hook.version, seen(parts))
            elif order == "refit":
                hook.refit()
                fact = (hook.version, seen(parts))
            elif order == "verify":
                fact = hook.verify().differing
            elif order == "reconnected":
                fact = store.status().pid
            else:
                raise ValueError(order)
            order = step(order, fact)
        hook.close()
