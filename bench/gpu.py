"""`python -m bench gpu`: what sleep, wake, refit and put cost on a GPU, next to what its link can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from subprocess import CalledProcessError
from typing import Final

import click
import torch

from bench.gpu_common import device_facts, touch_memory
from bench.gpu_peers import WAYS
from bench.gpu_settings import QUICK, GpuSettings
from bench.record import RESULTS, Record, slug
from bench.rows import Goal, Row
from weightstore.cuda import driver
from weightstore.errors import DeviceError

SECTIONS: Final[dict[str, str]] = {
    "cycle": "bench.gpu_cycle",
    "assist": "bench.gpu_assist",
    "many": "bench.gpu_many",
    "relaunch": "bench.gpu_relaunch",
    "peers": "bench.gpu_peers",
}
"""What can be measured by itself, and the module with a function of that name."""
USUAL: Final = ("cycle", "many", "relaunch", "peers")


@click.command("gpu")
@click.option("--quick", is_flag=True, help="A few small samples: shows that everything works, not how fast.")
@click.option(
    "--only",
    metavar="A,B",
    help=f"Some of the sections: {', '.join(SECTIONS)}.  [default: {', '.join(USUAL)}]",
)
@click.option(
    "--peers", metavar="A,B", help=f"Of section peers some ways: {', '.join(WAYS)}.  [default: all]"
)
@click.option("--rounds", metavar="N", type=click.IntRange(min=1), help="Samples of everything.")
@click.option(
    "--warm/--no-warm", default=True, help="Touch the host's memory first, on machines that grow it."
)
@click.option(
    "--out",
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write JSON, whole after every row.  [default: bench/results/gpu-<device>.json; with "
    "--quick or --only none]",
)
def gpu_command(
    quick: bool, only: str | None, peers: str | None, rounds: int | None, warm: bool, out: Path | None
) -> None:
    """Measure sleep, wake, refit, put and relaunch of FLUX.1-dev on GPU 0.

    Needs an 80 GB GPU, 128 GiB of memory, 90 GiB in /dev/shm and about six minutes; --quick needs little.
    """
    usable, reason = driver.available()
    if not usable:
        raise click.ClickException(f"no GPU can be used: {reason}")
    settings = QUICK if quick else GpuSettings()
    if rounds is not None:
        settings = dataclasses.replace(settings, rounds=rounds)
    if peers is not None:
        settings = dataclasses.replace(settings, peers=tuple(peers.split(",")))
        if unknown := [way for way in settings.peers if way not in WAYS]:
            raise click.BadParameter(f"no way {', '.join(unknown)}; there are {', '.join(WAYS)}")
    sections = list(USUAL) if only is None else only.split(",")
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise click.BadParameter(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    torch.zeros(1, device="cuda")
    facts = device_facts()
    if out is None and not quick and only is None:
        out = RESULTS / f"gpu-{slug(facts['device'])}.json"
    record = Record(out, dataclasses.asdict(settings) | facts | {"quick": quick, "sections": sections})
    if settings.warm_memory and warm:
        click.echo(f"touched memory in {touch_memory(settings.warm_memory):.0f} s", err=True)
    for section in sections:
        measure: Callable[[GpuSettings], Iterable[Row]] = getattr(import_module(SECTIONS[section]), section)
        click.echo(f"{section} …", err=True)
        try:
            for row in measure(settings):
                record.add(row)
                click.echo(
                    f"  {row.key}: {row.ratio if row.ratio is not None else row.measured:.4g}", err=True
                )
        except (DeviceError, CalledProcessError, RuntimeError) as error:
            # The other sections stand on their own, and time on such a machine is dear.
            click.echo(f"{section} ended early: {error}", err=True)
        torch.cuda.empty_cache()
    for row in _compared(record.rows):
        record.add(row)
    record.write(complete=True)
    record.print_table()
    if out is not None:
        click.echo(f"written to {out}")


def _compared(rows: list[Row]) -> Iterator[Row]:
    """Sleep and wake of the same bytes, ours and others', from the rows that there are."""
    by_key = {row.key: row for row in rows}
    for what, ours, least in (("sleep", "sleep.main", 100.0), ("wake", "wake.main.later", 5.0)):
        for key, row in by_key.items():
            if key.startswith(f"peers.{what}.") and ours in by_key:
                named = row.what.partition(" with ")[2]
                yield Row(
                    f"faster.{what}.{key.rpartition('.')[2]}",
                    f"{what}: times faster than {named}",
                    {"measured": row.seconds["measured"], "ours": by_key[ours].seconds["measured"]},
                    value=round(row.measured / by_key[ours].measured, 1),
                    unit="×",
                    goal=Goal(least, True) if named.startswith("torch_memory_saver") else None,
                )
