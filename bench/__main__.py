"""`python -m bench COMMAND`: measurements as ratios to what the machine can do, taken in the same run.

Commands live in modules of their own, imported only when they run: `host` needs no GPU package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

import click

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "host": ("bench.host", "Put, wake, load and control on this machine's CPU and memory."),
    "gpu": ("bench.gpu", "Sleep, wake, put, refit and relaunch on a GPU, against its link and other tools."),
    "refit": ("bench.refit", "A refit by all ranks of a sharded trainer, against gathering on one."),
    "rl-step": ("bench.rl_step.command", "An RL step's sleep, refit and wake against kill and relaunch."),
    "report": ("bench.report", "docs/benchmarks.md, its charts and the README's part, from the results."),
    "sglang": ("bench.sglang_engine", "The real SGLang Diffusion engine, stock and through the store."),
}
"""Command name: the module it lives in (where it is called `<name>_command`), its line in --help."""


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(
            import_module(COMMANDS[cmd_name][0]), f"{cmd_name.replace('-', '_')}_command"
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
def main() -> None:
    """Benchmarks. Each prints a table and writes JSON with every sample."""


if __name__ == "__main__":
    main(prog_name="python -m bench")
