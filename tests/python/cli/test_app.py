"""Conventions of every command: help with an example, one line for an error, exit status 2 and 1."""

import subprocess
import sys

import pytest

import ferrolora
from ferrolora.cli.app import COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_an_example(cli, name: str) -> None:
    done = cli(name, "--help")
    assert done.status == 0
    assert f"Example: ferrolora {name}" in " ".join(done.out.split())


def test_a_command_without_arguments_shows_its_help_as_a_usage_error(cli) -> None:
    done = cli("quantize")
    assert done.status == 2
    assert "Usage: ferrolora quantize" in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["quantize", "a"], "Missing argument"),
        (["quantize", "a", "b", "--quant", "nf5"], "'nf5' is unknown; choose one of nf4, fp4, int8"),
        (["quantize", "a", "b", "--block-size", "48"], "block_size 48 is unknown"),
        (["train", "m", "--data", "d", "--output", "o", "--quant", "q4"], "--quant 'q4' is not one of"),
        (["train", "m", "--data", "d", "--output", "o", "--epochs", "0"], "epochs must be above 0"),
        (["generate", "m", "--prompt", "p", "--dtype", "int8"], "--dtype 'int8' is not one of"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(cli, arguments: list[str], message: str) -> None:
    done = cli(*arguments)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert message in done.err
    assert not done.out


def test_a_failure_is_one_line_and_status_1(cli, tmp_path) -> None:
    done = cli("inspect", tmp_path / "nothing")
    assert done.status == 1
    assert done.err == f"ferrolora: {tmp_path / 'nothing'}: no such file or directory\n"


def test_the_version_is_printed(cli) -> None:
    assert cli("--version").out.strip() == ferrolora.__version__


def test_a_missing_typer_is_named_with_the_command_that_installs_it() -> None:
    code = "import sys; sys.modules['typer'] = None; import ferrolora.cli.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "ferrolora: the command line needs typer: pip install 'ferrolora[cli]'\n"
