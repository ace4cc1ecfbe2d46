"""A Redis Cluster and a master under sentinels, from real processes, to be mistreated."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.valkey import Valkey

FORM_SECONDS = 30.0
SLOTS = 16384
NODE_TIMEOUT_MS = 500


def say(port: int, *words: object) -> Any:
    """One command on a connection of its own: bytes, a list of them, or a number."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as connection,
        connection.makefile("rwb") as wire,
    ):
        wire.write(b"*%d\r\n" % len(words))
        for word in words:
            data = str(word).encode()
            wire.write(b"$%d\r\n%s\r\n" % (len(data), data))
        wire.flush()
        return _answer(wire)


def _answer(wire: Any) -> Any:
    line = wire.readline()[:-2]
    kind, rest = line[:1], line[1:]
    if kind == b"-":
        raise RuntimeError(rest.decode())
    if kind == b":":
        return int(rest)
    if kind == b"$":
        size = int(rest)
        return wire.read(size + 2)[:-2] if size >= 0 else None
    if kind == b"*":
        return [_answer(wire) for _ in range(int(rest))]
    return rest


def until(holds: Callable[[], bool], what: str) -> None:
    """Raises ``TimeoutError``."""
    ends = time.monotonic() + FORM_SECONDS
    while True:
        with contextlib.suppress(OSError, RuntimeError):
            if holds():
                return
        if time.monotonic() > ends:
            raise TimeoutError(f"not within {FORM_SECONDS} s: {what}")
        time.sleep(0.05)


