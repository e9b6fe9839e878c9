"""`python -m bench sglang`: the real SGLang Diffusion engine with the plugin, beside itself without.

Every engine is a process of its own with its own spawned worker, unmodified (`sglang_role`); the trainer is
another (`sglang_trainer`); this process uses no device. Sections, one after another, on one model directory:

    stock       release, resume, an update from tensors while awake, and one that finds it asleep
    plugin      the same through the store: refits while asleep and awake
    step        in the engines of both, first of all: an RL step with the whole transformer (`sglang_step`)
    graphs      two engines with SGLang's CUDA graphs (`sglang_graphs`)
    relaunch    a fresh engine, after the transformer's files have lost all bytes but their headers

What must hold is checked and counted in `checks`; what there was no time for is in `left_out`. JSON is whole
after every step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click

from bench import sglang_step
from bench.record import command_line
from bench.rl_step.memory import Sampler
from bench.rl_step.sharing import service_of
from bench.sglang_graphs import graphs
from bench.sglang_process import MODEL, PARTS, Engine, Found, Options, Run, Trainer, engine
from weightstore.paths import arena_name

SLACK: Final = 64 << 20
"""Bytes by which two readings of a GPU's free memory may differ, and that are no weights yet."""


def stock(run: Run) -> None:
    found, known, trainer = run.found, run.known, run.trainer
    host = sglang_step.baseline(run)
    with engine(run, "stock", stored=False) as stock:
        stock.image("cold")
        known["first"] = stock.image("first")
        if run.options.checksum:
            known["checksum"] = stock.do("checksum", "checksum")["output"]
        stock.facts("awake")
        if sglang_step.SECTION in run.sections:
            sglang_step.measure(run, stock, "stock", known["first"], host)
        known["asleep"] = cycles(run, stock)
        found.check("stock", "image equal after sleep and wake", stock.image("after wake") == known["first"])
        # An update that finds it asleep: stock has to wake first, and then writes in place.
        trainer.do("load", prefixes=list(PARTS))
        stock.ask("release")
        woken = stock.ask("resume")
        pushed = push(run, stock, 1)
        found.add("stock", "refit of a sleeping engine", {"resume": woken["seconds"], **pushed})
        known["changed"] = stock.image("changed")
        found.check("stock", "an update changes the image", known["changed"] != known["first"])
        found.add("stock", "update back", push(run, stock, 0))
        found.check("stock", "the update back brings it back", stock.image("restored") == known["first"])
        trainer.do("drop")


def plugin(run: Run) -> None:
    found, known, trainer = run.found, run.known, run.trainer
    host = sglang_step.baseline(run)
    with engine(run, "plugin", stored=True) as plugin:
        found.check(
            "plugin", "the plugin is active in the worker", plugin.log_has("weightstore: rank 0 attached")
        )
        plugin.image("cold")
        first = plugin.image("first")
        if "first" in known:
            found.check("plugin", "image equal to stock's", first == known["first"])
        known["first"] = first
        if run.options.checksum:
            found.check(
                "plugin",
                "checksums equal to stock's",
                plugin.do("checksum", "checksum")["output"] == known.get("checksum"),
            )
        plugin.facts("awake")
        if sglang_step.SECTION in run.sections:
            sglang_step.measure(run, plugin, "plugin", first, host)
        asleep = cycles(run, plugin)
        if "device_used" in asleep and "asleep" in known:
            ours, theirs = (
                facts["device_used"] - facts["trainer_device"] for facts in (asleep, known["asleep"])
            )
            what = "no more left on the GPU while asleep than stock leaves"
            found.check("plugin", what, ours <= theirs + SLACK)
        found.check("plugin", "image equal after sleep and wake", plugin.image("after wake") == first)
        trainer.do("load", prefixes=list(PARTS))
        plugin.ask("release")
        found.check("plugin", "generation refused while asleep", plugin.ask("generate").get("refused", False))
        written = put(run, 1)
        woken = plugin.ask("resume")
        found.add(
            "plugin",
            "refit of a sleeping engine",
            {**written, "resume": woken["seconds"], "woken on": woken["output"].get("version")},
        )
        changed = plugin.image("changed")
        found.check("plugin", "a refit while asleep changes the image", changed != first)
        if "changed" in known:
            found.check("plugin", "as stock's update does", changed == known["changed"])
        known["changed"] = changed
        written = put(run, 0)
        answer = plugin.ask("update", model_path=f"weightstore:{MODEL}")
        found.add("plugin", "refit of an engine that is awake", {**written, **answer})
        found.check("plugin", "the refit back brings the image back", plugin.image("restored") == first)
        refused = push(run, plugin, 1)
        found.check("plugin", "an update past the store is refused", refused["error"] is not None)
        trainer.do("drop")


