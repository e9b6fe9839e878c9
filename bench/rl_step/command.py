"""`python -m bench rl-step`: from the last image on the old weights to the first on the new, in every way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click

from bench.record import RESULTS, ROOT, command_line, machine, slug
from bench.rl_step import summary
from bench.rl_step.found import Found
from bench.rl_step.memory import Sampler
from bench.rl_step.processes import Child, Remaining, WayFailed
from bench.rl_step.run import OVER, Run
from bench.rl_step.ways import WAYS, Way

LIMIT_ROUNDS: Final = 3
LIMIT_AGAIN: Final = 60.0
"""Seconds that must be left for measuring the link once more after way 1: hosts are noisy."""
MODEL_NAMES: Final = ("flux1-dev", "sd3.5-medium", "tiny")


def _sizes(model: str) -> dict[str, Any]:
    """Bytes of the pipeline and of its trained part, from a build without weights."""
    from bench.rl_step.models import MODELS, TRAINED, bytes_of, write_configs
    from engine_hooks.integrations.from_config import build

    wanted = MODELS[model]
    with tempfile.TemporaryDirectory() as directory:
        home = write_configs(wanted, Path(directory))
        built = {
            name: build(name, component.cls(), home / name, wanted.dtype)
            for name, component in wanted.components.items()
        }
    components = {name: bytes_of(module) for name, module in built.items()}
    return {
        "name": model,
        "pipeline": wanted.pipeline,
        "components": components,
        "whole_bytes": sum(components.values()),
        "trained": TRAINED,
        "trained_bytes": components[TRAINED],
        "trained_tensors": sum(1 for _ in built[TRAINED].parameters()),
        "dtype": str(wanted.dtype).removeprefix("torch."),
        "side": wanted.side,
        "steps": wanted.steps,
    }


def _limit(device: str, sizes: dict[str, Any], warm: int, patience: float) -> dict[str, Any]:
    """The link's limit, from a process that has the memory to itself."""
    command = [sys.executable, "-m", "bench.rl_step.limit", "cpu" if device == "cpu" else "cuda"]
    numbers = (sizes["trained_bytes"], sizes["whole_bytes"], LIMIT_ROUNDS, warm)
    done = subprocess.run(
        [*command, *map(str, numbers)], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=patience
    )
    if done.returncode:
        raise RuntimeError(f"measuring the link's limit ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _limit_or_why(*arguments: Any) -> dict[str, Any]:
    """The limit, or what kept it from being measured: the ways can be compared without."""
    try:
        return _limit(*arguments)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"device": {"device": "unknown"}, "failed": str(error)}


def _chosen(ways: str) -> list[type[Way]]:
    asked = ways.split(",")
    unknown = [key for key in asked if key not in WAYS]
    if unknown:
        there = "; ".join(f"{key} {way.title}" for key, way in WAYS.items())
        raise click.BadParameter(f"no way {', '.join(unknown)}; there are: {there}")
    return [way for key, way in WAYS.items() if key in asked]


def share(found: Found, counts: Sequence[int], log: Path, remaining: Remaining) -> None:
    """Host memory by the number of engines: rows into the results as they come, or what kept them away.

    Args:
        remaining: seconds that each row may take, asked when it is waited for.
    """
    rows: list[dict[str, Any]] = []
    found.note("sharing", rows)
    with Child("sharing", ",".join(map(str, counts)), log, remaining) as child:
        try:
            for _ in counts:
                rows.append(child.read())
                found.write()
        except WayFailed as error:
            found.note("sharing_left_out", f"after {len(rows)} of {len(counts)} rows {error}")


