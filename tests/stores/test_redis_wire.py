"""Large answers of a Redis come in blocks, whole or not at all, and the connection goes on."""

from __future__ import annotations

import asyncio
import secrets
from functools import partial

import pytest
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.stores.redis_link import Client, connect
from gateway.stores.redis_wire import (
    BLOCK_BYTES,
    IN_BLOCKS,
    RECEIVE_BYTES,
    BlockParser,
    _Array,
    receiver,
)
from tests.redis_servers import run_cluster

SIZES = (0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, RECEIVE_BYTES - 3, RECEIVE_BYTES, 3 * RECEIVE_BYTES)


async def test_every_size_comes_as_it_was_stored(client: Client) -> None:
    stored = [secrets.token_bytes(size) for size in SIZES]
    for i, value in enumerate(stored):
        await client.execute_command("HSET", "h", f"{i}", value)
    names = [f"{i}" for i in range(len(stored))]
    for _ in range(3):
        said = await client.execute_command("HMGET", "h", *names, "nothing", **IN_BLOCKS)
        assert [b"".join(bulk) for bulk in said[:-1]] == stored
        assert said[-1] is None
        assert all(len(block) <= BLOCK_BYTES for bulk in said[:-1] for block in bulk)
        assert await client.execute_command("HMGET", "h", "1", "nothing") == [stored[1], None]


async def test_many_at_once_have_each_their_own(client: Client) -> None:
    stored = [secrets.token_bytes(300_000) for _ in range(20)]
    for i, value in enumerate(stored):
        await client.execute_command("HSET", "h", f"{i}", value)
    asked = (client.execute_command("HMGET", "h", f"{i}", **IN_BLOCKS) for i in range(20))
    assert [b"".join(said[0]) for said in await asyncio.gather(*asked)] == stored


async def test_a_cluster_answers_in_blocks_too() -> None:
    with run_cluster() as cluster:
        client = connect(cluster.url)
        try:
            value = secrets.token_bytes(300_000)
            for name in ("one", "two", "three", "four"):
                await client.execute_command("HSET", name, "f", value)
                [said] = await client.execute_command("HMGET", name, "f", **IN_BLOCKS)
                assert isinstance(said, list)
                assert b"".join(said) == value
        finally:
            await client.aclose()


async def test_an_error_is_redis_pys_and_the_connection_goes_on(client: Client) -> None:
    await client.execute_command("SET", "text", "no hash")
    with pytest.raises(ResponseError, match="wrong kind of value"):
        await client.execute_command("HMGET", "text", "f", **IN_BLOCKS)
    assert await client.execute_command("HMGET", "nobody", "f", **IN_BLOCKS) == [None]
    assert await client.execute_command("GET", "text", **IN_BLOCKS) == b"no hash"


async def answered(answer: bytes, *, closes: bool) -> object:
    """What a client is told by a server that says ``answer`` to whatever it is asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(answer)
            await writer.drain()
            if closes:
                break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        pool = BlockingConnectionPool(
            host="127.0.0.1",
            port=port,
            protocol=2,
            driver_info=None,
            socket_timeout=0.2,
            retry=None,
            parser_class=partial(BlockParser, receiver()),
        )
        client: Client = Redis.from_pool(pool)
        try:
            return await client.execute_command("HMGET", "h", "f", **IN_BLOCKS)
        finally:
            await client.aclose()


@pytest.mark.parametrize("answer", [b"*1\r\n", b"*1\r\n$5\r\nab", b"*1\r\n$5", b"*"])
async def test_a_cut_answer_is_an_error_and_a_late_one_a_timeout(answer: bytes) -> None:
    with pytest.raises(RedisConnectionError):
        await answered(answer, closes=True)
    with pytest.raises(RedisTimeoutError):
        await answered(answer, closes=False)


@pytest.mark.parametrize(
    "answer", [b"*x\r\n", b"*1\r\n:5\r\n", b"*1\r\n$-2\r\n", b"*1\r\n$" + b"9" * 40 + b"\r\n"]
)
async def test_what_is_no_array_of_strings_is_refused(answer: bytes) -> None:
    with pytest.raises(InvalidResponse):
        await answered(answer, closes=False)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 11, 1000])
async def test_any_cut_gives_the_same(step: int) -> None:
    answer = b"*4\r\n$3\r\na\r\n\r\n$-1\r\n$0\r\n\r\n$12\r\n$3\r\n*4\r\nabc+\r\n"
    array, rest = _Array(), b""
    for at in range(0, len(answer), step):
        rest += bytes(array.feed(memoryview(answer[at : at + step])))
    rest += bytes(array.feed(memoryview(b"+OK\r\n")))
    bulks = await array.done
    assert bulks is not None
    said = [None if bulk is None else b"".join(bulk) for bulk in bulks]
    assert said == [b"a\r\n", None, b"", b"$3\r\n*4\r\nabc+"]
    assert rest == b"+OK\r\n"


@pytest.mark.parametrize("answer", [b"*0\r\n", b"*-1\r\n"])
async def test_an_empty_array(answer: bytes) -> None:
    assert await answered(answer, closes=False) == []
