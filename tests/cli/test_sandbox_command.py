"""`gateway sandbox`: a free OpenAI on a port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.processes import ENVIRONMENT, run, wait_until


@contextmanager
def running(output: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "sandbox", "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
    try:
        wait_until(lambda: "API_KEY" in output.read_text(), "it is ready")
        yield process
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_its_exports_work_and_it_ends_with_0(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with running(output):
        first, second = output.read_text().splitlines()
        name, _, base_url = first.partition("=")
        assert name == "export OPENAI_BASE_URL"
        assert second == "export OPENAI_API_KEY=sk-sandbox"
        with OpenAI(base_url=base_url, api_key="sk-sandbox", max_retries=0) as sdk:
            answer = sdk.images.generate(model="gpt-image-2", prompt="a hat", quality="low")
        assert answer.usage is not None
        assert answer.usage.output_tokens == 196


def test_a_rule_cuts_a_connection_before_any_header(tmp_path: Path) -> None:
    output = tmp_path / "output"
    asked = {"model": "gpt-image-2", "prompt": "a hat", "quality": "low"}
    with running(output, "--control"):
        base_url = output.read_text().splitlines()[0].partition("=")[2]
        rule = {"times": 1, "cut_before_headers": True}
        made = httpx.post(f"{base_url.removesuffix('/v1')}/sandbox/rules", json=rule, verify=False)
        assert made.status_code == 201
        with httpx.Client(
            headers={"authorization": "Bearer any"}, timeout=30, verify=False
        ) as http:
            with pytest.raises(httpx.RemoteProtocolError, match="without sending"):
                http.post(f"{base_url}/images/generations", json=asked)
            assert http.post(f"{base_url}/images/generations", json=asked).status_code == 200
    assert "Traceback" not in output.read_text()


def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("sandbox", "--port", str(port))
    assert ended.returncode == 1
    assert ended.stderr == f"port {port} of 127.0.0.1 is taken; choose another with --port\n"
