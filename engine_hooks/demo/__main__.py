"""Command line of the demo."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from rich.console import Console

from engine_hooks.demo.timeline import Timeline
from weightstore.errors import DependencyMissing, WeightstoreError


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    help="Folder for the pictures.",
)
@click.option(
    "--socket",
    type=click.Path(),
    default=None,
    metavar="PATH",
    help="Use the store there, and leave the model `digits` in it.  [default: a private store]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where the engine and the trainer compute.",
)
@click.option(
    "--rounds",
    default="40,60,80,140",
    metavar="N,N,…",
    help="Training steps of each round, one refit per round.",
)
@click.option(
    "--per-digit", type=click.IntRange(1, 100), default=10, help="Images drawn of each digit after each wake."
)
@click.option("--seed", type=int, default=7, help="Seed of the weights, the batches and the drawing noise.")
def main(out: Path, socket: str | None, device: str, rounds: str, per_digit: int, seed: int) -> None:
    """A diffusion model learns to draw digits while its engine sleeps and wakes.

    Starts a store, a trainer and an engine, prints what they do and writes digits.png and memory.png.
    """
    # Nothing is downloaded; a library that would like to ask a hub must not wait for one.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        steps = tuple(int(part) for part in rounds.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{rounds!r} is not a list of numbers like 40,60", param_hint="--rounds"
        ) from None
    if not steps or min(steps) < 1:
        raise click.BadParameter("every round needs at least one step", param_hint="--rounds")
    try:
        _require("diffusers", "transformers", "sklearn", "matplotlib")
        from engine_hooks.demo.loop import Settings, run

        settings = Settings(out, socket, device, steps, per_digit, seed)
        run(settings, Timeline(Console(highlight=False)))
    except (WeightstoreError, OSError) as error:
        print(f"weightstore demo: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise DependencyMissing(f"the demo needs {', '.join(missing)}: pip install 'weightstore[demo]'")


if __name__ == "__main__":
    main(prog_name="weightstore demo")
