"""`gateway serve`: how it starts, how it refuses to, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Say
from tests.processes import GatewayProcess, run, wait_until


def test_it_says_where_it_listens_and_ends_with_0(config: Path) -> None:
    with GatewayProcess(config) as serving:
        serving.wait_ready()
        assert serving.stderr == f"gateway: serving on http://127.0.0.1:{serving.port}/v1\n"
        serving.terminate()
        assert serving.wait() == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_with_nothing_under_way_it_ends_at_once(config: Path, how: signal.Signals) -> None:
    """An idle connection is no reason to wait, and half a request neither."""
    with GatewayProcess(config) as serving:
        serving.wait_ready()
        with (
            socket.create_connection(("127.0.0.1", serving.port), timeout=5) as idle,
            socket.create_connection(("127.0.0.1", serving.port), timeout=5) as half,
        ):
            idle.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert idle.recv(64).startswith(b"HTTP/1.1 200 OK")
            half.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost:")
            os.kill(serving.pid, how)
            assert serving.wait(10) == 0


def test_an_upload_that_has_begun_is_refused_when_the_drain_does(config: Path) -> None:
    with GatewayProcess(config) as serving:
        serving.wait_ready()
        with socket.create_connection(("127.0.0.1", serving.port), timeout=30) as upload:
            upload.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
                b"authorization: Bearer growth-key-0123456789abcdef\r\n"
                b"content-type: application/json\r\n\r\n{"
            )
            wait_until(
                lambda: serving.metrics()['gateway_inflight_bytes{where="memory"}'] == 1,
                "its first byte is there",
            )
            serving.terminate()
            wait_until(serving.drains, "it drains")
            upload.sendall(b" ")
            answer = b""
            while some := upload.recv(65536):
                answer += some
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"shutting_down"' in answer
        assert serving.wait() == 0


def test_host_and_port_of_the_command_go_first(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config.write_text(config.read_text().replace("127.0.0.1", "0.0.0.0"))
    with GatewayProcess(config, "--host", "127.0.0.1", "--port", str(port)) as serving:
        serving.wait_ready()
        assert serving.base_url == f"http://127.0.0.1:{port}/v1"


def test_a_taken_port_is_one_sentence(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("serve", "--config", str(config), "--port", str(port))
    assert ended.returncode == 1
    assert ended.stderr == (
        f"port {port} of 127.0.0.1 is taken; choose another with --port or server.port\n"
    )


def test_a_taken_port_for_the_metrics_is_that_setting_s(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config.write_text(config.read_text().replace("port: 0", f"port: 0, metrics_port: {port}"))
        ended = run("serve", "--config", str(config))
    assert ended.returncode == 1
    assert ended.stderr == (
        f"port {port} of 127.0.0.1 is taken; choose another with server.metrics_port\n"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "nohost.invalid", "a..b", "::1::"])
def test_no_such_address(config: Path, host: str) -> None:
    ended = run("serve", "--config", str(config), "--host", host)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"cannot listen on {host}: this machine has no such address; say one that it has with "
        "--host or server.host, or 0.0.0.0 for all of them\n"
    )


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (
            errno.EACCES,
            "port 80 of 127.0.0.1 is not for this user; choose one over 1023 with --port or "
            "server.port\n",
        ),
        (
            errno.EAFNOSUPPORT,
            "cannot listen on 127.0.0.1, port 80 (--host or server.host, --port or server.port): "
            "Address family not supported by protocol\n",
        ),
    ],
)
def test_a_port_that_is_not_given(
    say: Say, config: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refused(*_: object, **__: object) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("gateway.cli.common.listen", refused)
    ended = say("serve", "--config", config, "--port", "80")
    assert (ended.exit_code, ended.stderr) == (1, said)


def test_a_redis_that_is_down_is_said_by_the_setting_it_has(config: Path) -> None:
    """Before anybody asks; and never its password."""
    document = yaml.safe_load(config.read_text())
    document["storage"]["redis"] = "redis://:hush-redis@127.0.0.1:1/0"
    document["cache"] = {"redis": "redis://somebody:hush-cache@127.0.0.1:2/0"}
    config.write_text(yaml.safe_dump(document))
    with GatewayProcess(config) as serving:
        serving.wait_ready()

        def said(setting: str) -> bool:
            return f'"setting": "{setting}"' in serving.stderr

        wait_until(lambda: said("storage.redis") and said("cache.redis"), "both are said")
        assert "the shared gate does not answer" in serving.stderr
        assert "Error 111 connecting to 127.0.0.1:2. Connection refused." in serving.stderr
        assert "hush" not in serving.stderr
        serving.terminate()
        assert serving.wait() == 0


def test_warnings_come_before_the_address(config: Path) -> None:
    config.write_text(config.read_text() + "  design: {}\n")
    with GatewayProcess(config) as serving:
        serving.wait_ready()
        first, second = serving.stderr.splitlines()
    assert first.startswith(f"warning: {config}:")
    assert "teams.design: has no key" in first
    assert second.startswith("gateway: serving on ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("port: 0", "port: eighty"), "server.port"),
        (("  gpt-image-2: {upstream", "  mystery: {upstream"), "mystery has no price at sandbox"),
    ],
    ids=["a mistake", "no price"],
)
def test_what_check_refuses_is_not_served(
    say: Say, config: Path, change: tuple[str, str], said: str
) -> None:
    config.write_text(config.read_text().replace(*change))
    checked = say("check", "--config", config)
    ended = run("serve", "--config", str(config))
    assert (ended.returncode, ended.stderr) == (2, checked.stderr)
    assert checked.exit_code == 2
    assert said in ended.stderr
    assert not (config.parent / "data").exists()


def test_a_team_in_the_file_and_in_the_directory(say: Say, config: Path) -> None:
    declared = config.read_text()
    config.write_text(declared.replace("growth:", "design:"))
    assert say("team", "create", "growth", "--config", config).exit_code == 0
    config.write_text(declared)
    ended = run("serve", "--config", str(config))
    assert ended.returncode == 2
    assert ended.stderr == (
        f"{config}: teams.growth: a team of this name was made with `gateway team create` too. "
        "Give the one in this file another name\n"
    )


def test_a_key_in_the_file_and_in_the_directory(say: Say, config: Path) -> None:
    assert say("team", "create", "design", "--config", config).exit_code == 0
    secret = say("key", "create", "--team", "design", "--config", config).stdout.strip()
    config.write_text(config.read_text().replace("growth-key-0123456789abcdef", secret))
    ended = run("serve", "--config", str(config))
    assert ended.returncode == 2
    assert f"{config}: teams.growth.keys: the key ci was made with" in ended.stderr
    assert "of team design too. Remove it from this file" in ended.stderr
    assert secret not in ended.stderr


@pytest.mark.parametrize("damage", [b"", b"not a database, but long enough to look like one"])
def test_a_damaged_database(config: Path, damage: bytes) -> None:
    database = config.parent / "data" / "gateway.db"
    database.parent.mkdir()
    database.write_bytes(damage)
    ended = run("serve", "--config", str(config))
    assert ended.returncode == 1
    assert str(database) in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert database.read_bytes() == damage


def test_no_place_for_the_database(config: Path) -> None:
    (config.parent / "data").write_text("a file where the folder should be")
    ended = run("serve", "--config", str(config))
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "data" in ended.stderr


def test_metrics_on_a_port_of_their_own(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config.write_text(config.read_text().replace("port: 0", f"port: 0, metrics_port: {port}"))
    with GatewayProcess(config) as serving:
        serving.wait_ready()
        with socket.create_connection(("127.0.0.1", port), timeout=5) as monitor:
            monitor.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert monitor.recv(64).startswith(b"HTTP/1.1 200 OK")
        serving.terminate()
        wait_until(lambda: not serving.running, "it ends")
        assert serving.wait() == 0
