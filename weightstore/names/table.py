"""A plan for people: layers that are alike in one line, what is wrong at the end, and the verdict."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightstore.names.hints import NUMBER
from weightstore.names.rows import PROBLEMS, Kind, Row
from weightstore.types import Box

if TYPE_CHECKING:
    from weightstore.names.plan import Plan

WIDTH: Final = 160
"""Columns of a plan as text: names are long, and folded where they are longer."""
MOST: Final = 40
"""Lines per kind, before the rest is only counted."""


class Line(NamedTuple):
    """Rows that differ in layer numbers only."""

    kind: Kind
    source: str
    target: str
    remark: str


def as_text(plan: Plan, width: int = WIDTH) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width, highlight=False, force_terminal=False).print(page(plan))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def page(plan: Plan) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("")
    table.add_column("given", overflow="fold")
    table.add_column("stored", overflow="fold")
    table.add_column("", justify="right")
    table.add_column("", overflow="fold")
    lines = grouped(plan)
    for kind in Kind:
        of_kind = [(line, count) for line, count in lines.items() if line.kind is kind]
        style = "red" if kind in PROBLEMS else "dim" if kind is Kind.DROPPED else ""
        for line, count in of_kind[:MOST]:
            times = f"×{count}" if count > 1 else ""
            table.add_row(kind.value, line.source, line.target, times, line.remark, style=style)
        if len(of_kind) > MOST:
            rest = sum(count for _, count in of_kind[MOST:])
            table.add_row(kind.value, f"… and {rest} more", "", "", "", style=style)
    blocks: list[RenderableType] = [Text(plan.what, style="bold")]
    if lines:
        blocks.append(table)
    return Group(*blocks, Text(_counts(plan), style="bold"), *_verdict(plan))


def grouped(plan: Plan) -> dict[Line, int]:
    """Lines in the order of their first row, and how many rows each stands for."""
    lines: dict[Line, int] = {}
    for row in plan.rows:
        line = Line(row.kind, _source(row), _target(row), _remark(row))
        lines[line] = lines.get(line, 0) + 1
    return lines


def _source(row: Row) -> str:
    return _general(row.source or "") + (_box(row.part, row.shape) if row.part is not None else "")


def _target(row: Row) -> str:
    whole = row.whole or ()
    return _general(row.target or "") + (_box(row.box, whole) if row.box is not None else "")


def _remark(row: Row) -> str:
    note = row.note if row.kind is Kind.DROPPED else _general(row.note)
    hint = f"perhaps {_general(row.hint)}?" if row.hint else ""
    return "; ".join(filter(None, (note, hint)))


def _general(name: str) -> str:
    return NUMBER.sub("*", name)


def _box(part: Box, whole: tuple[int, ...]) -> str:
    """As an index expression, ``[:, 0:64]``."""
    spans = [
        ":" if (lo, hi) == (0, size) else f"{lo}:{hi}"
        for lo, hi, size in zip(part.lo, part.hi, whole, strict=True)
    ]
    while len(spans) > 1 and spans[-1] == ":":
        spans.pop()
    return f"[{', '.join(spans)}]"


def _counts(plan: Plan) -> str:
    return ", ".join(f"{count} {kind.value}" for kind, count in plan.counts.items() if count) or "no tensors"


def _verdict(plan: Plan) -> list[Text]:
    if plan.ok:
        return [Text("it would commit", style="green")]
    lines = [Text("it would not commit:", style="red")]
    lines += [Text(f"  {problem}", style="red") for problem in plan.problems]
    if plan.advice:
        lines.append(Text(f"  {plan.advice}", style="yellow"))
    return lines
