"""Section `graphs` of `python -m bench sglang`: are SGLang's CUDA graphs there, and right, after a sleep?

SGLang's own engine comes first: whether it captures its graphs on this machine is no question to the plugin.
If it does not, that is what the section says, with what stopped the capture, and nothing is asked of the
plugin. On a CPU there are no graphs; then the rest is rehearsed without.
"""

from __future__ import annotations

from typing import Any

from bench.sglang_process import MODEL, PARTS, Engine, Options, Run, engine


def graphs(run: Run) -> None:
    wanted = _arguments(run.options)
    with engine(run, "graphs", stored=False, name="graphs-stock", **wanted) as stock:
        captured = _captured(stock, "stock: after the start")
        if not captured and not run.options.cpu:
            run.found.add("graphs", "not to be had", "SGLang's own engine captures no graph on this machine")
            return
        first = stock.image("stock: first")
        _check_replays(run, stock, "stock", captured)
    with engine(run, "graphs", stored=True, name="graphs-plugin", **wanted) as ours:
        _plugin(run, ours, captured, first)


def _plugin(run: Run, ours: Engine, captured: int, first: tuple[str, str]) -> None:
    found, trainer = run.found, run.trainer
    there = _captured(ours, "after the start")
    found.check("graphs", "as many were captured as stock captures", there == captured)
    found.check("graphs", "image equal to stock's", ours.image("first") == first)
    _check_replays(run, ours, "plugin", there)
    trainer.do("load", prefixes=list(PARTS))
    ours.ask("release")
    ours.facts("asleep")
    ours.ask("resume")
    found.check("graphs", "they are still there after sleep and wake", _captured(ours, "after") == there)
    found.check("graphs", "image equal after sleep and wake", ours.image("after wake") == first)
    ours.ask("release")
    trainer.do("step", number=1)
    trainer.do("put", partial=True)
    ours.ask("resume")
    changed = ours.image("changed")
    found.check("graphs", "they replay the new weights", changed != first)
    trainer.do("step", number=0)
    trainer.do("put", partial=True)
    trainer.do("drop")
    ours.ask("update", model_path=f"weightstore:{MODEL}")
    found.check("graphs", "and the old ones again", ours.image("restored") == first)
    _check_replays(run, ours, "plugin, at the end", there)
    known = run.known
    found.add(
        "graphs",
        "equal to images without graphs",
        {"first": first == known.get("first"), "changed": changed == known.get("changed")},
    )


def _captured(running: Engine, what: str) -> int:
    """How many graphs the worker has."""
    count: int = running.facts(what)["graphs"]
    return count


def _check_replays(run: Run, running: Engine, who: str, captured: int) -> None:
    """An image that was drawn without the graphs proves nothing of them."""
    facts = running.facts(f"{who}: after images")
    if captured:
        run.found.check("graphs", f"{who}: images were drawn by replaying them", facts["replays"] > 0)


def _arguments(options: Options) -> dict[str, Any]:
    if options.cpu:
        return {}
    return {
        "enable_breakable_cuda_graph": True,
        "warmup_mode": "server",
        "warmup_resolutions": [f"{options.side}x{options.side}"],
        "bcg_text_buckets": [512],
    }
