from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.cli import main

Say = Callable[..., Result]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Runs `gateway ...` in this process, in an empty folder, with an empty environment."""
    for name in ("GATEWAY_CONFIG", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


@pytest.fixture
def ask(say: Say) -> Callable[..., Any]:
    """As ``say``, for commands that print JSON and end well."""

    def run(*arguments: str | Path) -> Any:
        result = say(*arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with one team of its own and the sandbox behind it."""
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "server: {host: 127.0.0.1, port: 0}\n"
        "storage: {database: 'sqlite:///data/gateway.db', blobs: data/blobs}\n"
        "upstreams: {sandbox: {kind: sandbox}}\n"
        "models:\n"
        "  gpt-image-2.5-flare: {upstream: sandbox}\n"
        "  gpt-image-2: {upstream: sandbox}\n"
        "teams:\n"
        "  growth: {keys: [{key: growth-key-0123456789abcdef, name: ci}]}\n"
    )
    return path
