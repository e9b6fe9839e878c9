"""Loading a checkpoint from the page cache against reading the same file into the same kind of memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from bench.host_copies import GOAL, Bed, bed
from bench.memory import Buffer
from bench.rows import Row, Way, alternate, clock, fastest
from bench.settings import MIB, Settings
from bench.waiting import Quiet, settle
from weightstore.checkpoint.load import load_checkpoint
from weightstore.client import connect

READ_BYTES = 16 * MIB
"""Bytes of one read of the reference."""


def load(settings: Settings) -> Iterator[Row]:
    """The whole load, from opening the file to the commit; then the same by a process's first connection."""
    with ExitStack() as stack:
        on = stack.enter_context(bed(settings))
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="weightstore-bench-"))
        path = Path(directory) / "model.safetensors"
        begin = _write(on, path)
        nbytes = path.stat().st_size - begin
        fd = os.open(path, os.O_RDONLY)
        stack.callback(os.close, fd)
        target = stack.enter_context(Buffer(nbytes, shared=True))
        cores = len(os.sched_getaffinity(0))
        threads = sorted({cores, max(4, cores)})
        references = {
            f"{count} threads": f"preadv of its data on {count} threads, 16 MiB each, into shared memory"
            for count in threads
        }
        reading: list[float] = []

        def loaded() -> float:
            report = load_checkpoint(on.store, "loaded", path)
            reading.append(report.read_seconds)
            settle(on.store)
            return report.seconds

        def plain(count: int, fresh: bool) -> Way:
            def read() -> float:
                into = memoryview(target.unmapped().numpy()) if fresh else target.view
                return clock(read_all, fd, begin, into, count)

            return read

        for _ in range(3):
            loaded()
        ways = {name: plain(count, fresh=False) for name, count in zip(references, threads, strict=True)}
        quiet = Quiet.of(settings)
        samples = alternate({**ways, "measured": loaded}, settings.rounds, before=quiet)
        best = fastest(samples, list(references))
        yield Row(
            "load",
            f"load of a safetensors file in the page cache: {on.size}, against {references[best]}",
            samples,
            best,
            references,
            nbytes,
            GOAL,
            notes={"read_seconds": reading[-settings.rounds :], **quiet.notes()},
        )

        def first() -> float:
            with connect(on.store.socket) as fresh:
                report = load_checkpoint(fresh, "loaded", path)
                settle(fresh)
                return report.seconds

        ways = {name: plain(count, fresh=True) for name, count in zip(references, threads, strict=True)}
        quiet = Quiet.of(settings)
        samples = alternate({**ways, "measured": first}, max(2, settings.rounds // 2), before=quiet)
        best = fastest(samples, list(references))
        yield Row(
            "first load",
            "the first load of a connection, as `weightstore load` does it: its mapping has touched no page; "
            "the reference's neither",
            samples,
            best,
            references,
            nbytes,
            notes=quiet.notes(),
        )


def _write(on: Bed, path: Path) -> int:
    """The bed's tensors as one safetensors file, in the page cache; where its data begins.

    Written by the safetensors package, as most checkpoints are: the data begins at a multiple of 8 and no
    more, so both sides copy between addresses that lie differently.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, module in on.modules.items():
        tensors |= {f"{name}.{inner}": value.detach() for inner, value in module.named_parameters()}
    save_file(tensors, path)
    on.modules.clear()
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def read_all(fd: int, begin: int, target: memoryview, threads: int) -> None:
    """Read a file from byte `begin` on into `target`, each thread one piece after another."""

    def read(offset: int) -> None:
        piece = target[offset : offset + READ_BYTES]
        while piece:
            moved = os.preadv(fd, [piece], begin + offset)
            offset, piece = offset + moved, piece[moved:]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(0, len(target), READ_BYTES)))
