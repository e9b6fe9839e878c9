"""`weightstore serve`: run a store until SIGTERM. Imports neither torch nor numpy nor rich."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from weightstore.cli.options import name, size, socket_option
from weightstore.paths import arena_name, socket_path
from weightstore.sizes import format_size

if TYPE_CHECKING:
    from weightstore.store import Store

_log = logging.getLogger("weightstore")

LOG_LEVELS = ("debug", "info", "warning", "error")
SMALLEST_CAPACITY: Final = 1 << 20
"""Less is a unit that was forgotten."""


@click.command("serve")
@socket_option
@click.option(
    "--capacity",
    metavar="SIZE",
    type=size,
    help="Bytes the arena can grow to, e.g. 64GiB. Memory is taken when it is needed.  "
    "[default: the size of /dev/shm]",
)
@click.option(
    "--window",
    metavar="SIZE",
    type=size,
    default="1GiB",
    show_default=True,
    help="Unit in which memory is committed and pinned.",
)
@click.option(
    "--arena",
    metavar="NAME",
    type=name("arena"),
    help="Name of the shared memory object.  [default: one that belongs to the socket's path]",
)
@click.option("--keep", is_flag=True, help="On a clean end leave the arena for the next store to adopt.")
@click.option(
    "--reserve",
    metavar="SIZE",
    type=size,
    default="512MiB",
    show_default=True,
    help="Memory of the host and of every cgroup that stays free for others.",
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="After adopting an arena, how long readers may renew their leases before anything is freed.",
)
@click.option(
    "--allow-uid",
    "allow_uids",
    metavar="UID",
    type=click.IntRange(min=0),
    multiple=True,
    help="User id that may connect, besides root and your own. May be repeated.",
)
@click.option(
    "--until-eof",
    metavar="FD",
    type=click.IntRange(min=0),
    help="End when this inherited descriptor reaches its end, that is, with the process that holds it.",
)
@click.option(
    "--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True, help="On stderr."
)
def serve_command(
    socket: str | None,
    capacity: int | None,
    window: int,
    arena: str | None,
    keep: bool,
    reserve: int,
    grace: float,
    allow_uids: tuple[int, ...],
    until_eof: int | None,
    log_level: str,
) -> None:
    """Run a store: own an arena in shared memory and serve it on a socket.

    Ends on SIGTERM or Ctrl-C and removes the arena, unless --keep is given. After a kill the next
    `serve` on the same socket (or with the same --arena) finds every committed version again.

    \b
    Examples:
      weightstore serve --capacity 64GiB
      weightstore serve --socket /run/weights/store.sock --capacity 200GiB --keep
    """
    from weightstore.service import ServiceConfig, run

    if capacity is not None and capacity < SMALLEST_CAPACITY:
        raise click.BadParameter(
            f"{capacity} bytes hold no model; give the unit, as in '96GiB'", param_hint="'--capacity'"
        )
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    path = socket_path(socket)
    config = ServiceConfig(
        socket=Path(path),
        arena=arena or arena_name(path),
        capacity=capacity if capacity is not None else _shared_memory_size(),
        window=window,
        keep=keep,
        reserve=reserve,
        grace=grace,
        allow_uids=frozenset(allow_uids),
        until_eof=until_eof,
    )

    served: list[Store] = []

    def announce(store: Store) -> None:
        served.append(store)
        found = f", adopted with {_models(store)}" if store.arena.adopted else ""
        _say(
            f"serving on {path} (arena {store.arena.name}, {format_size(store.arena.capacity)}{found}), "
            f"pid {os.getpid()}"
        )
        if capacity is not None:
            _warn_if_short(store, reserve)

    run(config, announce)
    for store in served:
        held = f"arena {store.arena.name} with {_models(store)}"
        kept = f"{held} is left: the next `weightstore serve --socket {path}` adopts it"
        _say(f"ended; {kept if keep else f'{held} is removed (--keep would leave it)'}")


def _say(line: str) -> None:
    """On stdout, which may be a pipe that nobody reads any more: no reason to end a store."""
    try:
        click.echo(line)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is buffered must not fail at the exit either
        os.close(nowhere)


def _models(store: Store) -> str:
    count = sum(1 for model in store.catalog.models if model.tags)
    return f"{count} model{'s' * (count != 1)}"


def _warn_if_short(store: Store, reserve: int) -> None:
    """Say now what a refit would meet later."""
    from weightstore.admission import Admission

    limits = Admission(reserve).available()
    arena = store.arena
    if limits and limits[0].usable < arena.capacity - arena.committed:
        tightest = limits[0]
        _log.warning(
            "the capacity is %s, but %s has room for %s more now; beyond that refits get ArenaFull "
            "(`weightstore doctor --capacity %s` says what to do)",
            format_size(arena.capacity),
            tightest.source,
            format_size(tightest.usable),
            format_size(arena.capacity).replace(" ", ""),
        )


def _shared_memory_size() -> int:
    stats = os.statvfs("/dev/shm")
    return stats.f_blocks * stats.f_frsize
