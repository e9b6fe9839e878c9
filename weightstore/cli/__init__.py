"""The command line. Each command lives in a module that is imported only when it runs.

So `serve` starts in a fraction of a second without torch, numpy or rich, and `--help` imports no
command at all.

Exit codes: 0 done; 1 it could not be done, with one line on stderr that says why; 2 wrong usage.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import click

from weightstore.errors import WeightstoreError

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "serve": ("serve", "Run a store: own an arena and serve it on a socket."),
    "status": ("status", "Show models, versions, tags, leases, refits and arena use."),
    "load": ("checkpoint", "Load a checkpoint into the store as a new version."),
    "plan": ("plan", "Dry run: what of a checkpoint would become which stored tensor."),
    "save": ("checkpoint", "Save a version as a checkpoint."),
    "verify": ("catalog", "Recompute checksums and compare."),
    "tag": ("catalog", "List, move or delete tags, as `git tag` does."),
    "rm": ("catalog", "Remove a model."),
    "doctor": ("doctor", "Check this host and say what to do about it."),
    "demo": ("demo", "Train, sleep, refit and wake on real data, and paint the results."),
}
"""Command name: the module it lives in (where it is called `<name>_command`), its line in --help."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"weightstore.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly when the reader of our output went away
        except WeightstoreError as error:
            raise click.ClickException(_one_line(error.message)) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(_one_line(f"{where}{error.strerror or error}")) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _print_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from weightstore import __version__

        click.echo(f"weightstore {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it."
)
def main() -> None:
    """Versioned model weights in shared host memory.

    A store owns an arena; trainers refit models in it by name, engines sleep and wake from it, and
    none of them copies a weight it does not need. Start with `weightstore serve`.
    """