class Cluster:
    """Three masters with a replica each."""

    def __init__(self, nodes: list[Valkey]) -> None:
        self.nodes = nodes

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def form(self) -> None:
        """Meets, shares the slots out, and waits until every node sees it all."""
        masters, replicas = self.nodes[:3], self.nodes[3:]
        bounds = [round(i * SLOTS / 3) for i in range(4)]
        for epoch, (node, (first, end)) in enumerate(
            zip(masters, itertools.pairwise(bounds), strict=True)
        ):
            say(node.port, "CLUSTER", "SET-CONFIG-EPOCH", epoch + 1)
            say(node.port, "CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for node in self.nodes[1:]:
            say(self.nodes[0].port, "CLUSTER", "MEET", "127.0.0.1", node.port)
        until(lambda: all(len(self._known(node)) == 6 for node in self.nodes), "they have met")
        for master, replica in zip(masters, replicas, strict=True):
            say(replica.port, "CLUSTER", "REPLICATE", _id(master))
        self.settle()

    def settle(self) -> None:
        """Until all nodes serve, and each master has a replica that is up to date."""
        until(lambda: all(self._is_whole(node) for node in self.nodes), "the cluster is whole")

    def master_of(self, key: str) -> Valkey:
        """Who serves ``key`` now, as the others see it."""
        for node in self.nodes:
            with contextlib.suppress(OSError):
                slot = say(node.port, "CLUSTER", "KEYSLOT", key)
                for first, last, master, *_ in say(node.port, "CLUSTER", "SLOTS"):
                    if first <= slot <= last:
                        return next(each for each in self.nodes if each.port == master[1])
        raise LookupError(key)

    @property
    def masters(self) -> list[Valkey]:
        return [
            node for node in self.nodes if b"role:master" in say(node.port, "INFO", "replication")
        ]

    @property
    def epoch(self) -> int:
        """Of the last election: it is higher once another master has been chosen, even where a
        busy machine has later been taken for another loss."""
        said = b"\n".join(say(node.port, "CLUSTER", "INFO") for node in self.nodes)
        return max(map(int, re.findall(rb"cluster_current_epoch:(\d+)", said)))

    def empty(self) -> None:
        for node in self.masters:
            say(node.port, "FLUSHALL")

    def _known(self, node: Valkey) -> list[bytes]:
        lines: list[bytes] = say(node.port, "CLUSTER", "NODES").splitlines()
        return [line for line in lines if b"handshake" not in line]

    def _is_whole(self, node: Valkey) -> bool:
        state = say(node.port, "CLUSTER", "INFO")
        lines = self._known(node)
        replicas = [line for line in lines if b"slave" in line.split()[2]]
        said = say(node.port, "INFO", "replication")
        return (
            b"cluster_state:ok" in state
            and len(lines) == 6
            and not any(b"fail" in line.split()[2] for line in lines)
            and len(replicas) == 3
            and (b"master_link_status:up" in said or b"state=online" in said)
        )


def _id(node: Valkey) -> str:
    name: bytes = say(node.port, "CLUSTER", "MYID")
    return name.decode()


@contextlib.contextmanager
def run_cluster() -> Iterator[Cluster]:
    """Six nodes, formed."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(6):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster-")))
            options = (
                *("--cluster-enabled", "yes"),
                *("--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
                *("--cluster-replica-validity-factor", "0"),
                *("--repl-diskless-sync-delay", "0"),
            )
            nodes.append(node := Valkey(folder, options))
            stack.callback(node.kill)
        cluster = Cluster(nodes)
        cluster.form()
        yield cluster


class Sentinelled:
    """A master, two replicas, and three sentinels that watch them."""

    NAME = "pictures"

    def __init__(self, servers: list[Valkey], sentinels: list[Valkey]) -> None:
        self.servers = servers
        self.sentinels = sentinels

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.NAME}/0"

    @property
    def master(self) -> Valkey:
        """Who the sentinels say it is."""
        _, port = say(self.sentinels[0].port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.NAME)
        return next(each for each in self.servers if each.port == int(port))

    @property
    def epoch(self) -> int:
        """As a cluster's."""
        told = (say(each.port, "SENTINEL", "MASTER", self.NAME) for each in self.sentinels)
        return max(int(said[said.index(b"config-epoch") + 1]) for said in told)

    def settle(self) -> None:
        """Until every sentinel names the same master, and knows all the others and both replicas.
        Of a failover they hear one after the other."""
        until(self._agreed, "the sentinels agree and see all")

    def _agreed(self) -> bool:
        named = {
            tuple(say(each.port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.NAME))
            for each in self.sentinels
        }
        return len(named) == 1 and all(self._sees_all(each) for each in self.sentinels)

    def _sees_all(self, sentinel: Valkey) -> bool:
        said = say(sentinel.port, "SENTINEL", "MASTER", self.NAME)
        told: dict[bytes, bytes] = dict(zip(said[::2], said[1::2], strict=True))
        return (
            told[b"flags"] == b"master"
            and told[b"num-slaves"] == b"2"
            and told[b"num-other-sentinels"] == b"2"
        )


@contextlib.contextmanager
def run_sentinels() -> Iterator[Sentinelled]:
    """A master, two replicas and three sentinels, all aware of each other."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, config: str | None = None) -> Valkey:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sentinel-")))
            if config is not None:
                path = folder / "sentinel.conf"
                path.write_text(config)
                options = (str(path), *options)
            server = Valkey(folder, options)
            stack.callback(server.kill)
            return server

        master = start("--repl-diskless-sync-delay", "0")
        of = ("--replicaof", f"127.0.0.1 {master.port}", "--repl-diskless-sync-delay", "0")
        replicas = [start(*of) for _ in range(2)]
        for replica in replicas:
            until(
                lambda port=replica.port: b"master_link_status:up" in say(port, "INFO"),  # type: ignore[misc]
                "the replica follows",
            )
        name = Sentinelled.NAME
        config = (
            f"sentinel monitor {name} 127.0.0.1 {master.port} 2\n"
            f"sentinel down-after-milliseconds {name} 500\n"
            f"sentinel failover-timeout {name} 5000\n"
        )
        sentinels = [start("--sentinel", config=config) for _ in range(3)]
        running = Sentinelled([master, *replicas], sentinels)
        running.settle()
        yield running
