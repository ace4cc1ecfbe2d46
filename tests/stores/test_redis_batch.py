"""What is asked of one Redis at one moment is one round trip, and each has its own answer."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from gateway.stores.redis_batch import BATCH_COMMANDS, SMALL_BYTES, Together, _packed
from gateway.stores.redis_link import Client, Server
from tests.valkey import LossyWire, Valkey


async def reads(client: Client) -> int:
    """How often the server has read from any connection, this look left out."""
    said: dict[str, Any] = await client.execute_command("INFO", "stats")
    return int(said["total_reads_processed"])


async def test_what_is_asked_in_one_turn_is_one_round_trip(client: Client) -> None:
    for i in range(20):
        await client.execute_command("HSET", f"h{i}", "f", f"v{i}")
    before = await reads(client)
    said = await asyncio.gather(*(client.execute_command("HGET", f"h{i}", "f") for i in range(20)))
    assert said == [f"v{i}".encode() for i in range(20)]
    assert await reads(client) - before == 2  # the batch, and the look itself


async def test_each_has_its_own_answer_also_where_one_is_refused(client: Client) -> None:
    await client.execute_command("SET", "text", "no hash")
    await client.execute_command("HSET", "hash", "f", "v")
    said = await asyncio.gather(
        client.execute_command("HGET", "hash", "f"),
        client.execute_command("HGET", "text", "f"),
        client.execute_command("EVALSHA", "0" * 40, 1, "hash"),
        client.execute_command("EXISTS", "hash"),
        return_exceptions=True,
    )
    assert said[0] == b"v"
    assert said[3] == 1
    assert isinstance(said[1], ResponseError)
    assert isinstance(said[2], ResponseError)


async def test_a_crowd_and_a_large_one_are_all_answered(client: Client) -> None:
    large = b"x" * (SMALL_BYTES + 1)
    await client.execute_command("HSET", "h", "f", large)
    echo = await client.execute_command("SCRIPT", "LOAD", "return #ARGV[1]")
    asked = [client.execute_command("EVALSHA", echo, 1, "h", b"y" * i) for i in range(1, 300)]
    asked.append(client.execute_command("EVALSHA", echo, 1, "h", large))
    assert await asyncio.gather(*asked) == [*range(1, 300), len(large)]
    assert BATCH_COMMANDS < 300


async def test_one_lost_answer_is_asked_for_again_and_two_are_an_error(
    shared_valkey: Valkey,
) -> None:
    async with LossyWire(shared_valkey.port) as wire:
        client = Server().connect(wire.url)
        await client.execute_command("EXISTS", "h")
        wire.lose(1)
        asked = (client.execute_command("EXISTS", f"nobody {i}") for i in range(3))
        assert await asyncio.gather(*asked) == [0, 0, 0]
        wire.lose(2)
        asked = (client.execute_command("EXISTS", f"nobody {i}") for i in range(3))
        said = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(each, RedisConnectionError) for each in said)
        assert wire.lost == 3
        await client.aclose()


async def test_who_gave_up_leaves_the_others_their_answers(client: Client) -> None:
    await client.execute_command("HSET", "h", "f", "v")
    left = asyncio.create_task(client.execute_command("HGET", "h", "f"))
    stays = asyncio.create_task(client.execute_command("HGET", "h", "f"))
    await asyncio.sleep(0)
    left.cancel()
    assert await stays == b"v"
    assert left.cancelled()


async def test_forgotten_scripts_are_asked_with_their_text_also_of_who_left(
    shared_valkey: Valkey,
) -> None:
    together = Together(Redis.from_url(shared_valkey.url, protocol=2), 1.0)
    await together.execute_command("SCRIPT", "FLUSH")
    await together.execute_command("FLUSHALL")
    text = "return redis.call('HSET', KEYS[1], 'f', ARGV[1])"
    digest = hashlib.sha1(text.encode()).hexdigest()
    stays, left = (
        together.ask(("EVALSHA", digest, 1, key, "v"), text).answer for key in ("one", "two")
    )
    beside = together.ask(("EXISTS", "nobody")).answer
    await asyncio.sleep(0)
    left.cancel()
    assert await stays == 1
    assert await beside == 0
    assert await together.execute_command("EXISTS", "one", "two") == 2
    await together.aclose()


async def test_what_is_under_way_is_known_until_it_is_over(client: Client) -> None:
    assert isinstance(client, Together)
    asked = client.ask(("EXISTS", "nobody"))
    [carrier] = client.carriers(asked)
    await carrier
    assert await asked.answer == 0
    assert client.carriers(asked) == client.carriers() == set()


@pytest.mark.parametrize(
    "args",
    [
        ("EVALSHA", "0" * 40, 1, "key", 7, ""),
        ("EVALSHA", "0" * 40, 1, "schlüssel", "€" * 10),
        ("EVALSHA", "0" * 40, 1, "key", b"\0\xff", -1),
        ("HGET", "x" * (SMALL_BYTES + 1), "f"),
        ("HGET", (b"ab", b"c"), True),
    ],
)
def test_commands_are_packed_as_the_protocol_has_them(args: tuple[Any, ...]) -> None:
    parts, size = _packed(args)
    whole = b"*%d\r\n" % len(args)
    for each in args:
        plain = b"".join(each) if isinstance(each, tuple) else each
        plain = b"%d" % plain if isinstance(plain, int) else plain
        plain = plain.encode() if isinstance(plain, str) else plain
        whole += b"$%d\r\n%b\r\n" % (len(plain), plain)
    assert b"".join(parts) == whole
    assert (size > SMALL_BYTES) == (len(whole) > SMALL_BYTES)


async def test_the_last_who_shares_a_client_closes_it(shared_valkey: Valkey) -> None:
    server = Server()
    one, other = server.connect(shared_valkey.url), server.connect(shared_valkey.url)
    assert one is other
    await one.aclose()
    assert await other.execute_command("EXISTS", "nobody") == 0
    await other.aclose()
    anew = server.connect(shared_valkey.url)
    assert anew is not one
    await anew.aclose()
