"""The Makefile: what can be said of it without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what `make` needs before it installs."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without what a `make test` around this test says to its own children.
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_make_alone_explains_every_target(clone: Path) -> None:
    said = make(clone)
    assert said.returncode == 0
    text = (clone / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (.*)$", text, re.M))
    assert targets >= {"run", "test", "lint", "types", "check", "live", "clean", "help"}
    assert {line.split()[1] for line in said.stdout.splitlines()} == targets


def test_no_usable_python_is_said_plainly(clone: Path) -> None:
    said = make(clone, "run", "PYTHON=/nowhere/python3")
    assert said.returncode == 2
    assert "/nowhere/python3 will not do: Python 3.11 or newer with pip" in said.stderr
    assert not (clone / ".venv").exists()


def test_a_python_is_found_by_its_name(clone: Path) -> None:
    """Its name on the PATH will do, where pip wants the path of the program."""
    folder, name = os.path.split(os.path.realpath(sys.executable))
    path = f"{folder}:{os.environ['PATH']}"
    if subprocess.run([f"{folder}/{name}", "-m", "pip", "--version"], check=False).returncode:
        pytest.skip(f"{folder}/{name} has no pip")
    said = make(clone, ".venv/bin/python", f"PYTHON={name}", PATH=path)
    assert said.stderr == ""
    version = ".".join(str(part) for part in sys.version_info[:3])
    assert said.stdout == f"Making .venv with Python {version} ...\n"
    assert (clone / ".venv" / "bin" / "python").exists()
    assert not list((clone / ".venv").glob("lib/*/site-packages/pip"))


def test_an_installed_environment_is_used_as_it_is(clone: Path) -> None:
    """Neither pip nor venv runs again: that would need a Python, and there is none here."""
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    for stamp in ("installed-demo", "installed-dev"):
        (clone / ".venv" / stamp).touch()
    nowhere = "PYTHON=/nowhere/python3"
    said = make(clone, "run", nowhere, "UPSTREAM=openai", "PORT=9000")
    assert said.stdout == "-m gateway demo --upstream openai --port 9000\n"
    lines = make(clone, "check", nowhere, "ARGS=-x").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["ruff", "ruff", "mypy", "pytest"]
    assert lines[-1].endswith(" -x")