def relaunch(run: Run) -> None:
    found, known = run.found, run.known
    if "first" not in known or "plugin" not in run.sections:
        found.leave_out("relaunch", "it compares with the section plugin, which was not run")
        return
    found.add("relaunch", "bytes taken from the transformer's files", behead(run.options.model_dir))
    with engine(run, "relaunch", stored=True) as again:
        found.check(
            "relaunch",
            "the transformer's files were not read",
            again.log_has("transformer filled from the store"),
        )
        found.check("relaunch", "image equal", again.image("first") == known["first"])
        if run.options.checksum:
            found.check(
                "relaunch",
                "checksums equal",
                again.do("checksum", "checksum")["output"] == known.get("checksum"),
            )
        again.facts("awake")
        cycles(run, again)
        found.check(
            "relaunch", "image equal after sleep and wake", again.image("after wake") == known["first"]
        )


def push(run: Run, running: Engine, step: int) -> dict[str, Any]:
    """What the trainer has loaded, as of that step, by SGLang's update from tensors."""
    run.trainer.do("step", number=step)
    return run.trainer.do("push", endpoint=running.endpoint, bucket=run.options.bucket)


def put(run: Run, step: int) -> dict[str, Any]:
    """What the trainer has loaded, as of that step, into the store."""
    run.trainer.do("step", number=step)
    return run.trainer.do("put", partial=True)


def cycles(run: Run, running: Engine) -> dict[str, Any]:
    """Releases and resumes: the first, if the step was not that, steady ones, and one that is traced. What it
    said while asleep."""
    found, section = run.found, running.section
    seconds: dict[str, list[float]] = {}
    for command in ("release", "resume"):
        before = run.known.get(f"{section} {command}", [])
        seconds[command] = [answer["seconds"] for answer in before]
        if before:
            found.add(section, f"first {command}", before[0])
    slept = running.has_slept
    for number in range(run.options.rounds):
        for command in seconds:
            answer = running.ask(command)
            seconds[command].append(answer["seconds"])
            if answer["error"]:
                found.check(section, f"{command}: {answer['error']}", False)
            if number == 0:
                if not slept:
                    found.add(section, f"first {command}", answer)
                running.facts(f"after a {command}" if slept else f"after the first {command}")
    found.add(section, "seconds", seconds)
    running.trace_next_release()
    running.ask("release")
    asleep = running.facts("asleep")
    running.ask("resume")
    if not run.options.cpu:
        copied = asleep["traced"].get("Memcpy DtoH", 0)
        if section == "stock":  # or the trace sees nothing, and proves nothing of the others
            found.check("stock", f"the trace sees its copies to the host ({copied} bytes)", copied > SLACK)
        else:
            what = f"a release copies no weights to the host ({copied} bytes)"
            found.check(section, what, bool(asleep["traced"]) and copied < SLACK)
    return named(run, section, asleep)


