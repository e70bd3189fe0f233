"""The table of commands, and what errors look like: one line on stderr, status 2 for usage and 1 for failure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import typer

from ferrolora.cli import bench, doctor, export, generate, inspect, merge, quantize, train
from ferrolora.errors import FerroloraError


class Command(NamedTuple):
    """A row of the table: what typer reads the options from, an example of use, and whether it needs arguments."""

    function: Callable[..., None]
    example: str
    needs_arguments: bool = True


COMMANDS: dict[str, Command] = {
    "quantize": Command(quantize.command, "ferrolora quantize ./Qwen2.5-0.5B ./Qwen2.5-0.5B-nf4 --report"),
    "train": Command(train.command, "ferrolora train ./Qwen2.5-0.5B --data chats.jsonl --output ./my-adapter"),
    "generate": Command(generate.command, "ferrolora generate ./Qwen2.5-0.5B --adapter ./my-adapter --prompt 'Hello'"),
    "merge": Command(merge.command, "ferrolora merge ./Qwen2.5-0.5B ./my-adapter ./merged --dtype bfloat16"),
    "export": Command(export.command, "ferrolora export adapter ./my-adapter ./for-llama-cpp"),
    "inspect": Command(inspect.command, "ferrolora inspect ./Qwen2.5-0.5B-nf4"),
    "bench": Command(
        bench.command, "ferrolora bench --suite linear --shapes 1x4096x4096,512x4096x4096", needs_arguments=False
    ),
    "doctor": Command(doctor.command, "ferrolora doctor --json", needs_arguments=False),
}

# typer exports one of the errors of the parser under it; the base of them all tells usage (2) from failure (1).
_ParserError: Any = typer.BadParameter.__mro__[2]


def build() -> typer.Typer:
    """The typer application with every command of the table."""
    app = typer.Typer(
        name="ferrolora",
        help="Fine-tune a language model on one ordinary machine: 4-bit base weights, small adapters on top.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    for name, row in COMMANDS.items():
        app.command(name, epilog=f"Example: {row.example}", no_args_is_help=row.needs_arguments)(row.function)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: without the program's name.

    Returns: the exit status: 0, 1 for a failure, 2 for a usage error, 130 for an interrupt.
    """
    try:
        status = typer.main.get_command(build()).main(list(arguments), prog_name="ferrolora", standalone_mode=False)
    except _ParserError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _complain(error.format_message())
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has left, as in `ferrolora inspect … | head`.
        sys.stderr.close()
        return 1
    except (FerroloraError, OSError) as error:
        _complain(str(error))
        return 1
    return int(status or 0)


def _complain(message: str) -> None:
    print(f"ferrolora: {' '.join(message.split())}", file=sys.stderr)


def _show_version(asked: bool) -> None:
    if asked:
        from ferrolora import _native

        print(_native.version())
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of the program itself."""
