"""Every way in which an upstream's 200 can go on, and what the client has seen by then."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.call import Operation, Usage
from gateway.domain.errors import (
    Evidence,
    GatewayError,
    UpstreamAccount,
    UpstreamBroken,
    UpstreamRefused,
    UpstreamUnknown,
)
from gateway.domain.ledger import Outcome
from gateway.ports import Growing, Take
from gateway.relay import landing
from gateway.relay.body import Room, Spool, spliced
from gateway.relay.events import Event
from gateway.relay.landing import Landing, failed, land_events, land_json
from gateway.relay.meter import EventMeter, JsonMeter, error_event

PICTURE = base64.b64encode(bytes(range(256)) * 4).decode()
USAGE = {
    "input_tokens": 50,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 50},
    "output_tokens": 1756,
    "total_tokens": 1806,
}
COUNTED = Usage(text_in=50, image_out=1756)
CUT = UpstreamBroken("The upstream openai cut its answer.")


@dataclass
class Scripted:
    """A reply by a script: what comes, and in the end perhaps why it broke off.

    ``seen`` is what followers could see when each chunk was asked for, and at the end.
    """

    script: Sequence[bytes | Exception]
    spool: Spool
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)

    async def chunks(self, take: Take | None = None) -> AsyncIterator[bytes]:
        for step in self.script:
            self.seen.append(self.spool.published)
            if isinstance(step, Exception):
                raise step
            # As an exchange does: where it is received, and again where it is read.
            if take is None or not (take(step) or take(step)):
                yield step
        self.seen.append(self.spool.published)

    async def aclose(self) -> None:
        return


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    made = Room(1 << 20, 1 << 20, tmp_path)
    yield made
    assert (made.memory_used, made.disk_used) == (0, 0)


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def problem(landing: Landing) -> tuple[type[GatewayError], str]:
    assert landing.error is not None
    assert landing.reading is None
    return type(landing.error), landing.error.message


# JSON


GOOD = {"created": 1, "data": [{"b64_json": PICTURE}], "size": "1024x1024", "usage": USAGE}


@dataclass
class JsonResult:
    landing: Landing
    json: bytes | None
    events: bytes | None
    published: int


async def json_lands(room: Room, *script: bytes | Exception, as_stream: bool = False) -> JsonResult:
    spool = Spool(room)
    landing = await land_json(
        Scripted(script, spool),
        spool,
        JsonMeter(Operation.GENERATION, "openai"),
        as_stream=as_stream,
    )
    made = []
    for form in (landing.json, landing.events):
        made.append(None if form is None else b"".join([one async for one in spliced(spool, form)]))
    spool.close()
    return JsonResult(landing, made[0], made[1], spool.published)


async def test_a_json_answer(room: Room) -> None:
    body = compact(GOOD)
    result = await json_lands(room, body[:100], body[100:])
    landing = result.landing
    assert landing.error is None
    assert landing.reading is not None
    assert landing.ending.outcome is Outcome.DELIVERED
    answer = landing.ending.answer
    assert answer is landing.reading.answer
    assert (answer.images, answer.usage, answer.size, answer.quality) == (
        *(1, COUNTED),
        *("1024x1024", ""),
    )
    assert (result.json, landing.streamed, landing.rest) == (body, False, None)
    assert result.events is not None
    assert result.events.startswith(b"event: image_generation.completed\ndata: {")
    assert PICTURE.encode() in result.events
    assert result.published == 0, "nothing is seen before it is paid for"


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize(
    ("document", "images", "usage", "invalid", "hosted", "streamable"),
    [
        (GOOD, 1, COUNTED, False, False, True),
        ({"data": [{"b64_json": PICTURE}]}, 1, None, False, False, True),
        ({**GOOD, "usage": {"input_tokens": -1}}, 1, None, True, False, True),
        ({**GOOD, "usage": 7}, 1, None, True, False, True),
        ({**GOOD, "error": None}, 1, COUNTED, False, False, True),
        ({"data": [{"url": "https://x/a.png"}]}, 1, None, False, True, False),
        ({"data": [{"b64_json": PICTURE}] * 2}, 2, None, False, False, False),
        ({"data": [{"b64_json": PICTURE}, {}, 7]}, 1, None, False, False, False),
        ({"data": [{"b64_json": PICTURE}, {"url": "https://x"}]}, 2, None, False, True, False),
    ],
)
async def test_json_answers(
    room: Room,
    as_stream: bool,
    document: object,
    images: int,
    usage: Usage | None,
    invalid: bool,
    hosted: bool,
    streamable: bool,
) -> None:
    result = await json_lands(room, compact(document), as_stream=as_stream)
    ending = result.landing.ending
    assert ending.answer is not None
    assert (ending.answer.images, ending.answer.usage, ending.invalid_usage) == (
        *(images, usage),
        invalid,
    )
    if as_stream and not streamable:
        kind, text = problem(result.landing)
        assert kind is UpstreamBroken
        assert text == (
            "The upstream openai answered with JSON to a request for a stream, in a form that "
            "cannot be turned into the other. It has been paid for, so this is not retried for "
            "you."
        )
        assert ending.outcome is Outcome.BROKEN
        return
    assert ending.outcome is Outcome.DELIVERED
    assert result.landing.reading is not None
    assert result.landing.reading.hosted is hosted
    assert (result.events is not None) is streamable


NO_PICTURE = (
    "The upstream openai answered without a picture. It may have been paid for, so this is not "
    "retried for you."
)
NOT_JSON = (
    "The upstream openai answered with something that is not JSON. It may have been paid for, so "
    "this is not retried for you."
)


@pytest.mark.parametrize(
    ("body", "text", "usage"),
    [
        (b"", NOT_JSON, None),
        (b"<html>", NOT_JSON, None),
        (b'{"data": [', NOT_JSON, None),
        (compact(GOOD)[:-1], NOT_JSON, None),
        (compact(GOOD) + b"}", NOT_JSON, None),
        (b"\xff\xfe", NOT_JSON, None),
        (b"{}", NO_PICTURE, None),
        (b"null", NO_PICTURE, None),
        (b"[]", NO_PICTURE, None),
        (b'{"data": null}', NO_PICTURE, None),
        (b'{"data": []}', NO_PICTURE, None),
        (b'{"data": {"b64_json": "x"}}', NO_PICTURE, None),
        (b'{"data": [{"b64_json": ""}]}', NO_PICTURE, None),
        (compact({**GOOD, "data": []}), NO_PICTURE, COUNTED),
    ],
)
async def test_a_success_without_a_picture_was_bought(
    room: Room, body: bytes, text: str, usage: Usage | None
) -> None:
    result = await json_lands(room, body)
    assert problem(result.landing) == (UpstreamBroken, text)
    ending = result.landing.ending
    assert ending.outcome is Outcome.BROKEN
    assert ending.answer is not None
    assert (ending.answer.images, ending.answer.usage) == (0, usage)


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        ({"code": "moderation_blocked", "message": "No."}, UpstreamRefused, 400),
        ({"code": "insufficient_quota"}, UpstreamAccount, 503),
        ("it failed", UpstreamRefused, 502),
        ({"message": "long " * 20_000}, UpstreamRefused, 502),
    ],
)
async def test_an_error_in_a_success_was_not_billed(
    room: Room, error: object, kind: type[GatewayError], status: int
) -> None:
    result = await json_lands(room, compact({"error": error, "usage": USAGE}))
    assert problem(result.landing)[0] is kind
    assert result.landing.error is not None
    assert result.landing.error.status == status
    assert result.landing.ending.outcome is Outcome.REFUSED


@pytest.mark.parametrize("before", [0, 1, 50, 500])
async def test_a_json_answer_that_is_cut_has_an_unknown_outcome(room: Room, before: int) -> None:
    result = await json_lands(room, compact(GOOD)[:before], CUT)
    assert result.landing.error is CUT
    assert result.landing.ending.outcome is Outcome.UNKNOWN
    assert (result.json, result.events) == (None, None)


NO_ROOM = (
    "The picture was made, but this gateway had no room to hold it. It may have been paid for, so "
    "this is not retried for you."
)


@pytest.mark.parametrize("form", ["json", "events"])
async def test_a_picture_that_finds_no_room_was_bought(tmp_path: Path, form: str) -> None:
    room = Room(100, 200, tmp_path)
    if form == "json":
        landing = (await json_lands(room, *in_tens(compact(GOOD)))).landing
    else:
        landing = (await stream_lands(room, *in_tens(partial(0) + DONE))).landing
    assert problem(landing) == (UpstreamBroken, NO_ROOM)
    assert landing.error is not None
    assert (landing.error.status, landing.error.should_retry) == (503, False)
    assert landing.ending.outcome is Outcome.UNKNOWN
    assert (room.memory_used, room.disk_used) == (0, 0)


def in_tens(body: bytes) -> list[bytes]:
    return [body[at : at + 10] for at in range(0, len(body), 10)]


@settings(max_examples=40, deadline=None)
@given(
    body=st.sampled_from(
        [
            compact(GOOD),
            compact(GOOD)[:-1],
            compact(GOOD).replace(b"1", "１".encode()),
            compact({"error": {"code": "moderation_blocked", "message": "No."}}),
            compact({"data": []}),
            b"<html>Bad Gateway</html>",
        ]
    ),
    cuts=st.lists(st.integers(1, 2000), max_size=8),
)
def test_it_makes_no_difference_where_json_is_cut(body: bytes, cuts: list[int]) -> None:
    async def story() -> None:
        room = Room(1 << 20, 0, Path(gettempdir()))
        whole = await json_lands(room, body)
        parts = await json_lands(room, *split(body, cuts))
        assert (parts.json, parts.events) == (whole.json, whole.events)
        assert parts.landing.ending == whole.landing.ending
        assert str(parts.landing.error) == str(whole.landing.error)

    asyncio.run(story())


def split(body: bytes, cuts: Sequence[int]) -> list[bytes]:
    marks = [0, *sorted(cut for cut in set(cuts) if cut < len(body)), len(body)]
    return [body[start:end] for start, end in pairwise(marks)]


# Streams


def frame(name: str, **members: Any) -> bytes:
    return f"event: {name}\ndata: ".encode() + compact({"type": name, **members}) + b"\n\n"


def partial(index: int) -> bytes:
    return frame("image_generation.partial_image", b64_json=PICTURE, partial_image_index=index)


def completed(**more: Any) -> bytes:
    return frame("image_generation.completed", b64_json=PICTURE, **more)


DONE = b"data: [DONE]\n\n"
ALIVE = b": keepalive\n\n"
LAST = completed(usage=USAGE, size="1024x1024", quality="high")
ERROR = b'event: error\ndata: {"error":{"message":"No.","code":"moderation_blocked"}}\n\n'
FLAT_ERROR = b'data: {"type":"error","message":"No.","code":"moderation_blocked"}\n\n'


@dataclass
class StreamResult:
    """``held`` is what had been seen when it landed, ``sent`` all that the client gets."""

    landing: Landing
    seen: list[int]
    held: bytes
    sent: bytes
    json: bytes | None
    begun: list[str]


async def stream_lands(
    room: Room, *script: bytes | Exception, wanted: int = 1, as_json: bool = False
) -> StreamResult:
    """Lands a stream, and goes on with it as the relay does."""
    spool = Spool(room)
    reply = Scripted(script, spool)
    meter = EventMeter(Operation.GENERATION, "openai")
    begun: list[str] = []

    def begin(event: Event) -> None:
        begun.append(event.name)

    landing = await land_events(reply, spool, meter, wanted, begin, as_json=as_json)
    held = spool.published
    if landing.error is not None:
        spool.forget_unpublished()
        if held:
            await spool.write(error_event(landing.error))
        spool.publish()
    elif landing.streamed:
        spool.publish(landing.upto)
        if landing.rest is not None:
            await _pass_on(landing, spool)
    made = None
    if landing.json is not None:
        made = b"".join([one async for one in spliced(spool, landing.json)])
    spool.finish()
    sent = b"".join([chunk async for chunk in spool.follow()])
    spool.close()
    return StreamResult(landing, reply.seen, sent[:held], sent, made, begun)


async def _pass_on(landing: Landing, spool: Spool) -> None:
    assert landing.rest is not None
    try:
        async with aclosing(landing.rest) as rest:
            async for upto in rest:
                spool.publish(upto)
    except GatewayError:
        return


async def test_partial_pictures_leave_and_the_last_one_waits(room: Room) -> None:
    first, second = partial(0), partial(1)
    result = await stream_lands(room, first, second, LAST, DONE)
    ends = [len(first), len(first + second), len(first + second + LAST)]
    assert result.seen == [0, *ends]
    assert (result.held, result.sent) == (first + second, first + second + LAST + DONE)
    assert result.begun == ["image_generation.partial_image"] * 2
    assert result.landing.reading is not None
    answer = result.landing.reading.answer
    assert (answer.images, answer.usage, answer.size, answer.quality) == (
        *(1, COUNTED),
        *("1024x1024", "high"),
    )


@pytest.mark.parametrize("as_json", [False, True])
async def test_a_stream_in_one_piece(room: Room, as_json: bool) -> None:
    result = await stream_lands(room, partial(0) + LAST + DONE, as_json=as_json)
    assert result.held == partial(0)
    assert result.sent == partial(0) + LAST + (b"" if as_json else DONE)
    assert result.json == compact(
        {
            "data": [{"b64_json": PICTURE}],
            "quality": "high",
            "size": "1024x1024",
            "usage": USAGE,
        }
    )


async def test_a_heartbeat_leaves_at_once_and_begins_nothing(room: Room) -> None:
    result = await stream_lands(room, ALIVE, ALIVE, LAST)
    assert result.seen[:3] == [0, len(ALIVE), 2 * len(ALIVE)]
    assert (result.begun, result.sent) == ([], ALIVE + ALIVE + LAST)


async def test_of_several_pictures_only_the_newest_waits(room: Room) -> None:
    script = [partial(0), completed(usage=USAGE), partial(1), LAST]
    result = await stream_lands(room, *script, wanted=2)
    one, two, three = (len(b"".join(script[:count])) for count in (1, 2, 3))
    assert two < three
    assert result.seen[:4] == [0, one, one, three]
    assert result.held == b"".join(script[:3])
    assert result.sent == b"".join(script)
    assert result.landing.reading is not None
    assert result.landing.reading.answer.images == 2
    assert result.landing.reading.answer.usage == COUNTED + COUNTED
    assert (result.landing.json, result.landing.events) == (None, None)


@pytest.mark.parametrize(
    ("first", "second", "invalid"),
    [({}, {"usage": USAGE}, False), ({"usage": USAGE}, {}, False), ({"usage": 7}, {}, True)],
)
async def test_a_part_of_the_usage_is_none(
    room: Room, first: dict[str, Any], second: dict[str, Any], invalid: bool
) -> None:
    result = await stream_lands(room, completed(**first), completed(**second), wanted=2)
    assert result.landing.ending.answer is not None
    assert result.landing.ending.answer.usage is None
    assert result.landing.ending.invalid_usage is invalid


@pytest.mark.parametrize("end", [b"", DONE])
async def test_fewer_pictures_than_asked_for(room: Room, end: bytes) -> None:
    result = await stream_lands(room, completed(), end, wanted=3)
    assert result.landing.ending.outcome is Outcome.DELIVERED
    assert result.landing.ending.answer is not None
    assert result.landing.ending.answer.images == 1
    assert (result.held, result.sent) == (b"", completed() + end)


@pytest.mark.parametrize("end", [b"", b"\n"])
async def test_a_last_event_without_its_blank_line_gets_one(room: Room, end: bytes) -> None:
    result = await stream_lands(room, partial(0), LAST.rstrip(b"\n") + end)
    assert result.landing.ending.outcome is Outcome.DELIVERED
    assert result.sent == partial(0) + LAST.rstrip(b"\n") + end + b"\n\n"


@pytest.mark.parametrize(
    "rest",
    [
        [b": bye\n\n"],
        [DONE, LAST],
        [DONE + LAST],
        [b": bye\n\n" + DONE + ERROR],
        [frame("image_generation.summary", text="done")],
    ],
)
async def test_what_may_follow_the_last_picture(room: Room, rest: list[bytes]) -> None:
    result = await stream_lands(room, partial(0), LAST, *rest)
    kept = b"".join(rest).removesuffix(ERROR).removesuffix(LAST)
    assert result.sent == partial(0) + LAST + kept


@pytest.mark.parametrize(
    "rest",
    [
        LAST,
        partial(1),
        ERROR,
        FLAT_ERROR,
        b"event: error\ndata: {}\n\n",
        b"data: {broken\n\n",
        b"data: {}",
        b"half an ev",
    ],
)
@pytest.mark.parametrize("together", [False, True])
async def test_what_may_not_follow_the_last_picture(
    room: Room, rest: bytes, together: bool
) -> None:
    result = await stream_lands(room, *([LAST + rest] if together else [LAST, rest]))
    assert result.landing.error is None
    assert result.sent == LAST


@pytest.mark.parametrize("script", [[LAST, DONE], [LAST + DONE], [LAST + ALIVE + DONE]])
async def test_behind_done_nothing_is_waited_for(room: Room, script: list[bytes]) -> None:
    result = await stream_lands(room, *script, AssertionError("nobody asks for more"))
    assert result.sent == b"".join(script)


async def test_a_cut_behind_the_last_picture_takes_nothing_away(room: Room) -> None:
    result = await stream_lands(room, partial(0), LAST, CUT)
    assert result.landing.ending.outcome is Outcome.DELIVERED
    assert result.sent == partial(0) + LAST


WITHOUT = (
    "The upstream openai ended its stream without a picture. It may have been paid for, so this "
    "is not retried for you."
)
NOT_AN_EVENT = (
    "The upstream openai sent an event that is not JSON. The picture may have been paid for, so "
    "this is not retried for you."
)
HALF_AN_EVENT = (
    "The upstream openai was cut in the middle of an event. The picture may have been paid for, "
    "so this is not retried for you."
)


@pytest.mark.parametrize("before", [b"", ALIVE, partial(0), partial(0) + partial(1)])
@pytest.mark.parametrize(
    ("end", "text"),
    [
        ([], WITHOUT),
        ([ALIVE], WITHOUT),
        ([DONE], WITHOUT),
        ([DONE, LAST], WITHOUT),
        ([DONE + LAST], WITHOUT),
        ([frame("image_generation.completed")], WITHOUT),
        ([frame("image_generation.completed", b64_json="")], WITHOUT),
        ([b"data: <html>\n\n"], NOT_AN_EVENT),
        ([b"data: {]\n\n", LAST], NOT_AN_EVENT),
        ([LAST[:40]], HALF_AN_EVENT),
        ([LAST[:-3]], HALF_AN_EVENT),
        ([LAST[:40], CUT], str(CUT)),
    ],
)
async def test_a_stream_that_ends_without_its_picture(
    room: Room, before: bytes, end: list[bytes | Exception], text: str
) -> None:
    result = await stream_lands(room, before, *end)
    assert problem(result.landing) == (UpstreamBroken, text)
    assert result.landing.ending.outcome is Outcome.UNKNOWN
    assert result.held.startswith(before)
    assert PICTURE.encode() not in result.held.removeprefix(before)
    if result.held:
        assert result.landing.error is not None
        assert result.sent == result.held + error_event(result.landing.error)


@pytest.mark.parametrize("error", [ERROR, FLAT_ERROR])
@pytest.mark.parametrize(
    ("before", "outcome"),
    [
        ([], Outcome.REFUSED),
        ([ALIVE], Outcome.REFUSED),
        # Work was done: it is not for nothing.
        ([partial(0)], Outcome.BROKEN),
        ([completed()], Outcome.BROKEN),
    ],
)
@pytest.mark.parametrize("together", [False, True])
async def test_an_error_in_a_stream(
    room: Room, error: bytes, before: list[bytes], outcome: Outcome, together: bool
) -> None:
    script = [*before, error, LAST]
    result = await stream_lands(room, *([b"".join(script)] if together else script), wanted=2)
    kind, _ = problem(result.landing)
    assert kind is UpstreamRefused
    assert (result.landing.ending.outcome, result.landing.ending.answer) == (outcome, None)
    assert result.landing.error is not None
    assert (result.landing.error.status, result.landing.error.code) == (400, "moderation_blocked")
    # A whole picture behind which an error comes is not delivered, for it is not booked as one.
    assert result.held == b"".join(one for one in before if one != completed())


async def test_a_stream_of_several_pictures_is_no_json(room: Room) -> None:
    result = await stream_lands(room, completed(), completed(), wanted=2, as_json=True)
    kind, text = problem(result.landing)
    assert kind is UpstreamBroken
    assert "answered with a stream to a request for JSON" in text
    assert result.landing.ending.outcome is Outcome.BROKEN
    assert result.landing.ending.answer is not None
    assert result.landing.ending.answer.images == 2


STREAMS = {
    "plain": [partial(0), partial(1), LAST, DONE],
    "crlf": [part.replace(b"\n", b"\r\n") for part in (partial(0), ALIVE, LAST, DONE)],
    "heartbeats": [ALIVE, partial(0), ALIVE, LAST, ALIVE, DONE],
    "two": [partial(0), completed(), partial(1), LAST],
    "fewer": [partial(0), completed(usage=USAGE), DONE],
    "early": [partial(0), DONE, LAST],
    "extra": [partial(0), completed(), LAST, LAST, DONE],
    "error": [partial(0), ERROR, LAST],
    "refused": [ALIVE, FLAT_ERROR],
    "garbage": [partial(0), b"data: {]\n\n", LAST],
    "garbage behind": [partial(0), completed(), LAST, b"data: {]\n\n", DONE],
    "cut": [partial(0), LAST[:300]],
    "no blank line": [partial(0), completed(), LAST.rstrip(b"\n")],
    "nothing": [],
    "umlauts": [frame("x", text="Käse 🧀"), LAST],
}


@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from(sorted(STREAMS)),
    cuts=st.lists(st.integers(1, 6000), max_size=10),
    wanted=st.sampled_from([1, 2]),
    as_json=st.booleans(),
)
def test_it_makes_no_difference_where_a_stream_is_cut(
    name: str, cuts: list[int], wanted: int, as_json: bool
) -> None:
    async def story() -> None:
        room = Room(1 << 20, 0, Path(gettempdir()))
        body = b"".join(STREAMS[name])
        whole = await stream_lands(room, body, wanted=wanted, as_json=as_json)
        parts = await stream_lands(room, *split(body, cuts), wanted=wanted, as_json=as_json)
        for member in ("held", "sent", "json", "begun"):
            assert getattr(parts, member) == getattr(whole, member), member
        assert parts.landing.ending == whole.landing.ending
        assert parts.landing.upto == whole.landing.upto
        assert str(parts.landing.error) == str(whole.landing.error)
        assert (room.memory_used, room.disk_used) == (0, 0)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UpstreamRefused(400, b"{}", code="c"), Outcome.REFUSED),
        (UpstreamUnknown("?"), Outcome.UNKNOWN),
        (UpstreamBroken("?"), Outcome.UNKNOWN),
    ],
)
def test_what_an_error_proves(error: GatewayError, outcome: Outcome) -> None:
    landing = failed(error)
    assert (landing.error, landing.ending.outcome, landing.ending.answer) == (error, outcome, None)
    assert (error.evidence is Evidence.NOT_BILLED) == (outcome is Outcome.REFUSED)


# Slow readers


@dataclass
class Endless:
    """Partial pictures of 2 MiB, one at a time; ``asked`` wakes whoever waits for the next one to
    be asked for."""

    spool: Spool
    count: int
    asked: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    async def chunks(self, take: Take | None = None) -> AsyncIterator[bytes]:
        for number in range(self.count):
            self.asked.put_nowait(number)
            yield BIG
        self.asked.put_nowait(self.count)
        yield LAST

    async def aclose(self) -> None:
        return


BIG = frame("image_generation.partial_image", b64_json="A" * (2 << 20), partial_image_index=0)


@dataclass
class SlowRoom:
    """A stream that lands, its first event already in the hands of two followers."""

    spool: Spool
    upstream: Endless
    landing: asyncio.Task[Landing]
    slow: Growing
    quick: Growing

    async def asked(self) -> int:
        async with asyncio.timeout(10):
            return await self.upstream.asked.get()

    async def stands_still(self) -> None:
        """Everybody had their turn, and the upstream was not asked for more."""
        for _ in range(50):
            await asyncio.sleep(0)
        assert self.upstream.asked.empty()
        assert not self.landing.done()

    async def end(self) -> Landing:
        async with asyncio.timeout(10):
            landing = await self.landing
        for reader in (self.slow, self.quick):
            await reader.aclose()
        self.spool.close()
        return landing


async def slow_reader(tmp_path: Path, count: int) -> SlowRoom:
    spool = Spool(Room(1 << 30, 0, tmp_path))
    upstream = Endless(spool, count)
    meter = EventMeter(Operation.GENERATION, "openai")
    slow, quick = spool.follow(), spool.follow()
    await spool.write(ALIVE)
    spool.publish()
    await anext(slow)
    await anext(quick)
    # The meter sees what the spool holds, from its first byte.
    meter.feed(ALIVE)
    landing = land_events(upstream, spool, meter, 1, lambda _: None, as_json=False)
    return SlowRoom(spool, upstream, asyncio.create_task(landing), slow, quick)


async def test_a_slow_reader_pauses_the_upstream_until_it_has_caught_up(tmp_path: Path) -> None:
    case = await slow_reader(tmp_path, 4)
    assert [await case.asked() for _ in range(2)] == [0, 1]
    # Two pictures of 2 MiB and a few bytes: over the mark.
    await case.stands_still()
    assert case.spool.lag > landing.LAG_BYTES
    for _ in range(2):
        await anext(case.quick)
    await anext(case.slow)
    await anext(case.slow)
    await case.stands_still()
    # Only who asks for the next piece has taken the one before.
    following = asyncio.ensure_future(anext(case.slow))
    await case.stands_still()
    quicker = asyncio.ensure_future(anext(case.quick))
    assert [await case.asked() for _ in range(2)] == [2, 3]
    await following
    await quicker
    await case.stands_still()
    await case.slow.aclose()
    await case.quick.aclose()
    # A stream that nobody follows is never paused.
    assert await case.asked() == 4
    assert (await case.end()).ending.outcome is Outcome.DELIVERED


async def test_a_stopped_reader_does_not_hold_a_paid_picture_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing, "PAUSE_SECONDS", 0.05)
    case = await slow_reader(tmp_path, 20)
    # One pause for all of them, since nothing was taken in between.
    began = asyncio.get_running_loop().time()
    assert (await case.end()).ending.outcome is Outcome.DELIVERED
    assert asyncio.get_running_loop().time() - began >= 0.05
    assert case.spool.length > 20 * (2 << 20)


async def test_all_pauses_of_a_call_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call's deadline goes on: where no time is left for pauses, there is none."""
    monkeypatch.setattr(landing, "PAUSES_SECONDS", 0.0)
    case = await slow_reader(tmp_path, 20)
    assert (await case.end()).ending.outcome is Outcome.DELIVERED
