"""Put and wake against plain copies of the same bytes, on one machine's memory.

The bytes of a put come from one allocation per tensor, as a trainer has them, and go to shared memory. Its
reference copies as many bytes from one private buffer to one shared one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

import weightstore
from bench.memory import COPIES, Buffer, copy
from bench.rows import Goal, Row, Way, alternate, clock, fastest
from bench.settings import Settings
from bench.shapes import modules_of, total_bytes
from bench.waiting import Quiet, settle
from engine_hooks import EngineHook
from weightstore.client import Store, connect
from weightstore.sizes import format_size
from weightstore.types import ALIGN, Extent, align_up

MODEL = "bench"
GOAL = Goal(0.9, at_least=True)


@dataclass
class Bed:
    """A private store, a real model's modules with values, and their size."""

    store: Store
    modules: dict[str, nn.Module]
    nbytes: int
    tensors: int

    @property
    def size(self) -> str:
        return f"{self.tensors} tensors, {format_size(self.nbytes)}"

    def put(self, store: Store) -> tuple[float, float]:
        """Refit everything through `store`: seconds of the puts alone, and from begin to commit."""
        began = time.perf_counter()
        with store.refit(MODEL) as refit:
            putting = time.perf_counter()
            for name, module in self.modules.items():
                refit.put_module(module, f"{name}.")
            put = time.perf_counter() - putting
        whole = time.perf_counter() - began
        settle(store)
        return put, whole


@contextmanager
def bed(settings: Settings) -> Iterator[Bed]:
    specs = settings.specs()
    nbytes = total_bytes(specs)
    # Room for the version that readers hold, the one the tag names and the next.
    room = 3 * align_up(nbytes + len(specs) * ALIGN, settings.window)
    with weightstore.local_store(room, window=settings.window) as store:
        yield Bed(store, modules_of(specs), nbytes, len(specs))


def put(settings: Settings) -> Iterator[Row]:
    """The put alone, the whole refit around it, and the first put of a process."""
    with ExitStack() as stack:
        on = stack.enter_context(bed(settings))
        source = stack.enter_context(Buffer(on.nbytes)).tensor
        shared = stack.enter_context(Buffer(on.nbytes, shared=True))
        whole: list[float] = []

        def measured() -> float:
            seconds, all_of_it = on.put(on.store)
            whole.append(all_of_it)
            return seconds

        def copied(way: str) -> Way:
            return lambda: copy(way, shared.tensor, source)

        # The first puts go to places that this process has not touched yet.
        for _ in range(3):
            on.put(on.store)
        quiet = Quiet.of(settings)
        ways: dict[str, Way] = {way: copied(way) for way in COPIES}
        samples = alternate({**ways, "measured": measured}, settings.rounds, before=quiet)
        best = fastest(samples, list(COPIES))
        yield Row(
            "put",
            f"put_module: {on.size}, to memory this process has touched, against {COPIES[best]}",
            samples,
            best,
            COPIES,
            on.nbytes,
            GOAL,
            notes=quiet.notes(),
        )
        yield Row(
            "refit",
            "the whole refit around it: begin, put, commit",
            samples | {"measured": whole[-settings.rounds :]},
            best,
            COPIES,
            on.nbytes,
        )

        def first() -> float:
            with connect(on.store.socket) as fresh:
                return on.put(fresh)[0]

        samples = alternate(
            {
                "memmove": lambda: copy("memmove", shared.unmapped(), source),
                "torch": lambda: copy("torch", shared.unmapped(), source),
                "measured": first,
            },
            max(2, settings.rounds // 2),
            before=(quiet := Quiet.of(settings)),
        )
        yield Row(
            "first put",
            "put_module, the first of a connection: its mapping has touched no page; the reference's neither",
            samples,
            fastest(samples, list(COPIES)),
            COPIES,
            on.nbytes,
            notes=quiet.notes(),
        )


def wake(settings: Settings) -> Iterator[Row]:
    """EngineHook.wake on the host backend, asleep for real: the image's pages are gone."""
    with ExitStack() as stack:
        on = stack.enter_context(bed(settings))
        on.put(on.store)
        on.modules = {name: module.to("meta") for name, module in on.modules.items()}
        hook = stack.enter_context(EngineHook.attach(on.store, MODEL, on.modules))
        lease = on.store.lease(MODEL)
        source = _bytes_of(lease.mapping.tensor, [r.extent for r in lease.records.values()])
        fresh = stack.enter_context(Buffer(source.numel(), huge=True))
        small = stack.enter_context(Buffer(source.numel()))
        sleeps: list[float] = []

        def measured() -> float:
            sleeps.append(clock(hook.sleep))
            return clock(hook.wake)

        def copied(way: str, target: Buffer, drop: bool) -> Way:
            def run() -> float:
                if drop:
                    target.drop()
                return copy(way, target.tensor, source)

            return run

        references = {
            f"{way} {kind}": f"{what}, {into}"
            for way, what in COPIES.items()
            for kind, into in {
                "dropped": "into private memory like an image's (huge pages advised) after MADV_DONTNEED",
                "dropped 4k": "into private memory without that advice after MADV_DONTNEED",
                "warm": "into private memory with its pages in place",
            }.items()
        }
        ways = {
            name: copied(
                name.split()[0], small if name.endswith("4k") else fresh, drop=not name.endswith("warm")
            )
            for name in references
        }
        quiet = Quiet.of(settings)
        samples = alternate({**ways, "measured": measured}, settings.rounds, before=quiet)
        names = list(references)
        dropped = fastest(samples, [name for name in names if name.endswith("dropped")])
        warm = fastest(samples, [name for name in names if name.endswith("warm")])
        yield Row(
            "wake",
            f"wake (host backend): {on.size}, against {references[dropped]}",
            samples,
            dropped,
            references,
            source.numel(),
            GOAL,
            notes=quiet.notes(),
        )
        yield Row("wake/warm", f"the same, against {references[warm]}", samples, warm, references, on.nbytes)
        yield Row("sleep", "sleep (host backend): every page given back", {"measured": sleeps[1:]})
        hook.close()


def _bytes_of(arena: torch.Tensor, extents: list[Extent]) -> torch.Tensor:
    """The arena from the first to the last byte of `extents`, which one refit has laid out side by side."""
    return arena[min(e.offset for e in extents) : max(e.end for e in extents)]
