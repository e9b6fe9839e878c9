"""Section `graphs` of `python -m bench sglang`: are SGLang's CUDA graphs there, and right, after a sleep?

SGLang's own engine comes first: whether it captures its graphs on this machine is no question to the plugin.
If it does not, that is what the section says, with what stopped the capture, and nothing is asked of the
plugin. On a CPU there are no graphs; then the rest is rehearsed without.

What is counted is graphs captured in the worker, which must not grow after its start, and replays while an
image is drawn: without any the image was drawn without graphs and proves nothing of them.
"""

from __future__ import annotations

from typing import Any

from bench.sglang_process import MODEL, PARTS, Engine, Options, Run, engine

Image = tuple[str, str]


def graphs(run: Run) -> None:
    wanted = _arguments(run.options)
    with engine(run, "graphs", stored=False, name="graphs-stock", **wanted) as stock:
        captured = stock.facts("stock: after the start")["captured"]
        if not captured and not run.options.cpu:
            run.found.add("graphs", "not to be had", "SGLang's own engine captures no graph on this machine")
            return
        first, replays = _drawn(stock, "stock: first")
        run.found.check("graphs", "stock replays them", replays > 0 or run.options.cpu)
    with engine(run, "graphs", stored=True, name="graphs-plugin", **wanted) as ours:
        _plugin(run, ours, captured, first, replays)


def _plugin(run: Run, ours: Engine, captured: int, first: Image, replays: int) -> None:
    found, trainer = run.found, run.trainer
    there = ours.facts("after the start")["captured"]
    found.check("graphs", "as many were captured as stock captures", there == captured)

    def drawn(what: str) -> Image:
        image, count = _drawn(ours, what)
        found.check("graphs", f"{what}: drawn by as many replays as stock's image", count == replays)
        return image

    found.check("graphs", "image equal to stock's", drawn("first") == first)
    trainer.do("load", prefixes=list(PARTS))
    ours.ask("release")
    ours.facts("asleep")
    ours.ask("resume")
    found.check("graphs", "image equal after sleep and wake", drawn("after wake") == first)
    ours.ask("release")
    trainer.do("step", number=1)
    trainer.do("put", partial=True)
    ours.ask("resume")
    changed = drawn("after a refit while asleep")
    found.check("graphs", "they replay the new weights", changed != first)
    trainer.do("step", number=0)
    trainer.do("put", partial=True)
    trainer.do("drop")
    ours.ask("update", model_path=f"weightstore:{MODEL}")
    found.check("graphs", "and the old ones again", drawn("after a refit while awake") == first)
    found.check("graphs", "none was captured anew", ours.facts("at the end")["captured"] == there)
    known = run.known
    found.add(
        "graphs",
        "equal to images without graphs",
        {"first": first == known.get("first"), "changed": changed == known.get("changed")},
    )


def _drawn(running: Engine, what: str) -> tuple[Image, int]:
    """An image, and how many graphs were replayed for it."""
    before = running.ask("facts")["replays"]
    image = running.image(what)
    return image, running.facts(f"{what}: after the image")["replays"] - before


def _arguments(options: Options) -> dict[str, Any]:
    if options.cpu:
        return {}
    return {
        "enable_breakable_cuda_graph": True,
        "warmup_mode": "server",
        "warmup_resolutions": [f"{options.side}x{options.side}"],
        "bcg_text_buckets": [512],
    }
