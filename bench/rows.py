"""What a benchmark found: rows that are a ratio between two ways of doing one thing, or a time, or a count.

Invariant: the ratio of a row is the median of the ratios of its rounds. The ways of a row take turns within
each round, so what else the machine does at that time falls on both sides of a ratio.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Way = Callable[[], float]
"""One way of doing something: does it once, and returns the seconds that the part to be timed took."""


@dataclass(frozen=True)
class Goal:
    """A bound on a row's value: at least (`at_least`) or at most `bound`."""

    bound: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass
class Row:
    """One line of the table.

    Attributes:
        key: names the row for programs.
        what: says what was measured, and how.
        seconds: samples by the name of the way that took them; "measured" is ours.
        reference: which way `measured` is compared with; None if the row is a time of its own.
        references: what each reference way does.
        nbytes: bytes that each sample moved; 0 if it is not about bytes.
        value: the row's number where it is neither a ratio nor the median of `measured`.
    """

    key: str
    what: str
    seconds: dict[str, list[float]]
    reference: str | None = None
    references: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    goal: Goal | None = None
    value: float | None = None
    unit: str = "s"
    notes: dict[str, Any] = field(default_factory=dict)
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    @property
    def measured(self) -> float:
        """Median seconds (or the given value) of what was measured."""
        return statistics.median(self.seconds["measured"]) if self.value is None else self.value

    @property
    def ratios(self) -> list[float]:
        """Per round: reference time over measured time; 1 is as fast as the reference."""
        if self.reference is None:
            return []
        pairs = zip(self.seconds[self.reference], self.seconds["measured"], strict=True)
        return [reference / measured for reference, measured in pairs]

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.reference is not None else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.goal.met(self.measured if self.ratio is None else self.ratio)

    def to_json(self) -> dict[str, Any]:
        goal = None
        if self.goal is not None:
            goal = {"at least" if self.goal.at_least else "at most": self.goal.bound}
        return {
            "key": self.key,
            "what": self.what,
            "unit": self.unit,
            "nbytes": self.nbytes,
            "measured": self.measured,
            "reference": self.reference,
            "references": self.references,
            "ratio": self.ratio,
            "goal": goal,
            "met": self.met,
            "notes": self.notes,
            "load": self.load,
            "ratios": [round(ratio, 4) for ratio in self.ratios],
            "samples": {way: [round(s, 7) for s in samples] for way, samples in self.seconds.items()},
        }


def clock(work: Callable[..., object], *args: object) -> float:
    """Wall-clock seconds of `work(*args)`."""
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began


def alternate(
    ways: Mapping[str, Way], rounds: int, warm: int = 1, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Samples of each way: `rounds` of them, after `warm` that do not count.

    Every second round goes backwards, so that no way always follows the same other one. `before` is called
    ahead of every sample that counts.
    """
    order = list(ways)
    samples: dict[str, list[float]] = {name: [] for name in order}
    for number in range(warm + rounds):
        for name in order if number % 2 else reversed(order):
            if before is not None and number >= warm:
                before()
            seconds = ways[name]()
            if number >= warm:
                samples[name].append(seconds)
    return samples


def fastest(samples: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Of several ways the one with the least median."""
    return min(names, key=lambda name: statistics.median(samples[name]))


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` % of all do not exceed."""
    return sorted(samples)[max(0, math.ceil(len(samples) * percent / 100) - 1)]
