"""`python -m bench sglang`: the real SGLang Diffusion engine with the plugin, beside itself without.

Every engine is a process of its own with its own spawned worker, unmodified (`sglang_role`); this process is
the trainer. Sections, one after another, on one model directory:

    stock       release, resume, an update from tensors while awake, and one that finds it asleep
    plugin      the same through the store: refits while asleep and awake
    relaunch    a fresh engine, after the transformer's files have lost all bytes but their headers
    graphs      as relaunch, with SGLang's CUDA graphs: are they still there, and right, after a sleep

What must hold is checked and counted in `checks`; JSON is whole after every step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from bench.sglang_process import MODEL, Engine, Found, Options, engine

PARTS: Final = ("proj_out", "x_embedder", "transformer_blocks.0.", "single_transformer_blocks.0.")
"""What an update changes: beginnings of names in the checkpoint."""
FACTOR: Final = 1.25
SLACK: Final = 64 << 20
"""Bytes by which two readings of a GPU's free memory may differ, and that are no weights yet."""
SECTIONS: Final = ("stock", "plugin", "relaunch", "graphs")


def stock(found: Found, options: Options, socket: str, trainer: Trainer, known: dict[str, Any]) -> None:
    with engine(found, "stock", options, None) as stock:
        stock.image("cold")
        known["first"] = stock.image("first")
        if options.checksum:
            known["checksum"] = stock.do("checksum", "checksum")["output"]
        stock.do("awake", "facts")
        known["asleep"] = cycles(stock, options)
        found.check("stock", "image equal after sleep and wake", stock.image("after wake") == known["first"])
        # An update that finds it asleep: stock has to wake first, and then writes in place.
        stock.ask("release")
        woken = stock.ask("resume")
        pushed = stock.ask("push", factor=FACTOR, prefixes=list(PARTS))
        found.add(
            "stock",
            "refit of a sleeping engine",
            {
                "resume": woken["seconds"],
                "update": pushed["seconds"],
                "prepare": pushed["prepare"],
                "bytes": pushed["bytes"],
                "error": pushed["error"],
            },
        )
        known["changed"] = stock.image("changed")
        found.check("stock", "an update changes the image", known["changed"] != known["first"])
        stock.do("update back", "push", factor=1.0, prefixes=list(PARTS))
        found.check("stock", "the update back brings it back", stock.image("restored") == known["first"])


def plugin(found: Found, options: Options, socket: str, trainer: Trainer, known: dict[str, Any]) -> None:
    with engine(found, "plugin", options, socket) as plugin:
        found.check(
            "plugin", "the plugin is active in the worker", plugin.log_has("weightstore: rank 0 attached")
        )
        plugin.image("cold")
        first = plugin.image("first")
        if "first" in known:
            found.check("plugin", "image equal to stock's", first == known["first"])
        known["first"] = first
        if options.checksum:
            found.check(
                "plugin",
                "checksums equal to stock's",
                plugin.do("checksum", "checksum")["output"] == known.get("checksum"),
            )
        plugin.do("awake", "facts")
        asleep = cycles(plugin, options)
        if "device_used" in asleep and "asleep" in known:
            found.check(
                "plugin",
                "no more left on the GPU while asleep than stock leaves",
                asleep["device_used"] <= known["asleep"]["device_used"] + SLACK,
            )
        found.check("plugin", "image equal after sleep and wake", plugin.image("after wake") == first)
        plugin.ask("release")
        found.check("plugin", "generation refused while asleep", plugin.ask("generate").get("refused", False))
        written = trainer.refit(FACTOR)
        woken = plugin.ask("resume")
        found.add(
            "plugin",
            "refit of a sleeping engine",
            {**written, "resume": woken["seconds"], "version": woken["output"].get("version")},
        )
        changed = plugin.image("changed")
        found.check("plugin", "a refit while asleep changes the image", changed != first)
        if "changed" in known:
            found.check("plugin", "as stock's update does", changed == known["changed"])
        known["changed"] = changed
        written = trainer.refit(1.0)
        answer = plugin.ask("update", model_path=f"weightstore:{MODEL}")
        found.add("plugin", "refit of an engine that is awake", {**written, **answer})
        found.check("plugin", "the refit back brings the image back", plugin.image("restored") == first)
        refused = plugin.ask("push", factor=FACTOR, prefixes=list(PARTS[:1]))
        found.check("plugin", "an update past the store is refused", refused["error"] is not None)