@click.command("rl-step")
@click.option("--model", type=click.Choice(MODEL_NAMES), default="tiny", show_default=True)
@click.option(
    "--ways",
    metavar="1,2,…",
    default=",".join(WAYS),
    show_default=True,
    help="Which; they run in an order of their own. 3c: with a cold page cache; 6k: with its backup kept.",
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cpu", show_default=True)
@click.option("--cycles", type=click.IntRange(min=1), default=5, show_default=True, help="Of 1 and 1s.")
@click.option(
    "--slow-cycles", type=click.IntRange(min=1), default=2, show_default=True, help="Of all others; 3c: 1."
)
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--budget", type=float, metavar="SECONDS", help="No way and no cycle begins after that time.")
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where checkpoints go: room for the whole pipeline.  [default: a temporary directory]",
)
@click.option("--engines", metavar="1,2,…", default="", help="Also host memory by the number of engines.")
@click.option("--warm/--no-warm", default=True, help="Touch a GPU machine's memory first.")
@click.option(
    "--out",
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON, whole after every cycle.  [default: bench/results/rl-step-MODEL-DEVICE.json; tiny: none]",
)
def rl_step_command(
    model: str,
    ways: str,
    device: str,
    cycles: int,
    slow_cycles: int,
    seed: int,
    budget: float | None,
    scratch: Path | None,
    engines: str,
    warm: bool,
    out: Path | None,
) -> None:
    """Sleep + refit + wake against kill + relaunch, and what else people do, with real processes.

    flux1-dev needs an 80 GB GPU, 128 GiB of memory, 64 GiB in /dev/shm and 40 GB for checkpoints.
    """
    from bench.rl_step.models import MODELS, write_configs

    chosen = _chosen(ways)
    with ExitStack() as held:
        logs = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="rl-step-")))
        configs = write_configs(MODELS[model], logs / "configs")
        command = command_line("rl-step", [path for path in (scratch, out) if path is not None])
        if scratch is None:
            scratch = logs / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        (logs / "logs").mkdir()
        found = Found(None, machine=machine(), command=command)
        options: dict[str, Any] = {
            "model": model,
            "device": device,
            "seed": seed,
            "cycles": cycles,
            "slow_cycles": slow_cycles,
            "budget": budget,
        }
        found.all["settings"] = {**options, "ways": [way.key for way in chosen]}
        sampler = held.enter_context(Sampler(device))
        run = Run(
            held,
            found,
            sampler,
            **options,
            scratch=scratch,
            logs=logs / "logs",
            configs=configs,
        )
        held.callback(run.close_store)
        run.start_ahead(sum(way.impossible(device) is None for way in chosen))
        sizes = _sizes(model)
        run.capacity = _capacity(sizes, MODELS[model].window)
        found.all["model"] = sizes
        click.echo("the link's limit …", err=True)
        limit = _limit_or_why(device, sizes, MODELS[model].warm if warm else 0, run.patience())
        run.wait_for_imports()
        if out is None and model != "tiny":
            out = RESULTS / f"rl-step-{model}-{slug(limit['device']['device'])}.json"
        found.to(out)
        found.note("limit", limit)
        for way in chosen:
            click.echo(f"{way.key}: {way.title}", err=True)
            run.measure(way)
            state = found.all["ways"][way.key]
            if state["status"] != "ok":
                click.echo(f"  {state['status']}: {state['reason']}", err=True)
            if way.key == "1" and device != "cpu" and run.left() > LIMIT_AGAIN:
                again = _limit_or_why(device, sizes, 0, run.patience())
                for link in ("h2d", "d2h"):
                    if link in again and link in limit:
                        limit[link]["seconds"] += again[link]["seconds"]
                found.note("limit", limit)
        run.close_store()
        if engines:
            counts = [int(count) for count in engines.split(",")]
            if run.left() > 0:
                share(found, counts, logs / "logs" / "sharing.log", run.patience)
            else:
                found.all["sharing"] = []
                found.note("sharing_left_out", OVER)
            if why := found.all.get("sharing_left_out"):
                click.echo(f"host memory by the number of engines, left out: {why}", err=True)
        found.complete()
        shutil.rmtree(scratch / model, ignore_errors=True)
    summary.print_table(found.all)
    if out is not None:
        click.echo(f"written to {out}")
    wrong = [key for key, way in found.all["ways"].items() if not summary.pictures_equal(way)]
    if wrong:
        raise click.ClickException(f"pictures differ in way {', '.join(wrong)}; the results say how")


def _capacity(sizes: dict[str, Any], window: int) -> int:
    """The pipeline, a second version of what is trained, and room for alignment."""
    needed = sizes["whole_bytes"] + sizes["trained_bytes"]
    return -(-(needed + needed // 1000 + 4 * window) // window) * window
