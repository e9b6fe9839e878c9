"""`python -m bench host`: what the store costs next to what this machine's memory and kernel can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Final

import click

from bench.record import RESULTS, Record, cpu_name, slug
from bench.rows import Row
from bench.settings import QUICK, Settings

SECTIONS: Final[dict[str, str]] = {
    "put": "bench.host_copies",
    "wake": "bench.host_copies",
    "load": "bench.host_load",
    "trip": "bench.host_control",
    "lease": "bench.host_control",
    "commit": "bench.host_control",
    "start": "bench.host_start",
    "follow": "bench.host_follow",
}
"""What can be measured by itself, and the module with a function of that name."""


@click.command("host")
@click.option("--quick", is_flag=True, help="A few small samples: shows that everything works, not how fast.")
@click.option(
    "--only", metavar="A,B", help=f"Some of the sections: {', '.join(SECTIONS)}.  [default: all of them]"
)
@click.option("--rounds", metavar="N", type=click.IntRange(min=2), help="Samples of put, wake and load.")
@click.option(
    "--patience",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    help="How long a sample waits for other programs to leave the cores alone.  [default: 20]",
)
@click.option("--engines", metavar="N", type=click.IntRange(min=1), help="Engines that follow one tag.")
@click.option(
    "--out",
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write JSON.  [default: bench/results/host-<CPU>.json; with --quick or --only none]",
)
def host_command(
    quick: bool,
    only: str | None,
    rounds: int | None,
    patience: float | None,
    engines: int | None,
    out: Path | None,
) -> None:
    """Measure put, wake, load and control on this machine, as ratios to plain copies in the same run.

    Needs about 10 GiB of free memory and three minutes on a machine with nothing else to do; --quick needs
    little of either.
    """
    settings = QUICK if quick else Settings()
    chosen = {"rounds": rounds, "patience": patience, "engines": engines}
    settings = dataclasses.replace(settings, **{k: v for k, v in chosen.items() if v is not None})
    sections = _sections(only)
    if out is None and not quick and only is None:
        out = RESULTS / f"host-{slug(cpu_name())}.json"
    record = Record(out, dataclasses.asdict(settings) | {"quick": quick, "sections": sections})
    for section in sections:
        measure: Callable[[Settings], Iterable[Row]] = getattr(import_module(SECTIONS[section]), section)
        click.echo(f"{section} …", err=True)
        for row in measure(settings):
            record.add(row)
    record.write(complete=True)
    record.print_table()
    if out is not None:
        click.echo(f"written to {out}")


def _sections(only: str | None) -> list[str]:
    sections = list(SECTIONS) if only is None else only.split(",")
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise click.BadParameter(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return sections