def relaunch(found: Found, options: Options, socket: str, trainer: Trainer, known: dict[str, Any]) -> None:
    trainer.keep()
    found.add("relaunch", "bytes taken from the transformer's files", behead(options.model_dir))
    with engine(found, "relaunch", options, socket) as again:
        found.check(
            "relaunch",
            "the transformer's files were not read",
            again.log_has("transformer filled from the store"),
        )
        found.check("relaunch", "image equal", again.image("first") == known["first"])
        if options.checksum:
            found.check(
                "relaunch",
                "checksums equal",
                again.do("checksum", "checksum")["output"] == known.get("checksum"),
            )
        again.do("awake", "facts")
        cycles(again, options)
        found.check(
            "relaunch", "image equal after sleep and wake", again.image("after wake") == known["first"]
        )


def graphs(found: Found, options: Options, socket: str, trainer: Trainer, known: dict[str, Any]) -> None:
    shape = f"{options.side}x{options.side}"
    arguments: dict[str, Any] = (
        {}
        if options.cpu
        else {
            "enable_breakable_cuda_graph": True,
            "warmup_mode": "server",
            "warmup_resolutions": [shape],
            "bcg_text_buckets": [512],
        }
    )
    with engine(found, "graphs", options, socket, **arguments) as captured:
        before = captured.do("before", "facts")
        found.check("graphs", "graphs were captured", before["graphs"] > 0 or options.cpu)
        first = captured.image("first")
        captured.ask("release")
        captured.do("asleep", "facts")
        captured.ask("resume")
        found.check(
            "graphs",
            "they are still there after sleep and wake",
            captured.do("after", "facts")["graphs"] == before["graphs"],
        )
        found.check("graphs", "image equal after sleep and wake", captured.image("after wake") == first)
        captured.ask("release")
        trainer.refit(FACTOR)
        captured.ask("resume")
        changed = captured.image("changed")
        found.check("graphs", "they replay the new weights", changed != first)
        trainer.refit(1.0)
        captured.ask("update", model_path=f"weightstore:{MODEL}")
        found.check("graphs", "and the old ones again", captured.image("restored") == first)
        found.add(
            "graphs",
            "equal to images without graphs",
            {"first": first == known.get("first"), "changed": changed == known.get("changed")},
        )


def cycles(running: Engine, options: Options) -> dict[str, Any]:
    """Releases and resumes: the first, steady ones, and one that is traced. What it said while asleep."""
    seconds: dict[str, list[float]] = {"release": [], "resume": []}
    for number in range(options.rounds):
        for command in seconds:
            answer = running.ask(command)
            seconds[command].append(answer["seconds"])
            if answer["error"]:
                running.found.check(running.section, f"{command}: {answer['error']}", False)
            if number == 0:
                running.found.add(running.section, f"first {command}", answer)
                running.do(f"after the first {command}", "facts")
    running.found.add(running.section, "seconds", seconds)
    running.trace_next_release()
    running.ask("release")
    asleep = running.do("asleep", "facts")
    running.ask("resume")
    if not options.cpu:
        copied = asleep["traced"].get("Memcpy DtoH", 0)
        if running.section == "stock":  # or the trace sees nothing, and proves nothing of the others
            running.found.check(
                "stock", f"the trace sees its copies to the host ({copied} bytes)", copied > SLACK
            )
        else:
            what = f"a release copies no weights to the host ({copied} bytes)"
            running.found.check(running.section, what, bool(asleep["traced"]) and copied < SLACK)
    return named(running, asleep, options)


def named(running: Engine, facts: dict[str, Any], options: Options) -> dict[str, Any]:
    """Say what the memory is that is left on the GPU."""
    if "device_used" in facts:
        trainer = running.found.all["sections"]["trainer"]["device"]["used"]
        running.found.add(
            running.section,
            "left on the GPU while asleep",
            {
                "in all": facts["device_used"],
                "the trainer's context": trainer,
                "torch's allocator, in use": facts["torch_allocated"],
                "torch's allocator, free": facts["torch_reserved"] - facts["torch_allocated"],
                "the worker's context, kernels and libraries": facts["device_used"]
                - trainer
                - facts["torch_reserved"],
            },
        )
    return facts


