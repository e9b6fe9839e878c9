"""The result files, grouped by model and device, with the newest numbers of every way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.report import sglang
from bench.rl_step import summary
from bench.rl_step.ways import WAYS

Json = Mapping[str, Any]

ORDER: Final = (
    summary.OURS,
    summary.STAGED,
    "2",
    "3",
    "3c",
    "4",
    sglang.STOCK,
    sglang.PLUGIN,
    "6",
    "6k",
    "7",
)
"""The ways as they are shown."""


@dataclass
class Entry:
    """One way's result, and the run it is from."""

    key: str
    way: Json
    found: Json

    @property
    def title(self) -> str:
        kind = WAYS.get(self.key)
        title: str = self.way["title"] if kind is None else kind.title
        return title

    @property
    def has_numbers(self) -> bool:
        return summary.has_numbers(self.way)

    @property
    def worth(self) -> int:
        """No numbers, those of a first cycle alone, or of steady ones."""
        return self.has_numbers + (self.has_numbers and summary.has_steady(self.way))

    @property
    def times_ours(self) -> float | None:
        """Steady overhead over weightstore's of the same run; None without both. In another engine it is that
        of a run beside, and None unless the transformer is the same."""
        ours = self.found["ways"].get(summary.OURS)
        if self.key == summary.OURS or self.found["settings"]["device"] == "cpu":
            return None
        if ours is None or not summary.has_numbers(ours):
            return None
        if self.key not in WAYS and not sglang.comparable(self.way, self.found):
            return None
        return summary.overhead(self.way) / summary.overhead(ours)


@dataclass
class Group:
    """Everything about one model on one device.

    Attributes:
        runs: the result files, the newest last.
        entries: by way, the newest that has steady cycles; if none has, the newest with numbers, else the
            newest.
    """

    model: str
    device: str
    runs: list[Json] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def newest(self) -> Json:
        return self.runs[-1]

    @property
    def measured(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.has_numbers]

    @property
    def missing(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if not entry.has_numbers]

    @property
    def on_gpu(self) -> bool:
        on_gpu: bool = self.newest["settings"]["device"] != "cpu"
        return on_gpu

    @property
    def sharing(self) -> list[Json]:
        for run in reversed(self.runs):
            if run.get("sharing"):
                rows: list[Json] = run["sharing"]
                return rows
        return []

    @property
    def checks(self) -> list[summary.Check]:
        """What must hold, each from the newest run that has it."""
        found = {check.key: check for run in self.runs for check in summary.checks(run)}
        found |= {check.key: check for check in sglang.checks(self.entries)}
        return list(found.values())


def read(directory: Path) -> list[Group]:
    """Groups of what the directory has, those on a GPU and the largest models first."""
    groups: dict[tuple[str, str], Group] = {}
    for run in sorted(_runs(directory), key=lambda run: run["machine"]["date"]):
        if not run["ways"] or "limit" not in run:
            continue
        key = run["model"]["name"], run["limit"]["device"]["device"]
        groups.setdefault(key, Group(*key)).runs.append(run)
    beside = list(sglang.runs(directory))
    for group in groups.values():
        found: dict[str, Entry] = {}
        for run in group.runs:
            for key, way in run["ways"].items():
                entry = Entry(key, way, run)
                if key not in found or entry.worth >= found[key].worth:
                    found[key] = entry
        ours = found.get(summary.OURS)
        for key, way in sglang.ways(beside, group.model, group.device, group.on_gpu).items():
            found[key] = Entry(key, way, group.newest if ours is None else ours.found)
        group.entries = {key: found[key] for key in ORDER if key in found}
    return sorted(
        groups.values(), key=lambda group: (not group.on_gpu, -group.newest["model"]["whole_bytes"])
    )


def _runs(directory: Path) -> Iterator[Json]:
    for path in sorted(directory.glob("rl-step*.json")):
        found = json.loads(path.read_text())
        if found.get("kind") == "rl-step" and "model" in found:
            yield found
