"""The two pictures: what the engine drew after each refit, and who held how much memory meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_hooks.demo.digits import SIDE, Pixels
from engine_hooks.demo.timeline import Span

INK = {"engine": "#0b7285", "trainer": "#e8890c", "arena": "#9c36b5", "GPU": "#2b8a3e"}
SPAN_INK = {
    "draws": "#0b7285",
    "asleep": "#dee2e6",
    "wakes": "#f03e3e",
    "trains": "#e8890c",
    "refits": "#f03e3e",
    "starts": "#adb5bd",
    "attaches": "#f03e3e",
}


@dataclass(frozen=True)
class Grid:
    """What the engine drew with one version: `images` of shape (n, 8, 8), the digits in order."""

    version: int
    steps: int
    images: Pixels
    share_read: float


def paint_grids(path: Path, grids: Sequence[Grid], columns: int = 6) -> None:
    """All grids side by side: a row per digit, the same noise in the same place of every grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.45 * len(grids) + 0.35, 4.75), dpi=160)
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    for axis, grid in zip(axes, grids, strict=True):
        axis.imshow(_tile(grid.images, columns), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        trained = "untrained" if grid.steps == 0 else f"{grid.steps} training steps"
        axis.set_title(f"version {grid.version}\n{trained}", fontsize=9)
        axis.set_xlabel(f"{grid.share_read:.0%} read correctly", fontsize=10, fontweight="bold")
        axis.set_xticks([])
        axis.set_yticks([])
        for edge in axis.spines.values():
            edge.set_visible(False)
    pitch = SIDE + 2
    axes[0].set_yticks([pitch * row + pitch / 2 - 0.5 for row in range(10)], [str(n) for n in range(10)])
    axes[0].tick_params(length=0, labelsize=10)
    axes[0].set_ylabel("the prompt asks for", fontsize=9)
    figure.suptitle(
        "What the engine drew after each wake: same prompts, same noise, refitted weights", fontsize=11
    )
    figure.tight_layout(w_pad=1.2)
    figure.savefig(path)


def paint_memory(
    path: Path, times: Sequence[float], series: Mapping[str, Sequence[int]], spans: Sequence[Span], where: str
) -> None:
    """Memory over time, above what the engine and the trainer were doing.

    Args:
        times: seconds; series: bytes by label, one value per time.
        where: what kind of memory, for the axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 5.2), dpi=140)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1), "hspace": 0.08})
    end = max(times, default=1.0)
    for span in spans:
        if span.what == "asleep":
            upper.axvspan(span.start, span.end, color=SPAN_INK["asleep"], alpha=0.6, lw=0)
        if span.what in ("asleep", "draws") and span.seconds > end / 80:
            middle = (span.start + span.end) / 2
            upper.text(
                middle,
                0.985,
                span.note,
                transform=upper.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8,
            )
    for label, values in series.items():
        colour = INK[label.split()[0].rstrip(",")]
        held = np.where(np.asarray(values) > 0, np.asarray(values) / 2**20, np.nan)
        upper.plot(times, held, color=colour, lw=1.8, label=label)
    upper.set_title("The engine gives its memory back while the trainer works", fontsize=11, pad=28)
    upper.set_ylabel(f"{where}, MiB")
    upper.set_ylim(0, upper.get_ylim()[1] * 1.1)  # room for the notes
    upper.set_xlim(0, end)
    upper.grid(axis="y", color="#e9ecef", lw=0.8)
    upper.set_axisbelow(True)
    handles, labels = upper.get_legend_handles_labels()
    handles.append(Patch(color=SPAN_INK["asleep"], alpha=0.6))
    upper.legend(
        handles,
        [*labels, "engine asleep"],
        loc="upper center",
        bbox_to_anchor=(0.5, 1.11),
        ncols=5,
        frameon=False,
    )

    lanes = ["trainer", "engine"]
    for span in spans:
        if span.lane in lanes:
            # A line as wide as a hair for what lasts milliseconds, so that it is seen at all.
            width = max(span.end - span.start, end / 500)
            lower.barh(
                lanes.index(span.lane), width, left=span.start, height=0.7, color=SPAN_INK[span.what], lw=0
            )
    lower.set_yticks(range(len(lanes)), lanes)
    lower.set_ylim(-0.6, len(lanes) - 0.4)
    lower.set_xlabel("seconds since the demo began")
    seen = {span.what for span in spans}
    named = {
        "starts": "starts",
        "trains": "trains",
        "draws": "draws",
        "asleep": "sleeps",
        "wakes": "wakes, refits",
    }
    lower.legend(
        [Patch(color=SPAN_INK[what]) for what in named if what in seen],
        [text for what, text in named.items() if what in seen],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.55),
        ncols=len(named),
        frameon=False,
        fontsize=9,
    )
    for axis in (upper, lower):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    lower.tick_params(axis="y", length=0)
    figure.savefig(path, bbox_inches="tight")


def _tile(images: Pixels, columns: int) -> Pixels:
    """Shape (10 * pitch, columns * pitch): the first `columns` images of each digit, one row per digit."""
    rows = images.reshape(10, -1, SIDE, SIDE)[:, :columns]
    padded = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1.0)
    tiled: Pixels = padded.transpose(0, 2, 1, 3).reshape(10 * (SIDE + 2), -1)
    return tiled
