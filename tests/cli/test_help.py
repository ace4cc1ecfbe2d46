"""What `--help` says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from gateway.cli import main
from tests.cli.conftest import Say


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group."""
    yield path
    if isinstance(command, click.Group):
        for name, inside in command.commands.items():
            yield from commands(inside, (*path, name))


def command_at(path: tuple[str, ...]) -> click.Command:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


EVERY = sorted(commands(main))


def test_these_are_the_commands() -> None:
    assert {" ".join(path) for path in EVERY} == {
        "",
        "check",
        "db",
        "db backup",
        "db restore",
        "db status",
        "db upgrade",
        "demo",
        "doctor",
        "export",
        "export focus",
        "health",
        "key",
        "key create",
        "key list",
        "key revoke",
        "ledger",
        "ledger adjust",
        "ledger factors",
        "ledger show",
        "ledger unresolved",
        "ledger verify",
        "reconcile",
        "sandbox",
        "serve",
        "team",
        "team create",
        "team list",
        "team revoke",
        "team update",
        "usage",
    }


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_everything(say: Say, path: tuple[str, ...], flag: str) -> None:
    command = command_at(path)
    said = say(*path, flag)
    assert said.exit_code == 0
    assert command.help
    assert command.help.splitlines()[0] in " ".join(said.stdout.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.opts[-1] in said.stdout
            assert parameter.help, f"{path}: {parameter.name} has no help"
    if isinstance(command, click.Group):
        assert set(command.commands) <= set(said.stdout.split())
        _, _, listed = said.stdout.partition("Commands:\n")
        assert "..." not in listed  # each is told whole, in its one line


@pytest.mark.parametrize("path", [path for path in EVERY if path not in ((), ("demo",))])
def test_every_command_takes_a_config(path: tuple[str, ...]) -> None:
    command = command_at(path)
    if isinstance(command, click.Group) or path == ("sandbox",):
        return
    assert "config" in {parameter.name for parameter in command.params}


def test_python_m_gateway() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "gateway", "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"gateway, version {version('image-gateway')}\n"
    assert said.stderr == ""


SAYING = [("usage", "--config"), ("--help",), ("--version",), ("ledger", "adjust", "-h")]


@pytest.mark.parametrize("words", SAYING, ids=" ".join)
def test_a_disk_that_is_full_is_said_in_one_sentence(config: Path, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        said = subprocess.run(
            [sys.executable, "-m", "gateway", *words, *[config] * (words[-1] == "--config")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert said.returncode == 1
    assert said.stderr == "what was asked for cannot be written: No space left on device\n"


@pytest.mark.parametrize("words", SAYING, ids=" ".join)
def test_a_pipe_that_nobody_reads_ends_a_command(config: Path, words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        said = subprocess.run(
            [sys.executable, "-m", "gateway", *words, *[config] * (words[-1] == "--config")],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert (said.returncode, said.stderr) == (1, "")


def test_an_unknown_command_is_a_mistake(say: Say) -> None:
    said = say("server")
    assert said.exit_code == 2
    assert "No such command 'server'" in said.stderr
