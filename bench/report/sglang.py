"""SGLang Diffusion's own engine as two more ways, from the section `step` of `python -m bench sglang`.

Its cycles are measured as all others are, so they are shown as they are. They are from a run of their own,
in another engine: the factor against weightstore's own way is there only if the transformer is the same, that
is, has as many bytes. What else differs is said in the page, from both files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.rl_step import summary

Json = Mapping[str, Any]

STOCK: Final = "5"
PLUGIN: Final = "5p"
MODEL: Final = "flux1-dev"
"""The only pipeline that benchmark runs."""
_TITLES: Final = {
    STOCK: "SGLang Diffusion, stock: release → resume → update from tensors",
    PLUGIN: "SGLang Diffusion through weightstore: release → refit → resume",
}
_NAMES: Final = {STOCK: "stock", PLUGIN: "plugin"}
_SECTION: Final = "step"
_COMMAND: Final = "python -m bench sglang --only stock,plugin,step"
_ALIKE: Final = 0.01
"""By what share of its bytes a transformer may differ that is still the same: a few tensors more or less."""


def runs(directory: Path) -> Iterator[Json]:
    """The files that benchmark wrote and that have the step, oldest first."""
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*sglang*.json"))]
    whole = [run for run in found if {"sections", "settings", "machine", "model"} <= run.keys()]
    stepped = [run for run in whole if run["sections"].get(_SECTION)]
    yield from sorted(stepped, key=lambda run: run["machine"]["date"])


def ways(found: Sequence[Json], model: str, device: str, on_gpu: bool) -> dict[str, Json]:
    """Ways by key, each from the newest run on that device that has numbers for it, else from the newest. On
    a GPU a way that no run has is there with the reason."""
    result: dict[str, Json] = {}
    if model != MODEL:
        return result
    for run in found:
        name = run["sections"].get("trainer", {}).get("device", {}).get("name", "cpu")
        if name != device:
            continue
        for key, part in _NAMES.items():
            if part in run["sections"][_SECTION]:
                way = _way(key, run["sections"][_SECTION][part], run)
                if key not in result or summary.has_numbers(way) or not summary.has_numbers(result[key]):
                    result[key] = way
    if on_gpu:
        result |= {key: _not_run(key) for key in _NAMES if key not in result}
    return result


def comparable(way: Json, found: Json) -> bool:
    """Whether the transformer is that of the other ways of a run."""
    theirs: int = found["model"]["trained_bytes"]
    return bool(abs(way["model"]["trained_bytes"] - theirs) <= _ALIKE * theirs)


def checks(entries: Mapping[str, Any]) -> Iterator[summary.Check]:
    """SGLang as it is against weightstore's own way, with the same transformer."""
    stock, ours = entries.get(STOCK), entries.get(summary.OURS)
    if stock is None or ours is None or not stock.has_numbers or not ours.has_numbers:
        return
    if comparable(stock.way, ours.found):
        yield from _against(stock.way, ours.way, "faster.5", "weightstore's")
    through = entries.get(PLUGIN)
    if through is not None and through.has_numbers:
        yield from _against(
            stock.way, through.way, "faster.5p", "that of the same engine through weightstore"
        )


def _against(stock: Json, ours: Json, key: str, whose: str) -> Iterator[summary.Check]:
    what = f"of SGLang Diffusion, stock, against {whose}"
    if summary.has_steady(stock) and summary.has_steady(ours):
        yield summary.Check(
            key,
            f"steady overhead {what}",
            summary.overhead(stock) / summary.overhead(ours),
            summary.STOCK_STEADY,
        )
    yield summary.Check(
        f"{key}.first",
        f"overhead in the first cycle {what}",
        summary.first_overhead(stock) / summary.first_overhead(ours),
        summary.STOCK_FIRST,
    )


def _not_run(key: str) -> Json:
    return {
        "title": _TITLES[key],
        "status": "not run",
        "reason": f"no run of `{_COMMAND}` on this device is in bench/results",
        "cycles": [],
    }


def _way(key: str, step: Json, run: Json) -> Json:
    """As a way of this benchmark."""
    status, reason = step["status"], step["reason"]
    if status == "running":
        status = "cut" if step["cycles"] else "failed"
        reason = f"its run ended after {len(step['cycles'])} cycles"
    elif status == "failed" and step["cycles"]:
        status = "cut"
    return {
        "title": _TITLES[key],
        "status": status,
        "reason": reason,
        "model": run["model"],
        "notes": {"command": run.get("command"), "settings": run["settings"], "machine": run["machine"]},
        "baseline": step["baseline"],
        "cycles": step["cycles"],
    }
