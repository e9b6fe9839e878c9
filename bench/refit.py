"""`python -m bench refit`: N ranks write their shards, against gathering them on one that writes it all.

Same bytes, same run: the ways take turns in the same processes. Memory is measured by itself, as looking at
it costs time: for each way in fresh processes, that of all ranks together (PSS: a page that several map
counts once). What the arena and the shards take is in it, for every way alike.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import click
import msgspec

import weightstore
from bench import manifests
from bench.record import RESULTS, ROOT, Record, cpu_name, slug
from bench.refit_rank import Group
from bench.rows import Goal, Row, alternate, fastest
from bench.settings import GIB, MIB
from bench.shapes import cut, total_bytes
from bench.waiting import Quiet, settle
from weightstore.client import Store
from weightstore.sizes import format_size
from weightstore.types import ALIGN, TensorSpec, align_up

REFERENCES: Final = {
    "gathered": "tensor by tensor sent to rank 0, which puts each whole",
    "state_dict": "get_model_state_dict(full_state_dict=True, cpu_offload=True), then put_many on rank 0",
}
GOAL: Final = Goal(1.0, at_least=True)
RISE: Final = Goal(16.0, at_least=False)
"""MiB that writing shards may take beyond shards and arena."""
STARTING: Final = 120.0
"""Seconds that ranks have to come."""


@dataclasses.dataclass(frozen=True)
class RefitSettings:
    """The first `limit` bytes of `model`'s `components`, sharded over each number of `ranks`; `rounds`
    samples of time and `memory_rounds` of memory, after `warm` that do not count: versions take turns in
    three places, and first use maps (and pins) each. Without `patience` no sample waits for anything."""

    model: str = "flux1-dev"
    components: tuple[str, ...] = ("transformer",)
    limit: int = GIB
    ranks: tuple[int, ...] = (2, 4)
    rounds: int = 7
    memory_rounds: int = 2
    warm: int = 3
    window: int = 256 * MIB
    device: str = "cpu"
    quiet: float = 0.1
    patience: float = 20.0

    def specs(self) -> list[TensorSpec]:
        return cut(manifests.load(self.model, self.components), self.limit)


QUICK: Final = RefitSettings(
    model="sd3.5-medium",
    components=("vae",),
    limit=8 * MIB,
    ranks=(2,),
    rounds=2,
    memory_rounds=1,
    warm=1,
    window=8 * MIB,
    patience=0.0,
)


@click.command("refit")
@click.option("--quick", is_flag=True, help="A few small samples: shows that everything works, not how fast.")
@click.option("--ranks", metavar="N,M", help="How many ranks.  [default: 2,4]")
@click.option("--limit", metavar="MIB", type=click.IntRange(min=1), help="MiB of the model.  [default: 1024]")
@click.option("--rounds", metavar="N", type=click.IntRange(min=2), help="Samples of each way.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where the shards are: a GPU for each rank."
)
@click.option(
    "--patience", metavar="SECONDS", type=click.FloatRange(min=0), help="How long a sample waits for quiet."
)
@click.option(
    "--out",
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write JSON.  [default: bench/results/refit-<CPU or GPU>.json; with --quick none]",
)
def refit_command(
    quick: bool,
    ranks: str | None,
    limit: int | None,
    rounds: int | None,
    device: str | None,
    patience: float | None,
    out: Path | None,
) -> None:
    """Measure a refit by all ranks of a sharded trainer against gathering on one, in seconds and memory.

    Needs about 8 GiB of free memory and four minutes; --quick needs little of either.
    """
    chosen: dict[str, Any] = {
        "ranks": None if ranks is None else tuple(int(n) for n in ranks.split(",")),
        "limit": None if limit is None else limit * MIB,
        "rounds": rounds,
        "device": device,
        "patience": patience,
    }
    settings = QUICK if quick else RefitSettings()
    settings = dataclasses.replace(settings, **{k: v for k, v in chosen.items() if v is not None})
    if out is None and not quick:
        out = RESULTS / f"refit-{slug(_host(settings.device))}.json"
    record = Record(out, dataclasses.asdict(settings) | {"quick": quick})
    for world in settings.ranks:
        click.echo(f"{world} ranks …", err=True)
        for row in refit(settings, world):
            record.add(row)
    record.write(complete=True)
    record.print_table()
    if out is not None:
        click.echo(f"written to {out}")


def _host(device: str) -> str:
    if device == "cpu":
        return cpu_name()
    import torch

    return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"


def refit(settings: RefitSettings, world: int) -> Iterator[Row]:
    """Seconds, and memory, of `world` ranks."""
    specs = settings.specs()
    nbytes = total_bytes(specs)
    # Room for the version the tag names, the next, and one that is still being summed.
    room = 3 * align_up(nbytes + len(specs) * ALIGN, settings.window)
    what = f"{world} ranks, {len(specs)} tensors, {format_size(nbytes)} on {settings.device}"
    quiet = Quiet(settings.quiet, settings.patience)
    ways = ("measured", *REFERENCES)
    with Trainers(settings) as trainers, weightstore.local_store(room, window=settings.window) as store:
        with trainers.ranks(world, store) as ranks:

            def timed(way: str) -> float:
                if settings.patience:
                    settle(store)
                    quiet()
                return ranks.do("sharded" if way == "measured" else way)[0]

            calls = {way: partial(timed, way) for way in ways}
            samples = alternate(calls, settings.rounds, warm=settings.warm)
        best = fastest(samples, list(REFERENCES))
        yield Row(
            f"refit/{world}",
            f"each rank writes its shards: {what}; against {best}: {REFERENCES[best]}",
            samples,
            best,
            dict(REFERENCES),
            nbytes,
            GOAL,
            notes=quiet.notes(),
        )
        rise: dict[str, list[float]] = {}
        total: dict[str, list[float]] = {}
        gpu: dict[str, list[float]] = {}
        for way in ways:
            with trainers.ranks(world, store) as ranks:
                for number in range(settings.warm + settings.memory_rounds):
                    if settings.patience:
                        settle(store)
                    before = ranks.memory()
                    peak = ranks.peak("sharded" if way == "measured" else way)
                    if number >= settings.warm:
                        rise.setdefault(way, []).append((peak.host - before) / MIB)
                        total.setdefault(way, []).append(peak.host / MIB)
                        gpu.setdefault(way, []).append(peak.gpu / MIB)
        least = fastest(total, list(REFERENCES))
        unit = "MiB"
        yield Row(
            f"memory/{world}",
            f"…peak memory of all ranks together (PSS), against {least}",
            _rounded(total),
            least,
            dict(REFERENCES),
            0,
            GOAL,
            unit=unit,
            notes={"rise_mib": _rounded(rise), "gpu_rise_mib": _rounded(gpu)},
        )
        what = "…of which above what they had before"
        value = round(max(rise["measured"]), 1)  # a rise of nothing has no ratio
        yield Row(f"rise/{world}", what, _rounded(rise), value=value, unit=unit, goal=RISE)


def _rounded(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    return {way: [round(value, 1) for value in values] for way, values in samples.items()}


# -- processes ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes at their peak: PSS of all ranks, and what they allocated on their GPUs beyond before."""

    host: int
    gpu: int


