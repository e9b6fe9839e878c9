"""`weightstore doctor`: what about this host makes a store slow or fail, and what to do."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Final

import click

from weightstore.cli.options import connect, size, socket_option
from weightstore.doctor import Finding, examine
from weightstore.errors import WeightstoreError
from weightstore.paths import socket_path

COLORS: Final = {"ok": "green", "warn": "yellow", "fail": "red"}
INDENT: Final = 24


@click.command("doctor")
@socket_option
@click.option("--capacity", metavar="SIZE", type=size, help="Check that so many bytes can be had.")
@click.option("--gpu/--no-gpu", default=True, show_default=True, help="Look at CUDA as well.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def doctor_command(
    ctx: click.Context, socket: str | None, capacity: int | None, gpu: bool, as_json: bool
) -> None:
    """Check this host: shared memory, cgroups, huge pages, kernel features, leftover arenas, CUDA.

    Each finding says what was seen and, where something can be better, what to do. Exits with 1 if
    anything fails; warnings alone exit with 0.
    """
    findings = [*examine(capacity=capacity, gpu=gpu), check_store(socket)]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(_line(finding))
        counts = {status: sum(f.status == status for f in findings) for status in COLORS}
        click.echo(f"\n{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    ctx.exit(1 if any(finding.status == "fail" for finding in findings) else 0)


def check_store(socket: str | None) -> Finding:
    """Whether a store answers on `socket`. None needs to run, but a named one should."""
    try:
        path = socket_path(socket)
        with connect(path) as store:
            status = store.status()
    except WeightstoreError as error:
        return Finding("store", "ok" if socket is None else "fail", error.message)
    return Finding("store", "ok", f"pid {status.pid} answers on {path}, with {len(status.models)} models")


def _line(finding: Finding) -> str:
    status = click.style(
        finding.status.upper().ljust(5), fg=COLORS[finding.status], bold=finding.status != "ok"
    )
    lines = [f"{status} {finding.name.ljust(17)} {finding.seen}"]
    lines += textwrap.wrap(
        finding.advice,
        width=100,
        initial_indent=" " * INDENT,
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)
