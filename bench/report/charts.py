"""The pictures: seconds by phase and way, memory over a cycle, host memory by the number of engines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.report.results import Entry, Group
from bench.rl_step import summary
from bench.rl_step.ways import PHASES

COLOURS: Final = {
    "drain": "#7f7f7f",
    "sleep": "#1f6fb4",
    "memory": "#9ecae1",
    "step": "#f0f0f0",
    "refit": "#e6842a",
    "wake": "#3a9a4a",
    "image": "#8e63b5",
}
_STYLE: Final = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 130,
    "figure.facecolor": "white",
}
GIB: Final = 1 << 30
ZOOM: Final = 1.6
"""How many times weightstore's own bar the zoomed panel shows."""


def phases(group: Group, path: Path) -> None:
    """Stacked bars of the steady cycles: all of it, and beside that the beginning, enlarged."""
    entries = group.measured
    names = ["\n".join(textwrap.wrap(entry.title, 34, break_on_hyphens=False)) for entry in entries]
    splits = [summary.phases(entry.way) for entry in entries]
    totals = [sum(split.values()) for split in splits]
    with plt.rc_context(_STYLE):
        figure, (whole, near) = plt.subplots(
            1,
            2,
            figsize=(11.5, 1.5 + 0.62 * len(entries)),
            sharey=True,
            gridspec_kw={"width_ratios": [1.6, 1], "wspace": 0.06},
            layout="constrained",
        )
        ours = next((total for e, total in zip(entries, totals, strict=True) if e.key == summary.OURS), None)
        right = ZOOM * ours if ours else max(totals)
        for axes in (whole, near):
            left = [0.0] * len(entries)
            for phase in PHASES:
                widths = [split[phase] for split in splits]
                axes.barh(names, widths, left=left, color=COLOURS[phase], label=phase, height=0.62)
                left = [at + width for at, width in zip(left, widths, strict=True)]
            axes.set_xlabel("seconds")
            axes.grid(axis="x", color="#dddddd", linewidth=0.7)
            axes.set_axisbelow(True)
        whole.set_xlim(0, max(totals) * 1.17)
        near.set_xlim(0, right)
        for at, total in enumerate(totals):
            whole.text(total + max(totals) * 0.012, at, summary.seconds(total), va="center")
            if total > right:
                near.text(right * 0.985, at, "›", va="center", ha="right", color="white", fontsize=15)
            else:
                near.text(total + right * 0.015, at, summary.seconds(total), va="center")
        whole.invert_yaxis()
        whole.tick_params(axis="y", length=0)
        near.tick_params(axis="y", length=0)
        whole.set_title("from image to image, without the trainer's step", loc="left", fontsize=10)
        near.set_title(f"the first {summary.seconds(right)}, enlarged", loc="left", fontsize=10)
        _bold(whole, entries)
        handles, labels = whole.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(PHASES), frameon=False)
        _save(figure, path)


def memory(group: Group, path: Path) -> None:
    """For each way the machine's memory over its last cycle, phases as background."""
    entries = [entry for entry in group.measured if entry.way["cycles"][-1].get("curve")]
    if not entries:
        return
    columns = 2
    rows = -(-len(entries) // columns)
    top = max(_highest(entry) for entry in entries)
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(11.5, 0.9 + 2.3 * rows),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, entry in zip(grid.flat, entries, strict=False):
            _memory_of(axes, entry, top)
        for axes in grid.flat[len(entries) :]:
            axes.axis("off")
        for row in grid:
            row[0].set_ylabel("GiB in use")
        for axes in grid.flat[max(len(entries) - columns, 0) : len(entries)]:
            axes.set_xlabel("seconds since the last image on the old weights")
        lines = [plt.Line2D([], [], color=_DEVICE, label="device")] if _has_device(entries) else []
        lines.append(plt.Line2D([], [], color=_HOST, label="host, without page cache"))
        shades = [
            plt.Rectangle((0, 0), 1, 1, color=COLOURS[name], alpha=_SHADE, label=name)
            for name in ("sleep", "memory", "refit", "wake", "image")
        ]
        shades.append(plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#bbbbbb", label=_UNCOUNTED))
        figure.legend(handles=[*lines, *shades], loc="outside lower center", ncols=8, frameon=False)
        _save(figure, path)


_DEVICE: Final = "#b3202c"
_HOST: Final = "#222222"
_SHADE: Final = 0.28
_UNCOUNTED: Final = "not counted"


def _memory_of(axes: Any, entry: Entry, top: float) -> None:
    cycle = entry.way["cycles"][-1]
    curve = cycle["curve"]
    base = entry.way["baseline"]["host"]
    for name, began, ended in cycle["spans"]:
        if name != "step":
            axes.axvspan(began, ended, color=COLOURS[name], alpha=_SHADE, linewidth=0)
    host = [max(value - base, 0) / GIB for value in curve["host"]]
    axes.plot(curve["seconds"], host, color=_HOST, linewidth=1.6)
    if curve["device"] and curve["device"][0] is not None:
        axes.plot(curve["seconds"], [value / GIB for value in curve["device"]], color=_DEVICE, linewidth=1.6)
    axes.set_ylim(0, top * 1.08)
    axes.set_xlim(0, max(ended for _, _, ended in cycle["spans"]))
    axes.set_title(entry.title, loc="left", fontsize=9.5)


def _highest(entry: Entry) -> float:
    curve = entry.way["cycles"][-1]["curve"]
    base = entry.way["baseline"]["host"]
    host = [max(value - base, 0) for value in curve["host"]]
    device = [value for value in curve["device"] if value is not None]
    return max([*host, *device, GIB // 1024]) / GIB


def _has_device(entries: Sequence[Entry]) -> bool:
    return any(value is not None for e in entries for value in e.way["cycles"][-1]["curve"]["device"])


def sharing(group: Group, path: Path) -> None:
    """Copies of the model in host memory, as measured, by the number of engines."""
    rows = group.sharing
    names = [str(row["engines"]) for row in rows]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 3.0), layout="constrained")
        unit = rows[0]["frozen_bytes"] + rows[0]["trained_bytes"]
        frozen = [row["frozen_bytes"] / unit for row in rows]
        one = [(row["one_version"] - row["frozen_bytes"]) / unit for row in rows]
        two = [(row["after_refits"] - row["one_version"]) / unit for row in rows]
        axes.bar(names, frozen, width=0.55, color="#7f7f7f", label="frozen part")
        axes.bar(names, one, width=0.55, bottom=frozen, color="#1f6fb4", label="trained part")
        both = [a + b for a, b in zip(frozen, one, strict=True)]
        axes.bar(names, two, width=0.55, bottom=both, color="#9ecae1", label="…its next version")
        for at, (low, high) in enumerate(zip(both, two, strict=True)):
            axes.text(at, low + high + 0.03, f"{low + high:.2f} ×", ha="center")
        axes.set_ylim(0, 1.2 * max(a + b for a, b in zip(both, two, strict=True)))
        axes.set_xlabel("engines on one store")
        axes.set_ylabel("arena, in sizes of the model")
        axes.tick_params(axis="x", length=0)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        _save(figure, path)


def _bold(axes: Any, entries: Sequence[Entry]) -> None:
    for label, entry in zip(axes.get_yticklabels(), entries, strict=False):
        if entry.key == summary.OURS:
            label.set_fontweight("bold")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
