"""From a run's JSON to the numbers that are shown: pure functions, the only place where they are computed.

A way has numbers only if it is `ok`, or was `cut` by the time it had; any other has a reason instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.rows import Goal

Json = Mapping[str, Any]

OURS: Final = "1"
STAGED: Final = "1s"
"""Also ours: the frozen parts wake during the refit."""
LINK_GOAL: Final = Goal(1.1, False)
FASTER: Final[dict[str, Goal]] = {key: Goal(10.0, True) for key in ("3", "4", "6")}
STOCK_STEADY: Final = Goal(2.0, True)
STOCK_FIRST: Final = Goal(20.0, True)
FROZEN: Final = Goal(1.001, False)
TRAINED: Final = Goal(2.0, False)
"""What must hold. The frozen part is 1.0 copies; the thousandth is for pages."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold: a value, its goal, and what it was computed from."""

    key: str
    what: str
    value: float
    goal: Goal
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.goal.met(self.value)


def has_numbers(way: Json) -> bool:
    return way["status"] in ("ok", "cut") and bool(way["cycles"])


def first(way: Json) -> Json:
    return way["cycles"][0]


def steady(way: Json) -> list[Json]:
    """The cycles after the first; where the first is the only one it says how steady ones are."""
    cycles: list[Json] = way["cycles"]
    return cycles[1:] or cycles


def has_steady(way: Json) -> bool:
    return len(way["cycles"]) > 1


def usual_image(way: Json) -> float:
    """Seconds that an image takes with nothing before it: the median of all that the way drew again.

    One alone says little: on a GPU they vary by half.
    """
    return statistics.median(drawn_again(way))


def drawn_again(way: Json) -> list[float]:
    """Seconds of the images of all cycles that followed another one, and of one before the first cycle.

    Older files have a single one of each cycle.
    """
    found: list[float] = []
    for record in (way.get("setup") or {}, *way["cycles"]):
        if "own_images" in record:
            found += record["own_images"]
        elif "own_image" in record:
            found.append(record["own_image"])
    return found


def phases(way: Json) -> dict[str, float]:
    """Median seconds of each phase in steady cycles; of the image what it takes beyond the usual."""
    cycles = steady(way)
    found = {
        name: statistics.median(cycle["phases"][name] for cycle in cycles) for name in cycles[0]["phases"]
    }
    found["image"] = max(found["image"] - usual_image(way), 0.0)
    return found


def overhead(way: Json) -> float:
    """Seconds from image to image in steady cycles, without the trainer's step and the usual image: the sum
    of `phases`."""
    return sum(phases(way).values())


def cycle_overhead(way: Json, cycle: Json) -> float:
    """The same of one cycle."""
    spent: dict[str, float] = dict(cycle["phases"])
    image = spent.pop("image")
    return sum(spent.values()) + max(image - usual_image(way), 0.0)


def first_overhead(way: Json) -> float:
    return cycle_overhead(way, first(way))


def pictures_equal(way: Json) -> bool:
    return all(cycle["same"] for cycle in way["cycles"])


def rate(found: Json, link: str) -> float | None:
    """Bytes per second of the limit, the median of its samples; `link` is ``h2d`` or ``d2h``."""
    limit = found.get("limit") or {}
    if link not in limit:
        return None
    value: float = limit[link]["nbytes"] / statistics.median(limit[link]["seconds"])
    return value


def least(found: Json) -> float | None:
    """Seconds in which the link moves what a refit and a wake must: the trained part out, then all in."""
    out, into = rate(found, "d2h"), rate(found, "h2d")
    if out is None or into is None:
        return None
    value: float = found["model"]["trained_bytes"] / out + found["model"]["whole_bytes"] / into
    return value


_LINKED: Final = {
    OURS: ("link", "weightstore"),
    STAGED: ("link.1s", "weightstore, its frozen parts waking during the refit,"),
}


def checks(found: Json) -> Iterator[Check]:
    """Everything that must hold and was measured in this run."""
    ways = found["ways"]
    ours = ways.get(OURS)
    on_gpu = found["settings"]["device"] != "cpu"
    for key, (name, called) in _LINKED.items():
        way, bound = ways.get(key), least(found)
        if way is None or bound is None or not on_gpu or not has_numbers(way) or not has_steady(way):
            continue
        yield Check(
            name,
            f"steady overhead of {called} against the bytes it must move over the measured link",
            overhead(way) / bound,
            LINK_GOAL,
        )
    if ours is not None and has_numbers(ours):
        for key, goal in FASTER.items():
            if on_gpu and key in ways and has_numbers(ways[key]):
                yield Check(
                    f"faster.{key}",
                    f"steady overhead of “{ways[key]['title']}” against weightstore's",
                    overhead(ways[key]) / overhead(ours),
                    goal,
                )
    rows = found.get("sharing") or []
    if rows:
        yield Check(
            "sharing.frozen",
            f"host copies of one version, most of {_counts(rows)} engines",
            max(copies_of_one(row) for row in rows),
            FROZEN,
        )
        yield Check(
            "sharing.trained",
            f"host copies of the trained part after refits, most of {_counts(rows)} engines",
            max(copies_of_trained(row) for row in rows),
            TRAINED,
        )


def copies_of_one(row: Json) -> float:
    """The arena's pages with one version, in sizes of the model."""
    value: float = row["one_version"] / (row["frozen_bytes"] + row["trained_bytes"])
    return value


def copies_of_trained(row: Json) -> float:
    """What the arena holds after refits beyond the frozen part, in sizes of the trained part."""
    value: float = (row["after_refits"] - row["frozen_bytes"]) / row["trained_bytes"]
    return value


def _counts(rows: Sequence[Json]) -> str:
    return ", ".join(str(row["engines"]) for row in rows)


def seconds(value: float) -> str:
    """As people read it: three digits, never more than a millisecond's precision."""
    if value >= 100:
        return f"{value:.0f} s"
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.1f} ms"


def print_table(found: Json) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = ("drain", "sleep", "memory", "refit", "wake", "image")
    for title in ("", "way", "first", "steady", *names, "pictures"):
        table.add_column(title, overflow="fold", justify="left" if title in ("", "way") else "right")
    for key, way in found["ways"].items():
        if has_numbers(way):
            split = phases(way)
            row = [seconds(first_overhead(way)), seconds(overhead(way)) if has_steady(way) else "–"]
            row += [seconds(split[name]) for name in names] + ["equal" if pictures_equal(way) else "DIFFER"]
            table.add_row(key, way["title"], *row)
        else:
            table.add_row(key, way["title"], way["status"])
    console.print(table)
    for check in checks(found):
        sign = "≥" if check.goal.at_least else "≤"
        met = "met   " if check.met else "MISSED"
        console.print(f"{met} {check.value:8.3f} {sign} {check.goal.bound:g}  {check.what}")