class Trainer:
    """Writes versions: tensors under the checkpoint's names, on the device that the engine is on."""

    def __init__(self, options: Options, store: Any) -> None:
        self._options, self._store = options, store
        self._base: dict[str, Any] | None = None

    def keep(self) -> None:
        """Read what will be written while the files are whole. Into host memory: what this process has on
        the GPU must not be taken for the engine's."""
        from bench.sglang_role import scaled

        if self._base is None:
            read = scaled(str(self._options.model_dir), 1.0, list(PARTS), "cpu")
            self._base = {f"transformer.{name}": tensor.clone() for name, tensor in read.items()}

    def refit(self, factor: float) -> dict[str, Any]:
        import torch

        self.keep()
        assert self._base is not None
        device = self._options.device
        tensors = {name: tensor.to(device) * factor for name, tensor in self._base.items()}
        if not self._options.cpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        with self._store.refit(MODEL, components=["transformer"], partial=True) as refit:
            refit.put_many(tensors)
        seconds = time.perf_counter() - began
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        count = len(tensors)
        tensors.clear()
        if not self._options.cpu:
            torch.cuda.empty_cache()
        return {"put_and_commit": seconds, "bytes": nbytes, "tensors": count}


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


Section = Callable[[Found, Options, str, Trainer, dict[str, Any]], None]
_SECTIONS: Final[dict[str, Section]] = {
    "stock": stock,
    "plugin": plugin,
    "relaunch": relaunch,
    "graphs": graphs,
}


@click.command("sglang")
@click.option(
    "--model-dir",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, path_type=Path),
    help="A FLUX.1-dev in diffusers' format. `relaunch` and `graphs` DESTROY its transformer's files.",
)
@click.option(
    "--out", required=True, metavar="PATH", type=click.Path(path_type=Path), help="Where to write JSON."
)
@click.option("--only", metavar="A,B", default=",".join(SECTIONS), show_default=True, help="Some sections.")
@click.option("--cpu", is_flag=True, help="A rehearsal without a GPU.")
@click.option("--side", default=512, show_default=True, help="Of the image, in pixels.")
@click.option("--steps", default=4, show_default=True, help="Of the denoising.")
@click.option("--rounds", default=3, show_default=True, help="Releases and resumes.")
@click.option("--checksum", is_flag=True, help="Also compare SGLang's checksums (37 s each for 24 GB).")
@click.option("--until", default=480.0, show_default=True, help="Seconds after which no section is begun.")
@click.option("--capacity", default="40GiB", show_default=True, help="Of the arena.")
@click.option("--window", default="1GiB", show_default=True, help="Of the arena.")
def sglang_command(only: str, **given: Any) -> None:
    """Sleep, wake, refit and relaunch of the real SGLang Diffusion engine, stock and through the store."""
    from weightstore.local import local_store

    options = Options(**given)
    sections = only.split(",")
    if unknown := [name for name in sections if name not in _SECTIONS]:
        raise click.BadParameter(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    found = Found(options.out, {**{k: str(v) for k, v in given.items()}, "parts": PARTS, "factor": FACTOR})
    known: dict[str, Any] = {}
    with local_store(options.capacity, window=options.window) as store:
        trainer = Trainer(options, store)
        if not options.cpu:
            import torch

            torch.zeros(1, device="cuda")  # this process's context: in every figure below, so taken first
            free, total = torch.cuda.mem_get_info()
            found.add("trainer", "device", {"name": torch.cuda.get_device_name(), "used": total - free})
        for name in sections:
            if found.seconds > options.until:
                found.check(name, f"left out, since {options.until:g} s were over", False)
                continue
            try:
                _SECTIONS[name](found, options, store.socket, trainer, known)
            except Exception as error:
                found.check(name, f"ended early: {type(error).__name__}: {error}"[:3000], False)
    found.complete()
    if found.wrong:
        raise click.ClickException(f"{len(found.wrong)} wrong: {'; '.join(found.wrong)[:2000]}")
