"""`gateway demo`: what it prints is pasted into a shell, and works."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.error import HTTPError

import pytest

from tests.cli.conftest import Say
from tests.processes import ENVIRONMENT, wait_until

PNG = b"\x89PNG\r\n\x1a\n"


class Demo:
    """A running `gateway demo`; what it printed is in ``output``. Killed when the block ends."""

    def __init__(
        self, home: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        self._file = (home / f"output-{os.urandom(4).hex()}").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "demo", "--home", str(home), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **(environment or {})},
        )

    def __enter__(self) -> Demo:
        def told() -> bool:
            return "Ctrl-C ends it." in self.output or self._process.poll() is not None

        wait_until(told, "the demo is ready")
        assert self._process.poll() is None, self.output
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._file.close()

    @property
    def output(self) -> str:
        return Path(self._file.name).read_text()

    @property
    def base_url(self) -> str:
        return self._line(r"export OPENAI_BASE_URL=(http://127\.0\.0\.1:\d+/v1)")

    @property
    def key(self) -> str:
        return self._line(r"export OPENAI_API_KEY=(igw_\w+)")

    @property
    def port(self) -> int:
        return int(self.base_url.removesuffix("/v1").rpartition(":")[2])

    def _line(self, pattern: str) -> str:
        [found] = re.findall(f"^{pattern}$", self.output, re.M)
        return str(found)

    def example(self, name: str, end: str) -> str:
        """The lines below a heading."""
        return self.output.partition(f"\n{name}:\n")[2].partition(f"\n{end}")[0]

    def paste(self, lines: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Runs lines in a shell that has seen the two exports, and nothing else."""
        exports = [line for line in self.output.splitlines() if line.startswith("export ")]
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join([*exports, lines])],
            cwd=folder,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def interrupt(self) -> int:
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(30)


def status(base_url: str, key: str) -> int:
    request = urllib.request.Request(
        f"{base_url}/models", headers={"authorization": f"Bearer {key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        with error:
            return error.code


def test_from_a_taken_port_to_a_revoked_key(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Demo(home, "--port", str(port)) as first:
            assert port < first.port <= port + 100
            picture = home / "lighthouse.png"
            assert re.match(r"A picture came back in \d+\.\d s: ", first.output)
            assert str(picture.resolve()) in first.output
            assert picture.read_bytes().startswith(PNG)
            [url] = re.findall(r"^The same as a url, for a browser: (\S+)$", first.output, re.M)
            with urllib.request.urlopen(url, timeout=10) as shown:
                assert shown.headers["content-type"] == "image/png"
                assert shown.read() == picture.read_bytes()

            for example in (
                first.example("With curl", "With Python"),
                first.example("With Python", "Metrics"),
            ):
                pasted = first.paste(example, elsewhere)
                assert (pasted.returncode, pasted.stderr) == (0, "")
                assert (elsewhere / "lighthouse.png").read_bytes() == picture.read_bytes()
                (elsewhere / "lighthouse.png").unlink()
            python = first.example("With Python", "EOF").strip().splitlines()
            assert len(python) == 6  # the line that starts Python, and five of it

            with Demo(home, "--port", str(port)) as second:
                assert second.port not in (port, first.port)
                assert second.key != first.key
                assert status(second.base_url, second.key) == 200
                assert status(first.base_url, second.key) == 200
                wait_until(
                    lambda: status(first.base_url, first.key) == 401, "the old key is revoked", 5
                )
                assert status(second.base_url, first.key) == 401
                assert second.interrupt() == 0
            assert first.interrupt() == 0
    assert "Traceback" not in first.output + second.output


@pytest.mark.parametrize("secret", ["", "igw_demo_abc"])
def test_openai_needs_a_key_of_openai(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    said = say("demo", "--upstream", "openai")
    assert said.exit_code == 1
    assert said.stdout == ""
    [line] = said.stderr.splitlines()
    assert line.startswith(
        "OPENAI_API_KEY holds a key of a gateway" if secret else "set OPENAI_API_KEY to a key"
    )
    assert list(tmp_path.iterdir()) == []


def test_openai_buys_nothing_unasked(tmp_path: Path) -> None:
    with Demo(
        tmp_path,
        "--upstream",
        "openai",
        "--port",
        "0",
        environment={"OPENAI_API_KEY": "sk-not-a-real-key-0123456789"},
    ) as demo:
        assert demo.output.startswith("Ready. Nothing has been bought")
        assert status(demo.base_url, demo.key) == 200
        assert not (tmp_path / "lighthouse.png").exists()
        assert "sk-not" not in demo.output
        assert "sk-not" not in (tmp_path / "gateway.yaml").read_text()


def test_pictures_of_the_sandbox_are_never_answers_of_openai(tmp_path: Path) -> None:
    with Demo(tmp_path, "--port", "0"):
        pass
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"sandbox"}


def test_without_the_sdk_it_says_how_to_get_it(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = say("demo")
    assert said.exit_code == 1
    assert said.stderr == "the demo needs the openai package: pip install 'image-gateway[demo]'\n"


def test_a_home_that_cannot_be_made(say: Say, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = say("demo", "--home", tmp_path / "file" / "home")
    assert said.exit_code == 1
    assert said.stderr == (
        f"{tmp_path}/file/home/gateway.yaml cannot be written (Not a directory): name a folder "
        "with --home\n"
    )
