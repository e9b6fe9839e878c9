"""`weightstore status` for people: one page of tables, built from the wire's Status.

Pure up to `print_status`: every block is a function from status structs to something rich can draw.
"""

from __future__ import annotations

from typing import Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from weightstore.sizes import format_size
from weightstore.wire import ArenaStatus, LeaseStatus, ModelStatus, RefitStatus, Status, VersionStatus

BAR_WIDTH: Final = 48
PLAIN_WIDTH: Final = 120
"""Columns where the output is no terminal and has no width of its own."""


def print_status(status: Status, socket: str) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    console.print(page(status, socket))


def page(status: Status, socket: str) -> RenderableType:
    blocks: list[RenderableType] = [_heading(status, socket), "", *_arena(status.arena)]
    blocks += [block for model in status.models for block in _model(model, status.now)]
    if not status.models:
        blocks += ["", Text("no models yet: weightstore load MODEL PATH, or store.refit(…)", style="dim")]
    if status.leases:
        blocks += ["", _leases(status.leases, status)]
    if status.refits:
        blocks += ["", _refits(status.refits, status.now)]
    return Group(*blocks)


def _heading(status: Status, socket: str) -> Text:
    text = Text.assemble(
        ("weightstore ", "bold"),
        (status.server, "bold"),
        (f"  {socket}  pid {status.pid}, up {duration(status.now - status.started)}, ", "dim"),
        (_count(status.clients, "client"), "dim"),
    )
    if status.grace_until > status.now:
        left = duration(status.grace_until - status.now)
        text.append(f"\ngrace period after a restart: nothing is freed for {left}", "yellow")
    return text


# -- arena ----------------------------------------------------------------------------------------


def _arena(arena: ArenaStatus) -> list[RenderableType]:
    parts = [
        (arena.reachable, "█", "green", "live"),
        (arena.pending, "▓", "cyan", "refits"),
        (arena.quarantined, "▒", "yellow", "quarantined"),
        (arena.free, "░", "white", "free"),
    ]
    bar, legend = Text(), Text()
    for (nbytes, mark, style, label), cells in zip(
        parts, share_cells([nbytes for nbytes, *_ in parts], arena.capacity, BAR_WIDTH), strict=True
    ):
        bar.append(mark * cells, style)
        if nbytes:
            legend.append(f"{mark} ", style).append(f"{format_size(nbytes)} {label}   ")
    bar.append("·" * (BAR_WIDTH - len(bar)), "dim")
    percent = 100 * arena.used / arena.capacity if arena.capacity else 0
    use = f"{format_size(arena.used)} of {format_size(arena.capacity)} used ({percent:.0f}%)"
    legend.append(
        f"{format_size(arena.committed)} committed, largest gap {format_size(arena.largest_free)}", "dim"
    )
    return [
        Text.assemble(("arena ", "bold"), bar, " ", (use, "bold"), (f"  {arena.name}", "dim")),
        Padding(legend, (0, 0, 0, 6)),
    ]


def share_cells(parts: list[int], whole: int, width: int) -> list[int]:
    """Cells of a bar `width` wide for each part of `whole`. What exists gets at least one cell; together
    they never exceed the width."""
    if whole <= 0:
        return [0 for _ in parts]
    cells = [max(1, round(part * width / whole)) if part else 0 for part in parts]
    while sum(cells) > width:
        cells[cells.index(max(cells))] -= 1
    return cells


# -- models ---------------------------------------------------------------------------------------


def _model(model: ModelStatus, now: float) -> list[RenderableType]:
    title = Text.assemble("\n", (model.name, "bold magenta"))
    for component, nbytes in sorted(model.components.items(), key=lambda item: -item[1]):
        title.append(f"   {component} ", "dim").append(format_size(nbytes))
    if model.names:
        title.append("   name map published", "cyan")
    if not model.versions:
        return [title, Text("no version yet", style="dim")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("version", justify="right")
    table.add_column("tags", style="cyan", overflow="fold")
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("leases", justify="right")
    table.add_column("from", justify="right", style="dim")
    table.add_column("age", justify="right", style="dim")
    table.add_column("state")
    for version in sorted(model.versions, key=lambda v: -v.number):
        table.add_row(*_version_row(version, model, now), style="dim" if version.state == "retired" else "")
    return [title, table]


def _version_row(version: VersionStatus, model: ModelStatus, now: float) -> list[RenderableType]:
    tags = Text(", ").join(
        Text(tag, "bold red") + Text(" (torn)", "red") if tag in model.torn else Text(tag)
        for tag in sorted(version.tags)
    )
    state = Text(version.state)
    if version.checksummed:
        state.append("  ✓ checksums", "green")
    return [
        str(version.number),
        tags,
        f"{version.tensors:,}",
        format_size(version.nbytes),
        str(version.leases or ""),
        str(version.parent or ""),
        duration(now - version.created),
        state,
    ]


def _leases(leases: list[LeaseStatus], status: Status) -> Table:
    table = _table(_count(len(leases), "lease"))
    for title in ("holder", "model", "tag"):
        table.add_column(title, overflow="fold")
    table.add_column("version", justify="right")
    table.add_column("doing")
    table.add_column("for", justify="right", style="dim")
    for lease in sorted(leases, key=lambda each: (each.model, each.tag, each.holder)):
        doing = "parked (asleep)" if lease.parked else "following" if lease.follow else "reading"
        if lease.offered:
            doing += f", offered {lease.offered}"
        since = duration(status.now - lease.since)
        table.add_row(lease.holder, lease.model, lease.tag, str(lease.version), doing, since)
    return table


def _refits(refits: list[RefitStatus], now: float) -> Table:
    table = _table(f"{_count(len(refits), 'refit')} open")
    for title in ("model", "tag"):
        table.add_column(title, overflow="fold")
    table.add_column("base", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("ranks", justify="right")
    table.add_column("holders", overflow="fold")
    table.add_column("for", justify="right", style="dim")
    for refit in refits:
        ranks = f"{refit.committed} of {refit.world_size} done"
        if refit.joined < refit.world_size:
            ranks = f"{refit.joined} of {refit.world_size} joined, {refit.committed} done"
        table.add_row(
            refit.model,
            f"{refit.tag} (in place)" if refit.in_place else refit.tag,
            str(refit.base or "–"),
            format_size(refit.nbytes),
            ranks,
            ", ".join(refit.holders),
            duration(now - refit.since),
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        show_edge=False,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """`seconds` in its two largest units, e.g. '3 h 12 min', '4.2 s'."""
    if seconds < 60:
        return f"{max(seconds, 0):.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