class Ranks:
    """The ranks of one trainer, by their sockets."""

    def __init__(self, links: Sequence[socket.socket]) -> None:
        self._streams = [link.makefile("rw") for link in links]
        self._pids = [answer["pid"] for answer in self._hear()]

    def do(self, way: str) -> tuple[float, int]:
        """Seconds of the slowest rank, and the GPU bytes of all."""
        for stream in self._streams:
            print(way, file=stream, flush=True)
        answers = self._hear()
        return max(a["seconds"] for a in answers), sum(a["gpu"] for a in answers)

    def peak(self, way: str) -> Peak:
        """As `do`, with somebody looking at memory all the while."""
        seen = [self.memory()]
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                seen.append(self.memory())

        looking = threading.Thread(target=look)
        looking.start()
        try:
            _, gpu = self.do(way)
        finally:
            done.set()
            looking.join()
        return Peak(max(seen), gpu)

    def memory(self) -> int:
        return sum(pss(pid) for pid in self._pids)

    def close(self) -> None:
        """Let them go."""
        for stream in self._streams:
            stream.close()

    def _hear(self) -> list[dict[str, Any]]:
        answers = []
        for stream in self._streams:
            line = stream.readline()
            if not line:
                raise RuntimeError("a rank ended early; what it said is above")
            answers.append(json.loads(line))
        return answers


def pss(pid: int) -> int:
    """Bytes of a process's memory, of pages that others map too its share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no PSS")


class Trainers:
    """The process that ranks are forked from; a context manager."""

    def __init__(self, settings: RefitSettings) -> None:
        self._settings = settings
        self._numbers = count()
        self._directory = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.refit_rank"], cwd=ROOT, stdin=subprocess.PIPE, text=True
        )

    @contextmanager
    def ranks(self, world: int, store: Store) -> Iterator[Ranks]:
        """A trainer of its own, of `world` ranks."""
        place = Path(self._directory.name, str(next(self._numbers)))
        settings = self._settings
        group = Group(
            world,
            f"{place}.meeting",
            f"{place}.link",
            store.socket,
            settings.device,
            settings.model,
            settings.components,
            settings.limit,
        )
        with ExitStack() as held:
            listener = held.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(group.link)
            listener.listen(world)
            listener.settimeout(STARTING)
            assert self._process.stdin is not None
            print(msgspec.json.encode(group).decode(), file=self._process.stdin, flush=True)
            links = [held.enter_context(listener.accept()[0]) for _ in range(world)]
            ranks = Ranks(links)
            held.callback(ranks.close)
            yield ranks

    def __enter__(self) -> Trainers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._directory.cleanup()
