"""One Redis 7+ or Valkey as the stores see it: a client, scripts, and patience with an end.

A Redis that is away never costs a call more than ``Link`` allows: a few short deadlines, then
nothing until Redis is back. What to do without it is said by each store.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    ClusterError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from gateway.ports import Unreachable
from gateway.stores.redis_batch import TOGETHER, Together
from gateway.stores.redis_patience import GaveUp, Turns, Wait, Waits
from gateway.stores.redis_wire import BlockParser, receiver

T = TypeVar("T")
Errand = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

GATE_SECONDS = 0.3
"""How long a server may say nothing to anybody here: then it is away."""
SOCKET_SECONDS = 1.0
"""Longer, because a socket's time-out cannot tell a silent Redis from a process that was stalled,
and a cluster's client then looks for its nodes again (tens of milliseconds of computing)."""
CLOSE_SECONDS = 2.5
IN_FLIGHT = 16
"""Commands of one store at once, each on a connection of its own."""
SMALL_IN_FLIGHT = 256
SHARED_CONNECTIONS = 64
"""Of the gate, the board, the cache and the results: 16 commands at a time for each of them."""


class Client(Protocol):
    """The two methods of redis-py's clients, single or cluster, that the stores use. An argument
    of a script may also be a tuple of blocks."""

    async def execute_command(self, *args: Any, **options: Any) -> Any: ...

    async def aclose(self) -> None: ...


def connect(url: str, *, max_connections: int = 32, timeout: float = SOCKET_SECONDS) -> Client:
    """A client with bounded patience; nothing is connected before the first command.

    ``url`` is ``redis://``, ``unix://``, ``redis+cluster://`` or
    ``redis+sentinel://[user:password@]host:port[,host:port...]/name[/db]``; ``rediss`` in place of
    ``redis`` is TLS, to the sentinels too. User and password are those of the servers, not of the
    sentinels. ``timeout`` is in seconds, for a connect, and for one reply. Raises ``ValueError``
    for any other url.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        # READONLY: the master we knew was demoted; a new connection looks its name up again.
        "retry": Retry(NoBackoff(), 1, (RedisConnectionError, RedisTimeoutError, ReadOnlyError)),
        # RESP3 brings only push messages here, and one more exchange on each connect.
        "protocol": 2,
        "decode_responses": False,
        "driver_info": None,
    }
    parser = partial(BlockParser, receiver())
    scheme = urlsplit(url).scheme
    transport, _, kind = scheme.partition("+")
    if kind == "cluster":
        plain = transport + url[len(scheme) :]
        # No steps: on a few MOVED it would close every connection, also those that are in use.
        cluster = RedisCluster.from_url(
            plain, max_connections=max_connections, reinitialize_steps=0, **options
        )
        # It takes no parser, but hands these on to the nodes that it finds.
        cluster.nodes_manager.connection_kwargs["parser_class"] = parser
        for node in cluster.nodes_manager.startup_nodes.values():
            node.connection_kwargs["parser_class"] = parser
        return _Clustered(cluster)
    options["parser_class"] = parser
    if kind == "sentinel":
        options["ssl"] = transport == "rediss"
        return _by_sentinel(url, max_connections=max_connections, **options)
    pool = BlockingConnectionPool.from_url(
        url, max_connections=max_connections, **options | {"timeout": timeout}
    )
    return Together(Redis.from_pool(pool), timeout)


def _by_sentinel(url: str, **options: Any) -> Client:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    name, _, db = parts.path.strip("/").partition("/")
    if not hosts or not name or (db and not db.isdecimal()):
        raise ValueError("redis+sentinel://host:port[,host:port...]/name[/db] is what is expected")
    user, _, password = credentials.partition(":")
    brief = ("socket_timeout", "socket_connect_timeout", "retry", "protocol", "ssl")
    sentinel = _Sentinels(
        [_host_port(host) for host in hosts.split(",")],
        username=unquote(user) or None,
        password=unquote(password) or None,
        db=int(db or 0),
        sentinel_kwargs={name: options[name] for name in brief},
        **options,
    )
    return Together(_Sentinelled(sentinel, sentinel.master_for(name)), options["socket_timeout"])


def _host_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"redis://{text}")
    return parts.hostname or text, parts.port or 26379


class _Clustered:
    """A cluster's client that knows the cluster before its first command: redis-py sends what is
    asked meanwhile to any node."""

    def __init__(self, cluster: RedisCluster) -> None:
        self._cluster = cluster
        self._nodes: dict[int, Any] = {}
        """All that it has known, by identity: one that it dropped may have connections still."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        await self._cluster.initialize()
        self._nodes |= {id(node): node for node in self._cluster.nodes_manager.nodes_cache.values()}
        whole = (b"".join(each) if isinstance(each, tuple) else each for each in args)
        return await self._cluster.execute_command(*whole, **options)

    async def aclose(self) -> None:
        await self._cluster.aclose()
        # It closes nothing where its last error has it look for its nodes anew.
        manager = self._cluster.nodes_manager
        known = [
            *self._nodes.values(),
            *manager.nodes_cache.values(),
            *manager.startup_nodes.values(),
        ]
        await asyncio.gather(*(node.disconnect() for node in known), return_exceptions=True)

    def node(self, key: str) -> str:
        """Who has ``key``; empty where nobody is known to."""
        try:
            node = self._cluster.get_node_from_key(key)
        except (RedisError, RedisClusterException):
            return ""
        return str(node.name) if node is not None else ""


