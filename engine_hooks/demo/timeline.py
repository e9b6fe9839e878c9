"""What the demo tells while it runs, and the spans it remembers for the chart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from engine_hooks.demo.digits import SIDE, Pixels

COLOURS = {"store": "magenta", "trainer": "yellow", "engine": "cyan", "judge": "green"}
_SHADES = " ░▒▓█"


@dataclass
class Span:
    """`lane` did `what` from `start` to `end`, in seconds since the timeline's origin."""

    lane: str
    what: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Timeline:
    """Lines on the console, each with its second; `spans` for the chart."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.origin = time.monotonic()
        self.spans: list[Span] = []

    @property
    def now(self) -> float:
        return time.monotonic() - self.origin

    def say(self, lane: str, text: str) -> None:
        line = Text(f"{self.now:6.1f} s  ", style="dim")
        line.append(f"{lane:<8}", style=f"bold {COLOURS[lane]}")
        line.append_text(Text.from_markup(text, style="not dim"))
        line.overflow = "fold"
        self.console.print(line)

    @contextmanager
    def span(self, lane: str, what: str) -> Iterator[Span]:
        """Remember what is done inside as a span; its `end` is right after the block."""
        span = Span(lane, what, self.now, self.now)
        self.spans.append(span)
        try:
            yield span
        finally:
            span.end = self.now

    @contextmanager
    def steps(self, lane: str, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar that goes away when done; yields the function that moves it."""
        with Progress(
            TextColumn(f"          [bold {COLOURS[lane]}]{lane:<8}[/]{what}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        ) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)

    def show_digits(self, images: Pixels) -> None:
        """One line of drawn digits: two pixels per character cell where there is colour, shades elsewhere.

        Args:
            images: shape (n, 8, 8), values -1 (paper) to 1 (ink); as many as fit are shown.
        """
        indent = 10
        fit = max(1, (self.console.width - indent) // (SIDE + 1))
        shown = [((image + 1) / 2).clip(0, 1) for image in images[:fit]]
        coloured = self.console.color_system is not None
        for row in range(0, SIDE, 2):
            line = Text(" " * indent)
            for image in shown:
                for upper, lower in zip(image[row], image[row + 1], strict=True):
                    if coloured:
                        line.append("▀", style=f"{_grey(upper)} on {_grey(lower)}")
                    else:
                        line.append(_SHADES[round(float(upper + lower) / 2 * (len(_SHADES) - 1))])
                line.append(" ")
            self.console.print(line, no_wrap=True, overflow="crop")


def _grey(ink: float) -> str:
    level = 16 + round(223 * float(ink))
    return f"rgb({level},{level},{level})"


def duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def summary(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for title in header:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
