"""SGLang Diffusion's own engine as two more ways, from what `python -m bench sglang` measured.

Its releases and resumes are timed from outside, as all phases are; its refit after a resume is the update
from tensors, and through the plugin a put and a commit while it sleeps. That engine needs no trainer's memory
and its pictures' times are its own, so those phases are not there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.rl_step import summary

Json = Mapping[str, Any]

STOCK: Final = "5"
PLUGIN: Final = "5w"
MODEL: Final = "flux1-dev"
"""The only pipeline that benchmark runs."""
_TITLES: Final = {
    STOCK: "SGLang Diffusion, stock: release → resume → update from tensors",
    PLUGIN: "SGLang Diffusion through weightstore: release → refit → resume",
}
_SECTIONS: Final = {STOCK: "stock", PLUGIN: "plugin"}
_REFIT: Final = "refit of a sleeping engine"


def runs(directory: Path) -> Iterator[Json]:
    """The files that benchmark wrote, oldest first."""
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*sglang*.json"))]
    whole = [run for run in found if {"sections", "settings", "machine"} <= run.keys()]
    yield from sorted(whole, key=lambda run: run["machine"]["date"])


def ways(found: Sequence[Json], model: str, device: str) -> dict[str, Json]:
    """Ways by key, from the newest run on that device that has them."""
    result: dict[str, Json] = {}
    if model != MODEL:
        return result
    for run in found:
        name = run["sections"].get("trainer", {}).get("device", {}).get("name", "cpu")
        if name != device:
            continue
        for key, section in _SECTIONS.items():
            if section in run["sections"]:
                result[key] = _way(key, run["sections"][section], run)
    return result


def checks(way: Json, entries: Mapping[str, Any]) -> Iterator[summary.Check]:
    """Stock against weightstore in the same engine: the same picture, the same process model."""
    if way.get("sglang") != STOCK or PLUGIN not in entries or not entries[PLUGIN].has_numbers:
        return
    ours = entries[PLUGIN].way
    what = "of SGLang Diffusion, stock, against the same engine through weightstore"
    yield summary.Check(
        "faster.5",
        f"steady overhead {what}",
        summary.overhead(way) / summary.overhead(ours),
        summary.STOCK_STEADY,
    )
    yield summary.Check(
        "faster.5.first",
        f"overhead in the first cycle {what}",
        summary.first_overhead(way) / summary.first_overhead(ours),
        summary.STOCK_FIRST,
    )


def _way(key: str, section: Json, run: Json) -> Json:
    """As a way of this benchmark; without numbers if a part is missing."""
    way: dict[str, Any] = {"title": _TITLES[key], "sglang": key, "cycles": [], "notes": {}}
    wanted = {"seconds", "first release", "first resume", _REFIT}
    refit = section.get(_REFIT, {})
    if not wanted <= section.keys() or refit.get("error"):
        reason = refit.get("error") or f"its run has no {', '.join(sorted(wanted - section.keys()))}"
        return way | {"status": "failed", "reason": reason}
    new_weights = refit["update"] if key == STOCK else refit["put_and_commit"]
    way["notes"] = {"refit_bytes": refit["bytes"], "command_settings": run["settings"]}
    seconds = section["seconds"]
    wrong = [what for what, holds in run["checks"].items() if what.startswith(_SECTIONS[key]) and not holds]
    pairs = list(zip(seconds["release"], seconds["resume"], strict=False))
    if len(pairs) < 2:
        return way | {"status": "failed", "reason": "its run has no steady cycle"}
    steady = tuple(statistics.median(values) for values in zip(*pairs[1:], strict=True))
    for sleep, wake in (pairs[0], steady):
        phases = {
            "drain": 0.0,
            "sleep": sleep,
            "memory": 0.0,
            "refit": new_weights,
            "wake": wake,
            "image": 0.0,
        }
        way["cycles"].append(
            {
                "phases": phases,
                "own_image": 0.0,
                "overhead": sum(phases.values()),
                "same": not wrong,
                "differs": "; ".join(wrong) or None,
            }
        )
    return way | {"status": "ok", "reason": None}