def named(run: Run, section: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Say what the memory is that is left on the GPU."""
    if "device_used" in facts:
        run.found.add(
            section,
            "left on the GPU while asleep",
            {
                "in all": facts["device_used"],
                "the trainer's context": facts["trainer_device"],
                "torch's allocator, in use": facts["torch_allocated"],
                "torch's allocator, free": facts["torch_reserved"] - facts["torch_allocated"],
                "the worker's context, kernels and libraries": facts["device_used"]
                - facts["trainer_device"]
                - facts["torch_reserved"],
            },
        )
    return facts


def behead(model_dir: Path) -> int:
    """Leave of the transformer's files their headers and their length, with holes for data; bytes freed."""
    freed = 0
    for path in sorted((model_dir / "transformer").glob("*.safetensors")):
        with open(path, "r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            file.truncate(header)
            file.truncate(size)
            freed += size - header
    return freed


_SECTIONS: Final[dict[str, Callable[[Run], None]]] = {
    "stock": stock,
    "plugin": plugin,
    "graphs": graphs,
    "relaunch": relaunch,
}
_TAKE: Final = {"stock": 230.0, "plugin": 130.0, "graphs": 230.0, "relaunch": 95.0}
"""Seconds of each section at full size on an H100, its machine cold: most of them is SGLang's start."""
SECTIONS: Final = ("stock", "plugin", sglang_step.SECTION, "graphs", "relaunch")


@click.command("sglang")
@click.option(
    "--model-dir",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, path_type=Path),
    help="A FLUX.1-dev in diffusers' format. `relaunch` DESTROYS its transformer's files.",
)
@click.option(
    "--out", required=True, metavar="PATH", type=click.Path(path_type=Path), help="Where to write JSON."
)
@click.option("--only", metavar="A,B", default=",".join(SECTIONS), show_default=True, help="Some sections.")
@click.option("--cpu", is_flag=True, help="A rehearsal without a GPU.")
@click.option("--side", default=512, show_default=True, help="Of the image, in pixels.")
@click.option("--steps", default=4, show_default=True, help="Of the denoising.")
@click.option("--cycles", type=click.IntRange(min=1), default=3, show_default=True, help="Of `step`.")
@click.option("--bucket", default="2GiB", show_default=True, help="Of an update from tensors, at most.")
@click.option("--rounds", default=2, show_default=True, help="Releases and resumes.")
@click.option("--checksum", is_flag=True, help="Also compare SGLang's checksums (37 s each for 24 GB).")
@click.option(
    "--budget", default=480.0, show_default=True, help="Seconds; no section begins that would not fit."
)
@click.option("--capacity", default="50GiB", show_default=True, help="Of the arena.")
@click.option("--window", default="1GiB", show_default=True, help="Of the arena.")
def sglang_command(only: str, **given: Any) -> None:
    """Sleep, wake, refit and relaunch of the real SGLang Diffusion engine, stock and through the store."""
    from weightstore.local import local_store

    options = Options(**given)
    asked = only.split(",")
    if unknown := [name for name in asked if name not in SECTIONS]:
        raise click.BadParameter(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if sglang_step.SECTION in asked and not {"stock", "plugin"} & set(asked):
        raise click.BadParameter("step is measured in the engines of stock and plugin: add one or both")
    settings = {k: str(v) for k, v in given.items() if k not in ("model_dir", "out")}
    found = Found(options.out, settings | {"parts": PARTS})
    found.all["command"] = command_line("sglang", (options.model_dir, options.out))
    found.all["model"] = sglang_step.sizes(options.model_dir)
    with ExitStack() as held:
        store = held.enter_context(local_store(options.capacity, window=options.window))
        sampler = held.enter_context(Sampler("cpu" if options.cpu else "cuda"))
        trainer = Trainer(options, store.socket)
        held.callback(trainer.end)
        if not options.cpu:
            device = {"name": trainer.started["name"], "used": trainer.started["own"]}
            found.add("trainer", "device", device)
        run = Run(
            found,
            options,
            asked,
            trainer,
            sampler,
            socket=store.socket,
            arena=Path("/dev/shm") / arena_name(store.socket),
            service=service_of(store.socket),
        )
        for name, section in _SECTIONS.items():
            if name not in asked:
                continue
            take = 0.0 if options.cpu else _TAKE[name]
            if found.seconds + take > options.budget:
                found.leave_out(name, f"{found.seconds:.0f} of {options.budget:g} s were over")
                continue
            try:
                section(run)
            except Exception as error:
                found.check(name, f"ended early: {type(error).__name__}: {error}"[:3000], False)
    found.complete()
    if found.wrong:
        raise click.ClickException(f"{len(found.wrong)} wrong: {'; '.join(found.wrong)[:2000]}")