class _Sentinels(Sentinel):
    """redis-py puts the sentinel that answered first, by the place where it was when it was asked.
    Of two calls at once the second so overwrites another one, which is then asked no more, and
    never closed."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)  # type: ignore[no-untyped-call]
        self._all = tuple(self.sentinels)

    async def discover_master(self, service_name: str) -> Any:
        try:
            return await super().discover_master(service_name)
        finally:
            if len({*map(id, self.sentinels)}) < len(self._all):
                self.sentinels[:] = self._all


class _Sentinelled:
    """A master's client, together with those of the sentinels, which redis-py leaves open."""

    def __init__(self, sentinel: Any, master: Any) -> None:
        self._sentinel = sentinel
        self._master = master
        self.connection_pool = master.connection_pool

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await self._master.execute_command(*args, **options)

    async def aclose(self) -> None:
        await self._master.aclose()
        for client in self._sentinel.sentinels:
            await client.aclose()


@dataclass(frozen=True, slots=True)
class Script:
    """Lua that Redis keeps by its digest."""

    text: str
    digest: str

    @classmethod
    def load(cls, name: str) -> Script:
        text = (importlib.resources.files("gateway.stores") / name).read_text(encoding="utf-8")
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    async def run(self, client: Client, keys: Sequence[str], *args: object) -> Any:
        try:
            return await client.execute_command("EVALSHA", self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return await client.execute_command("EVAL", self.text, len(keys), *keys, *args)


PROBE = Script.load("probe.lua")
"""Does what the other scripts do, to one key; its one argument is the milliseconds it lives."""


class Reason(StrEnum):
    """Why there is no answer: a label of a metric."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"
    OOM = "oom"
    READONLY = "readonly"
    LOADING = "loading"
    CLUSTER = "cluster"
    REFUSED = "refused"


class StoreAway(Unreachable):
    """Redis gave no answer in time, or could not be reached, or was not asked: it is down.

    ``asked``: the command may have been carried out all the same, or may yet be.
    """

    def __init__(self, words: str, reason: Reason, *, asked: bool = False) -> None:
        super().__init__(words)
        self.reason = reason
        self.asked = asked


class StoreRefused(StoreAway):
    """Redis answered, but will not serve this: out of memory, read only, no permission."""


class Breaker:
    """Whether one server is asked at all.

    A time-out or a refused connection opens it at once, ``failures`` other failures in a row do
    so too. Whoever waits for that server is then woken; nobody asks it until a probe has found
    that it is back.
    """

    def __init__(self, failures: int, on_back: Callable[[], None]) -> None:
        self._allowed = failures
        self._on_back = on_back
        self._failures = 0
        self._last: BaseException | None = None
        self.reason: Reason | None = None
        """Why the last command got no answer; None where it did."""
        self.probed = False
        """A task looks for it now."""
        self.waits = Waits()
        """Who waits for it: as soon as it opens, nobody."""

    @property
    def failing(self) -> bool:
        """The last command got no answer."""
        return self._failures > 0

    @property
    def open(self) -> bool:
        return self._failures >= self._allowed

    def failed(self, reason: Reason, error: BaseException, *, at_once: bool) -> None:
        self.reason = reason
        if error is self._last:
            # Commands that went out together failed together: that is one failure.
            return
        self._last = error
        self._failures += self._allowed if at_once else 1
        if self.open:
            self.waits.give_up()

    def answered(self) -> None:
        self.waits.answers += 1
        if self._failures:
            self._failures = 0
            self._last = None
            self.reason = None
            self._on_back()


class Server:
    """What is known of one server, or of each node of a cluster, by all who use it.

    A store that waits for a frozen server spares every other one the same wait. ``pause`` is the
    seconds between two probes.
    """

    def __init__(self, *, failures: int = 3, pause: float = 1.0) -> None:
        self.pause = pause
        self._failures = failures
        self._breakers: dict[str, Breaker] = {}
        self._listeners: list[Callable[[], None]] = []
        self._clients: dict[str, Together] = {}

    def connect(self, url: str) -> Client:
        """As ``connect``; who asks for the same url shares a client where that can be, so that
        what they ask for at one moment is one round trip."""
        shared = self._clients.get(url)
        if shared is not None and shared.users:
            shared.users += 1
            return shared
        client = connect(url, max_connections=SHARED_CONNECTIONS)
        if isinstance(client, Together):
            self._clients[url] = client
        return client

    def breaker(self, client: Client, key: str) -> Breaker:
        """That of the node which has ``key`` now: after a failover, another one."""
        node = client.node(key) if isinstance(client, _Clustered) else ""
        if node not in self._breakers:
            self._breakers[node] = Breaker(self._failures, self._back)
        return self._breakers[node]

    def listen(self, on_back: Callable[[], None]) -> None:
        """``on_back`` is called whenever the server, or a node of it, answers again."""
        self._listeners.append(on_back)

    def _back(self) -> None:
        for on_back in self._listeners:
            on_back()


def same_server(url: str, other: str) -> bool:
    """Whether two urls name the same hosts, whatever their users and databases."""
    one, two = (urlsplit(each).netloc.rpartition("@")[2].lower() for each in (url, other))
    return one == two


class Link:
    """Commands to one Redis, each under a deadline, and none while it is known to be down.

    A command is never cancelled, only no longer waited for: redis-py loses a pool's connection
    for good when a cancellation meets its release. The socket's own time-out ends it.
    """

    def __init__(
        self,
        client: Client,
        server: Server,
        *,
        on_error: Callable[[Reason, BaseException], None] | None = None,
        small: bool = False,
    ) -> None:
        """``small``: its commands are, and so are their answers; more of them may be under way
        where they go out together."""
        in_flight = SMALL_IN_FLIGHT if small and isinstance(client, Together) else IN_FLIGHT
        self.client = client
        self._server = server
        self._on_error = on_error
        self._turns = Turns(in_flight)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._abandoned: set[asyncio.Task[Any]] = set()
        self._probers: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def has_all_keys(self) -> bool:
        """Whether one script may have any of them: there is one server."""
        return isinstance(self.client, Together)

    def breaker(self, key: str) -> Breaker:
        return self._server.breaker(self.client, key)

    async def run(
        self, key: str, seconds: float, script: Script, keys: Sequence[str], args: Sequence[object]
    ) -> Any:
        """As ``call``, of a script."""
        client = self.client
        if not isinstance(client, Together):
            return await self.call(key, partial(script.run, client, keys, *args), seconds)
        asked = ("EVALSHA", script.digest, len(keys), *keys, *args)
        return await self._ask_together(client, key, seconds, asked, script.text)

    async def ask(self, key: str, seconds: float, *args: Any) -> Any:
        """As ``call``, of a command without options."""
        client = self.client
        if args[0] not in TOGETHER or not isinstance(client, Together):
            return await self.call(key, partial(client.execute_command, *args), seconds)
        return await self._ask_together(client, key, seconds, args)

    async def call(self, key: str, command: Callable[[], Awaitable[T]], seconds: float) -> T:
        """The answer to a command on ``key``. Raises ``StoreAway`` when the server has said nothing
        to anybody for ``seconds``, and after ``MOST_SECONDS`` in any case, the wait for a turn
        included."""
        breaker, waited = self.breaker(key), 0.0
        if breaker.open:
            raise _open(breaker)
        if not self._turns.take():
            waited = await self._turn(breaker, seconds)
        try:
            return await self._ask(key, breaker, command, seconds, waited)
        finally:
            self._turns.give()

    async def attempt(self, key: str, command: Callable[[], Awaitable[T]], seconds: float) -> T:
        """As ``call``, even while it is down, and without waiting for a turn."""
        return await self._ask(key, self.breaker(key), command, seconds)

    async def _ask_together(
        self,
        client: Together,
        key: str,
        seconds: float,
        args: tuple[Any, ...],
        text: str | None = None,
    ) -> Any:
        """What ``call`` does, without a task for the command: those it goes out with have one."""
        breaker, waited = self.breaker(key), 0.0
        if breaker.open:
            raise _open(breaker)
        if not self._turns.take():
            waited = await self._turn(breaker, seconds)
        try:
            if self._closed:
                raise StoreAway("it is closed", Reason.CONNECTION)
            asked = client.ask(args, text)
            wait = breaker.waits.begin(asked.answer, seconds, waited)
            try:
                said = await asked.answer
            except GaveUp as why:
                self._abandon(client.carriers(asked))
                raise self._gave_up(key, breaker, wait, why) from None
            except asyncio.CancelledError:
                if not _was_closed(asked.answer):
                    raise
                raise StoreAway("it was closed", Reason.CONNECTION, asked=True) from None
            except Exception as error:
                raise self._heard(key, breaker, _away(error)) from error
            finally:
                breaker.waits.end(wait)
            breaker.answered()
            return said
        finally:
            self._turns.give()

    async def _ask(
        self,
        key: str,
        breaker: Breaker,
        command: Callable[[], Awaitable[T]],
        seconds: float,
        waited: float = 0.0,
    ) -> T:
        if self._closed:
            raise StoreAway("it is closed", Reason.CONNECTION)
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(_translated(command))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, answer))
        wait = breaker.waits.begin(answer, seconds, waited, undaunted=breaker.open)
        try:
            said = await answer
        except GaveUp as why:
            self._abandon({task})
            raise self._gave_up(key, breaker, wait, why) from None
        except asyncio.CancelledError:
            if not _was_closed(answer):
                raise
            raise StoreAway("it was closed", Reason.CONNECTION, asked=True) from None
        except StoreAway as error:
            raise self._heard(key, breaker, error) from error.__cause__
        finally:
            breaker.waits.end(wait)
        breaker.answered()
        return said

    def _heard(self, key: str, breaker: Breaker, error: StoreAway) -> StoreAway:
        """An error is an answer, or says that there is none."""
        if isinstance(error, StoreRefused):
            breaker.answered()
            self._tell(error.reason, error.__cause__ or error)
        else:
            self._failed(key, breaker, error.reason, error.__cause__ or error)
        return error

    def _gave_up(self, key: str, breaker: Breaker, wait: Wait, why: GaveUp) -> StoreAway:
        if why.down or (breaker.open and not wait.undaunted):
            return StoreAway("it is down", breaker.reason or Reason.TIMEOUT, asked=True)
        late = TimeoutError("no answer in time")
        if why.silent:
            self._failed(key, breaker, Reason.TIMEOUT, late)
        else:
            self._tell(Reason.TIMEOUT, late)
        return StoreAway("no answer in time", Reason.TIMEOUT, asked=True)

    def _abandon(self, tasks: set[asyncio.Task[Any]]) -> None:
        for task in tasks:
            self._abandoned.add(task)
            task.add_done_callback(self._abandoned.discard)

    async def settled(self) -> None:
        """Until what nobody waits for any more has ended: a command may yet be carried out."""
        if self._abandoned:
            await asyncio.wait(set(self._abandoned))

    async def aclose(self) -> None:
        """Closes the client too."""
        self._closed = True
        for prober in self._probers:
            prober.cancel()
        client = self.client
        under_way = self._tasks | (client.carriers() if isinstance(client, Together) else set())
        if under_way:
            # Their sockets' time-outs end them; a connection that is cancelled is left open.
            await asyncio.wait(under_way, timeout=CLOSE_SECONDS)
        tasks = [*self._tasks, *self._probers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.aclose()

    async def _turn(self, breaker: Breaker, seconds: float) -> float:
        """Waits for a turn, and says how long that took."""
        turn = self._turns.queue()
        wait = breaker.waits.begin(turn, seconds, undaunted=True)
        try:
            await turn
        except GaveUp:
            # Nothing is said of Redis by those it did not see.
            late = StoreAway("no turn in time", Reason.TIMEOUT)
            self._tell(Reason.TIMEOUT, late)
            raise late from None
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # It came just as the caller was cancelled.
                self._turns.give()
            raise
        finally:
            breaker.waits.end(wait)
        # Asked again: those that queued behind a failure need not repeat it.
        if breaker.open:
            self._turns.give()
            raise _open(breaker)
        return wait.waited

    def _ended(self, answer: asyncio.Future[Any], task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            answer.cancel()
            return
        # Looked at, so that an error nobody waited for is not reported as forgotten.
        error = task.exception()
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(task.result())

    def _failed(self, key: str, breaker: Breaker, reason: Reason, error: BaseException) -> None:
        self._tell(reason, error)
        breaker.failed(reason, error, at_once=reason is Reason.TIMEOUT or is_refused(error))
        if not breaker.probed and not self._closed:
            breaker.probed = True
            prober = asyncio.create_task(self._probe(key, breaker))
            self._probers.add(prober)
            prober.add_done_callback(self._probers.discard)

    def _tell(self, reason: Reason, error: BaseException) -> None:
        if self._on_error is not None:
            self._on_error(reason, error)

    async def _probe(self, key: str, breaker: Breaker) -> None:
        """Asks for the key that got no answer, for ever: in a cluster, of whichever node has it."""
        try:
            while breaker.failing:
                await asyncio.sleep(self._server.pause)
                try:
                    await self.ping(key)
                except StoreRefused:
                    break
                except StoreAway:
                    continue
                # A cluster may have given the key to another node: then that one has answered,
                # and this one is asked again by whoever needs it.
                breaker.answered()
        finally:
            breaker.probed = False

    async def ping(self, key: str) -> None:
        """Raises ``StoreAway``; also brings a Redis that is back into use at once."""
        await self.attempt(key, partial(self.client.execute_command, "EXISTS", key), GATE_SECONDS)


def _open(breaker: Breaker) -> StoreAway:
    return StoreAway("it is down", breaker.reason or Reason.CONNECTION)


async def _translated(command: Callable[[], Awaitable[T]]) -> T:
    """The command's answer, or why there is none as a ``StoreAway``."""
    try:
        return await command()
    except Exception as error:
        # Whatever the client trips over is its trouble, not the caller's: it is asked again later.
        raise _away(error) from error


def _away(error: Exception) -> StoreAway:
    """What an error of the client says of Redis."""
    reason, name = _reason(error), type(error).__name__
    away = StoreAway(name, reason, asked=not is_refused(error))
    if isinstance(error, ResponseError) and not isinstance(error, _NOT_SERVING):
        away = StoreRefused(name, reason)
    away.__cause__ = error
    return away


def _was_closed(answer: asyncio.Future[Any]) -> bool:
    """Whether a wait that was cancelled has lost its client, and not its caller."""
    if answer.done() and not answer.cancelled():
        # Looked at, so that an error that came just then is not reported as forgotten.
        answer.exception()
    task = asyncio.current_task()
    return answer.cancelled() and task is not None and not task.cancelling()


_NOT_SERVING = (ClusterDownError, MasterDownError)
_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (OutOfMemoryError, Reason.OOM),
    (ReadOnlyError, Reason.READONLY),
    (BusyLoadingError, Reason.LOADING),
    (ClusterError, Reason.CLUSTER),
    (ClusterDownError, Reason.CLUSTER),
    (MasterDownError, Reason.CLUSTER),
    (AskError, Reason.CLUSTER),
    (TryAgainError, Reason.CLUSTER),
    (ClusterCrossSlotError, Reason.CLUSTER),
    (RedisClusterException, Reason.CLUSTER),
    (ResponseError, Reason.REFUSED),
    (AuthenticationError, Reason.REFUSED),
    (RedisTimeoutError, Reason.TIMEOUT),
    (TimeoutError, Reason.TIMEOUT),
)


def _reason(error: BaseException) -> Reason:
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), Reason.CONNECTION)


def is_refused(error: BaseException) -> bool:
    """Nobody listens there: another try would find nobody either."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionRefusedError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


async def eviction_policy(client: Client) -> str | None:
    """What the server, or the first of a cluster's masters, drops when it is full.

    From INFO, because a managed Redis forbids CONFIG. None where it does not say.
    """
    options, _ = on_every_master(client)
    said = await client.execute_command("INFO", "memory", **options)
    while isinstance(said, dict) and said and "maxmemory_policy" not in said:
        said = next(iter(said.values()))
    policy = said.get("maxmemory_policy") if isinstance(said, dict) else None
    return str(policy) if policy else None


def on_every_master(client: Client) -> tuple[dict[str, str], dict[str, str]]:
    """The options of a command that every master, and of one that any of them, is asked."""
    if isinstance(client, _Clustered):
        return {"target_nodes": "primaries"}, {"target_nodes": "random"}
    return {}, {}
