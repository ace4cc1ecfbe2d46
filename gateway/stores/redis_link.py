"""One Redis 7+ or Valkey as the stores see it: a client, scripts, and patience with an end.

A Redis that is away never costs a call more than ``Link`` allows: a few short deadlines, then
nothing until Redis is back. What to do without it is said by each store.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

T = TypeVar("T")

GATE_SECONDS = 0.3
"""What a call may wait for the gate, and a look-up for the cache."""
LATE_SECONDS = 0.02
GRACE_SECONDS = 0.1


class Client(Protocol):
    """The two methods of redis-py's clients, single or cluster, that the stores use."""

    async def execute_command(self, *args: Any, **options: Any) -> Any: ...

    async def aclose(self) -> None: ...


def connect(url: str, *, max_connections: int = 32, timeout: float = 0.25) -> Client:
    """A client with bounded patience; nothing is connected before the first command.

    ``url`` is ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://`` or
    ``redis+sentinel://[user:password@]host:port[,host:port...]/name[/db]``. ``timeout`` is in
    seconds, for a connect, and for one reply. Raises ``ValueError`` for any other url.
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
    scheme = urlsplit(url).scheme
    if scheme == "redis+cluster":
        plain = "redis" + url[len(scheme) :]
        cluster: Client = RedisCluster.from_url(plain, max_connections=max_connections, **options)
        return cluster
    if scheme == "redis+sentinel":
        return _by_sentinel(url, max_connections=max_connections, **options)
    pool = BlockingConnectionPool.from_url(
        url, max_connections=max_connections, **options | {"timeout": timeout}
    )
    single: Client = Redis.from_pool(pool)
    return single


def _by_sentinel(url: str, **options: Any) -> Client:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    name, _, db = parts.path.strip("/").partition("/")
    if not hosts or not name or (db and not db.isdecimal()):
        raise ValueError("redis+sentinel://host:port[,host:port...]/name[/db] is what is expected")
    user, _, password = credentials.partition(":")
    brief = ("socket_timeout", "socket_connect_timeout", "retry", "protocol")
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [_host_port(host) for host in hosts.split(",")],
        username=unquote(user) or None,
        password=unquote(password) or None,
        db=int(db or 0),
        sentinel_kwargs={name: options[name] for name in brief},
        **options,
    )
    return _Sentinelled(sentinel, sentinel.master_for(name))


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    return (host, int(port)) if colon else (text, 26379)


class _Sentinelled:
    """A master's client, together with those of the sentinels, which redis-py leaves open."""

    def __init__(self, sentinel: Any, master: Client) -> None:
        self._sentinel = sentinel
        self._master = master

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


class StoreAway(Exception):
    """Redis gave no answer in time, or could not be reached, or was not asked: it is down."""


class StoreRefused(StoreAway):
    """Redis answered, but will not serve this: out of memory, read only, no permission."""


class Link:
    """Commands to one Redis, each under a deadline, and none while it is known to be down.

    Three failures in a row and it is down: from then on a call fails at once, and a probe every
    ``pause`` seconds, not a caller, finds out when it is back.

    A command is never cancelled, only no longer waited for: redis-py loses a pool's connection
    for good when a cancellation meets its release. The socket's own time-out ends it.
    """

    def __init__(
        self,
        client: Client,
        *,
        probe: str,
        failures: int = 3,
        pause: float = 1.0,
        in_flight: int = 16,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.client = client
        self._probe_key = probe
        self._allowed = failures
        self._pause = pause
        self._on_error = on_error
        self._failures = 0
        self._places = asyncio.Semaphore(in_flight)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._prober: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def failing(self) -> bool:
        """The last command got no answer."""
        return self._failures > 0

    @property
    def down(self) -> bool:
        return self._failures >= self._allowed

    async def call(self, command: Callable[[], Awaitable[T]], seconds: float) -> T:
        """Raises ``StoreAway``. ``seconds`` begin when the command's turn has come."""
        async with self._places:
            # Asked only now: those that queued behind the failures need not repeat them.
            if self.down:
                raise StoreAway("it is down")
            return await self.attempt(command, seconds)

    async def attempt(self, command: Callable[[], Awaitable[T]], seconds: float) -> T:
        """As ``call``, even while it is down, and without waiting for a turn."""
        if self._closed:
            raise StoreAway("it is closed")
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        task = asyncio.create_task(_translated(command))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await asyncio.wait({task}, timeout=seconds)
        if not task.done() and loop.time() > ends + LATE_SECONDS:
            # This process was stalled, not Redis: the answer may lie in the socket already.
            await asyncio.wait({task}, timeout=GRACE_SECONDS)
        if not task.done():
            self._failed(TimeoutError(f"no answer in {seconds} s"))
            raise StoreAway("no answer in time")
        if task.cancelled():
            raise StoreAway("it was closed")
        error = task.exception()
        if error is None:
            self._failures = 0
            return task.result()
        if isinstance(error, StoreRefused):
            self._failures = 0
            self._tell(error.__cause__ or error)
        else:
            self._failed(error.__cause__ or error)
        raise error

    async def aclose(self) -> None:
        """Closes the client too."""
        self._closed = True
        tasks = [*self._tasks, *([self._prober] if self._prober else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Looked at, so that an error nobody waited for is not reported as forgotten.
            task.exception()

    def _failed(self, error: BaseException) -> None:
        self._tell(error)
        self._failures += 1
        if self._prober is None and not self._closed:
            self._prober = asyncio.create_task(self._probe())

    def _tell(self, error: BaseException) -> None:
        if self._on_error is not None:
            self._on_error(error)

    async def _probe(self) -> None:
        try:
            while self.failing:
                await asyncio.sleep(self._pause)
                try:
                    await self.attempt(self._ask, GATE_SECONDS)
                except StoreRefused:
                    return
                except StoreAway:
                    continue
        finally:
            self._prober = None

    async def _ask(self) -> Any:
        # With a key, so that a cluster's client asks the node that our own keys live on.
        return await self.client.execute_command("EXISTS", self._probe_key)

    async def ping(self) -> None:
        """Raises ``StoreAway``; also brings a Redis that is back into use at once."""
        await self.attempt(self._ask, GATE_SECONDS)


async def _translated(command: Callable[[], Awaitable[T]]) -> T:
    """The command's answer, or why there is none as a ``StoreAway``."""
    try:
        return await command()
    except (ClusterDownError, MasterDownError) as error:
        raise StoreAway(type(error).__name__) from error
    except ResponseError as error:
        raise StoreRefused(type(error).__name__) from error
    except (RedisError, RedisClusterException, OSError) as error:
        raise StoreAway(type(error).__name__) from error
    except Exception as error:
        # Whatever the client trips over is its trouble, not the caller's: it is asked again later.
        raise StoreAway(type(error).__name__) from error
