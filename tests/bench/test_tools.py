"""The benchmark's own tools do what they say: what they count and time is so."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.descriptors import shares
from tests.bench.install import MissingTool
from tests.bench.processes import cores, cpu_seconds, tree, workers_for
from tests.bench.tools import (
    FLAGS,
    HERE,
    BuildError,
    LoadError,
    Mock,
    Reply,
    Times,
    build,
    load,
    neighbour,
    start_load,
)
from tests.processes import wait_until

BODY = b'{"model": "gpt-image-1", "prompt": "a cat, @@@@@@@@@@@@"}'


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    try:
        build("mock")
        build("load")
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes bytes to a new file."""
    written: list[Path] = []

    def write(text: bytes) -> Path:
        path = tmp_path / f"{len(written)}.http"
        path.write_bytes(text)
        written.append(path)
        return path

    return write


File = Callable[[bytes], Path]


def answer(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


def chunked(*parts: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks


def post(body: bytes, more: str = "") -> bytes:
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: mock\r\n{more}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Server:
    """A server of one thread that does with each connection, in turn, what it is told to."""

    def __init__(self, serve: Callable[[socket.socket], None], connections: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._serve = serve
        self._connections = connections
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for _ in range(self._connections):
            connection, _ = self._listener.accept()
            with connection:
                self._serve(connection)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)
        self._listener.close()
        assert not self._thread.is_alive(), "fewer connections came than were waited for"


def requests_of(connection: socket.socket) -> Iterator[bytes]:
    """Each request's body, as long as BODY."""
    with connection.makefile("rb") as stream:
        while stream.readline():
            while stream.readline().strip():
                pass
            yield stream.read(len(BODY))


def in_order(times: Times) -> bool:
    return 0 < times.min <= times.p50 <= times.p90 <= times.p99 <= times.max


def test_what_is_counted_on_one_side_is_counted_on_the_other(file: File) -> None:
    reply, request = answer(b"x" * 1500), post(BODY)
    with Mock(Reply(file(reply)), Reply(file(answer(b"")))) as mock:
        done = load(mock.ports[0], file(request), 7, requests=3000, warmup=1000)
        empty = load(mock.ports[1], file(b"GET / HTTP/1.1\r\nhost: mock\r\n\r\n"), 1, requests=3)
        wait_until(lambda: not any(each.connections for each in mock.stats().values()), "closed")
        stats = mock.stats()[mock.ports[0]]
    assert (done.requests, done.errors, done.statuses) == (3000, 0, {200: 3000})
    assert (done.bytes_in, done.bytes_out) == (3000 * len(reply), 3000 * len(request))
    assert (stats.requests, stats.accepted, stats.now_waiting) == (4000, 7, 0)
    assert (stats.bytes_in, stats.bytes_out) == (4000 * len(request), 4000 * len(reply))
    assert done.head_sample is None
    assert in_order(done.latency_us)
    assert in_order(done.first_us)
    assert done.latency_us.mean * 3000 <= done.seconds * 1e6 * 7
    assert empty.statuses == {200: 3}


def test_each_status_is_counted_and_the_first_refusal_is_shown(file: File) -> None:
    body = b'{"error": {"message": "\xc3\xa9 \\ \x07"}}' + b"y" * 3000
    reply = answer(body, "429 Too Many Requests")
    with Mock(Reply(file(reply))) as mock:
        done = load(mock.ports[0], file(post(BODY)), 2, requests=20)
    assert (done.requests, done.errors, done.statuses) == (20, 0, {429: 20})
    assert done.head_sample == reply[:2000].decode()


def test_seconds_end_it(file: File) -> None:
    with Mock(Reply(file(answer(b"x")), delay_ms=10)) as mock:
        done = load(mock.ports[0], file(post(BODY)), 4, seconds=0.3)
    assert 0.3 <= done.seconds < 3
    assert 4 <= done.requests <= 4 * 31


def test_a_delay_is_kept(file: File) -> None:
    with Mock(Reply(file(answer(b"x" * 1500)), delay_ms=150)) as mock:
        done = load(mock.ports[0], file(post(BODY)), 20, requests=60)
    assert done.latency_us.min >= 150_000
    assert done.latency_us.p50 < 2 * 150_000
    assert done.seconds >= 0.45


def test_gathered_requests_go_together(file: File) -> None:
    with Mock(Reply(file(answer(b"x")), gather=6)) as mock:
        five = start_load(mock.ports[0], file(post(BODY)), 5, requests=5)
        wait_until(lambda: mock.stats()[mock.ports[0]].now_waiting == 5, "five wait")
        assert mock.stats()[mock.ports[0]].bytes_out == 0
        sixth = load(mock.ports[0], file(post(BODY)), 1, requests=1)
        assert five.result().statuses == {200: 5}
        assert sixth.statuses == {200: 1}
        assert mock.stats()[mock.ports[0]].now_waiting == 0
        again = load(mock.ports[0], file(post(BODY)), 12, requests=36)
        assert again.statuses == {200: 36}


def test_a_client_that_leaves_no_longer_waits(file: File) -> None:
    with Mock(Reply(file(answer(b"x")), gather=100)) as mock:
        some = start_load(mock.ports[0], file(post(BODY)), 3, once=True)
        wait_until(lambda: mock.stats()[mock.ports[0]].now_waiting == 3, "three wait")
        some.stop()
        wait_until(lambda: mock.stats()[mock.ports[0]].now_waiting == 0, "nobody waits")
        assert mock.stats()[mock.ports[0]].connections == 0


def test_the_first_event_of_a_stream_comes_far_before_its_end(file: File) -> None:
    reply = chunked(*(b"data: %b\n\n" % (b"z" * 100_000) for _ in range(4)))
    piece = len(reply) // 4 + 1
    with Mock(Reply(file(reply), piece_bytes=piece, gap_ms=60)) as mock:
        done = load(mock.ports[0], file(post(BODY)), 3, requests=6)
    assert (done.statuses, done.bytes_in) == ({200: 6}, 6 * len(reply))
    assert done.latency_us.min >= 180_000
    assert done.first_us.p50 < done.latency_us.p50 / 3


def test_every_number_is_another(file: File) -> None:
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        for body in requests_of(connection):
            seen.append(body)
            connection.sendall(answer(b"ok"))

    with Server(serve, 2) as server:
        request = file(post(BODY))
        assert load(server.port, request, 1, requests=60, numbers=999_999_999_950).requests == 60
        assert load(server.port, request, 1, requests=5).requests == 5
    numbers = [int(re.findall(rb"\d{12}", body)[0]) for body in seen]
    assert numbers[:60] == [n % 10**12 for n in range(999_999_999_950, 10**12 + 10)]
    assert len(set(numbers)) == 65
    assert not any(b"@" in body for body in seen)


def test_only_twelve_signs_are_a_number(file: File) -> None:
    body = b"@" * 11 + b" " + b"@" * 13 + b" " + b"@" * 12 + b"," + b"@" * 12 + b" me@here"
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        seen.append(connection.recv(10_000))
        connection.sendall(answer(b"ok"))

    with Server(serve, 1) as server:
        load(server.port, file(b"POST / HTTP/1.1\r\n\r\n" + body), 1, requests=1, numbers=7)
    assert seen[0].endswith(
        b"@" * 11 + b" " + b"@" * 13 + b" 000000000007,000000000008 me@here"
    )  # fmt: skip


def test_keys_take_turns(file: File) -> None:
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with connection.makefile("rwb") as stream:
            while line := stream.readline():
                seen.append(line)
                stream.readline()
                stream.write(answer(b"ok"))
                stream.flush()

    request = file(b"GET /" + b"#" * 12 + b"?" + b"@" * 12 + b" HTTP/1.1\r\n\r\n")
    with Server(serve, 1) as server:
        load(server.port, request, 1, requests=20, numbers=100, keys=10)
    keys, numbers = zip(*(re.findall(rb"\d{12}", line) for line in seen), strict=True)
    assert sorted(map(int, keys)) == sorted([*range(10), *range(10)])
    assert list(map(int, keys)) != sorted(map(int, keys))
    assert len(set(numbers)) == 20


@pytest.mark.parametrize("expect", ["", "expect: 100-continue\r\n"])
def test_a_large_upload_arrives_whole(file: File, expect: str) -> None:
    request = post(b"p" * 10_000_000 + b"@" * 12 + b"q" * 10_000_000, expect)
    reply = answer(b"x" * 100)
    with Mock(Reply(file(reply))) as mock:
        done = load(mock.ports[0], file(request), 2, requests=6)
        stats = mock.stats()[mock.ports[0]]
    assert (done.statuses, done.errors, done.bytes_out) == ({200: 6}, 0, 6 * len(request))
    assert stats.bytes_in == 6 * len(request)
    assert (stats.bytes_out == 6 * len(reply)) == (not expect)


def test_an_upload_in_chunks_arrives_whole(file: File) -> None:
    head, _, chunks = chunked(*[b"p" * 70_000] * 30, b"q" * 13).partition(b"\r\n\r\n")
    request = head.replace(b"HTTP/1.1 200 OK", b"POST / HTTP/1.1") + b"\r\n\r\n" + chunks
    with Mock(Reply(file(answer(b"x")))) as mock:
        done = load(mock.ports[0], file(request), 3, requests=30)
        assert mock.stats()[mock.ports[0]].bytes_in == 30 * len(request)
    assert done.statuses == {200: 30}


def test_a_closed_connection_is_opened_anew(file: File) -> None:
    with Mock(Reply(file(answer(b"x" * 1500, more="connection: close\r\n")))) as mock:
        done = load(mock.ports[0], file(post(BODY)), 3, requests=50)
        assert mock.stats()[mock.ports[0]].accepted == 50
    assert (done.requests, done.errors, done.reopened) == (50, 0, 0)


def test_a_connection_closed_unsaid_is_opened_anew(file: File) -> None:
    def serve(connection: socket.socket) -> None:
        for _, _ in zip(range(2), requests_of(connection), strict=False):
            connection.sendall(answer(b"ok"))

    with Server(serve, 3) as server:
        done = load(server.port, file(post(BODY)), 1, requests=6)
    assert (done.requests, done.errors, done.statuses) == (6, 0, {200: 6})
    assert done.reopened <= 2


def test_an_answer_without_a_length_ends_with_its_connection(file: File) -> None:
    reply = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 300_000
    with Mock(Reply(file(reply))) as mock:
        done = load(mock.ports[0], file(post(BODY)), 2, requests=10)
    assert (done.requests, done.errors, done.bytes_in) == (10, 0, 10 * len(reply))


@pytest.mark.parametrize(
    "cut",
    [
        answer(b"x" * 1500)[:-1],
        chunked(b"x" * 1500)[:-2],
        chunked(b"x" * 100_000)[:-5000],
        answer(b"")[:-1],
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"",
    ],
)
def test_a_cut_answer_is_an_error(file: File, cut: bytes) -> None:
    def serve(connection: socket.socket) -> None:
        next(requests_of(connection))
        connection.sendall(cut)

    with Server(serve, 3) as server:
        done = load(server.port, file(post(BODY)), 1, requests=3)
    assert (done.requests, done.errors, done.statuses) == (0, 3, {})
    assert done.errors_by == {"connect": 0, "cut": 3, "timeout": 0}


def test_no_answer_is_an_error(file: File) -> None:
    with Mock(Reply(file(answer(b"x")), gather=100)) as mock:
        done = load(mock.ports[0], file(post(BODY)), 4, once=True, timeout_seconds=1)
    assert done.errors_by == {"connect": 0, "cut": 0, "timeout": 4}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = load(port, file(post(BODY)), 2, requests=10)
    assert done.errors_by == {"connect": 10, "cut": 0, "timeout": 0}


def test_an_answer_to_half_a_request_is_an_answer(file: File) -> None:
    answered = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(answer(b"too large", "413 Content Too Large"))
        assert answered.wait(20)

    with Server(serve, 1) as server:
        try:
            done = load(server.port, file(post(b"p" * 20_000_000)), 1, requests=1)
        finally:
            answered.set()
    assert (done.statuses, done.errors) == ({413: 1}, 0)
    assert done.bytes_out < 20_000_000


def test_two_thousand_connections_at_once(file: File) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < 2100:
        pytest.skip(f"only {most} files may be open here (ulimit -Hn)")
    with Mock(Reply(file(answer(b"x" * 1500)), gather=2000)) as mock:
        done = load(mock.ports[0], file(post(BODY)), 2000, once=True, ramp_ms=300)
        stats = mock.stats()[mock.ports[0]]
    assert (done.requests, done.errors, done.statuses) == (2000, 0, {200: 2000})
    assert (stats.requests, stats.accepted) == (2000, 2000)
    assert done.seconds >= 0.25


def test_what_cannot_run_says_why(file: File, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nowhere\.http: No such file"):
        load(1, tmp_path / "nowhere.http", 1, requests=1)
    with pytest.raises(RuntimeError, match="no end of its head"):
        Mock(Reply(file(b"HTTP/1.1 200 OK\r\n"))).start()


@pytest.mark.parametrize("name", ["mock", "load"])
def test_the_compiler_has_nothing_to_say(name: str) -> None:
    """Elsewhere another compiler may warn of more, and still build it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no cc")
    checks = ["-Werror", "-fsyntax-only", str(HERE / f"{name}.c")]
    done = subprocess.run([compiler, *FLAGS, *checks], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_compiler_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr("tests.bench.tools.BUILT", Path("/nonexistent"))
    with pytest.raises(BuildError, match="apt install gcc"):
        build("mock")


def test_there_are_workers_enough_for_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway turns away whom it has no descriptors for."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 20_000))
    assert [workers_for(count) for count in (1, 4_500, 9_000, 10_000)] == [1, 1, 2, 3]
    for count in (4_500, 9_000, 10_000):
        room = shares(20_000, 200, 10_000, 10_000)
        assert min(room.connections, room.in_flight) * workers_for(count) >= count
    with pytest.raises(MissingTool, match="30,256 file descriptors are wanted, ulimit -Hn is 20"):
        workers_for(30_000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    assert workers_for(9_000) == 1


def test_a_neighbour_goes_on_until_it_is_sent_away() -> None:
    before, core = set(tree(os.getpid())), cores().target
    with neighbour(64, core):
        [pid] = set(tree(os.getpid())) - before
        assert os.sched_getaffinity(pid) == {core}
        wait_until(lambda: cpu_seconds(pid) > 0.05, "it has taken its share")
    assert set(tree(os.getpid())) == before
