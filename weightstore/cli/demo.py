"""`weightstore demo`: hands over to the demonstration, which belongs to the engine's side."""

from __future__ import annotations

import subprocess
import sys

import click


@click.command(
    "demo",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def demo_command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Train, sleep, refit and wake on real data, and paint the results."""
    # In a process of its own: weightstore does not import engine_hooks, which builds on it.
    ctx.exit(subprocess.run([sys.executable, "-m", "engine_hooks.demo", *arguments]).returncode)
