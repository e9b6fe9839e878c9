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


@dataclass
class Span:
    """`lane` did `what` from `start` to `end`, in seconds since the origin; `note` goes into the chart."""

    lane: str
    what: str
    start: float
    end: float
    note: str = ""

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
        line = Table.grid(padding=(0, 1))
        line.add_column(width=7, justify="right", style="dim")
        line.add_column(width=7, style=f"bold {COLOURS[lane]}")
        line.add_column(overflow="fold")
        line.add_row(f"{self.now:.1f} s", lane, Text.from_markup(text))
        self.console.print(line)

    @contextmanager
    def span(self, lane: str, what: str, note: str = "", since: float | None = None) -> Iterator[Span]:
        """Remember what is done inside as a span from `since` (default: now) to the end of the block."""
        now = self.now
        span = Span(lane, what, now if since is None else since, now, note)
        self.spans.append(span)
        try:
            yield span
        finally:
            span.end = self.now

    @contextmanager
    def steps(self, lane: str, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar that goes away when done; yields the function that moves it."""
        with Progress(
            TextColumn(f"        [bold {COLOURS[lane]}]{lane:<8}[/]{what}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)

    def show_digits(self, images: Pixels) -> None:
        """One line of drawn digits, two pixels per character cell: in greys, or in black where there is no
        colour.

        Args:
            images: shape (n, 8, 8), values -1 (paper) to 1 (ink); as many as fit are shown.
        """
        indent = 16
        fit = max(1, (self.console.width - indent) // (SIDE + 1))
        shown = [((image + 1) / 2).clip(0, 1) for image in images[:fit]]
        cell = _grey_cell if self.console.color_system is not None else _black_cell
        for row in range(0, SIDE, 2):
            line = Text(" " * indent)
            for image in shown:
                for upper, lower in zip(image[row].tolist(), image[row + 1].tolist(), strict=True):
                    line.append_text(cell(upper, lower))
                line.append(" ")
            self.console.print(line, no_wrap=True, overflow="crop")


def _grey_cell(upper: float, lower: float) -> Text:
    return Text("▀", style=f"{_grey(upper)} on {_grey(lower)}")


def _black_cell(upper: float, lower: float) -> Text:
    return Text(" ▀▄█"[(upper > 0.5) + 2 * (lower > 0.5)])


def _grey(ink: float) -> str:
    level = 16 + round(223 * ink)
    return f"rgb({level},{level},{level})"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.{1 if seconds < 0.01 else 0}f} ms"


def summary(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> Table:
    # Without lines between columns it fits a terminal of 80 characters.
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in header:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
