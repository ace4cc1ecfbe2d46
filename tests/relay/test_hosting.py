"""Urls that open a picture until they expire, and the answers that have them."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.errors import NotServed, Overloaded
from gateway.domain.keys import Peppers
from gateway.relay import replay
from gateway.relay.flights import Head
from gateway.relay.hosting import HOSTED, Hosting, Links, NotHosted
from gateway.relay.skim import JsonSkimmer
from gateway.stores.blobs import DiskCache
from tests.clock import StillClock
from tests.flying import a_picture

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
OLD, NEW = b"old pepper 0123456789abcdef012345", b"new pepper 0123456789abcdef012345"
NAME = "0123456789abcdef0123456789abcdef.png"
MIB = 1024 * 1024


def links(*peppers: bytes, ttl: timedelta = HOUR) -> Links:
    current, *old = peppers or (NEW,)
    known = Peppers(current, tuple(old))
    return Links("https://images.test", ttl, lambda: known)


def query_of(url: str) -> str:
    return urlsplit(url).query


# Signatures


def test_a_url_has_a_name_an_end_and_a_signature() -> None:
    url = links().make(NAME, NOW)
    beginning, _, signature = url.rpartition("&signature=")
    expires = int((NOW + HOUR).timestamp())
    assert beginning == f"https://images.test{HOSTED}{NAME}?expires={expires}"
    assert len(bytes.fromhex(signature)) == 32


@pytest.mark.parametrize(
    ("after", "left"),
    [(0, 3600), (1, 3599), (3599, 1), (3599.5, 0), (3600, None), (3601, None), (10**9, None)],
)
def test_a_url_opens_until_it_expires(after: float, left: int | None) -> None:
    query = query_of(links().make(NAME, NOW))
    assert links().left_seconds(NAME, query, NOW + timedelta(seconds=after)) == left


def forged() -> dict[str, tuple[str, str]]:
    query = query_of(links().make(NAME, NOW))
    expires, signature = (part.partition("=")[2] for part in query.split("&"))
    last = "0" if signature[-1] != "0" else "1"
    other = query_of(links().make("f" + NAME[1:], NOW))
    return {
        "nothing": (NAME, ""),
        "no signature": (NAME, f"expires={expires}"),
        "no end": (NAME, f"signature={signature}"),
        "an empty signature": (NAME, f"expires={expires}&signature="),
        "another name": ("f" + NAME[1:], query),
        "another ending": (NAME.replace("png", "svg"), query),
        "another name's query": (NAME, other),
        "a later end": (NAME, f"expires={int(expires) + 1}&signature={signature}"),
        "the same end, written otherwise": (NAME, f"expires=0{expires}&signature={signature}"),
        "no number": (NAME, f"expires=x{expires}&signature={signature}"),
        "a digit changed": (NAME, f"expires={expires}&signature={signature[:-1]}{last}"),
        "upper case": (NAME, f"expires={expires}&signature={signature.upper()}"),
        "two ends": (NAME, f"expires={expires}&{query}"),
        "two signatures": (NAME, f"{query}&signature={signature}"),
        "not ASCII": (NAME, f"expires={expires}&signature=%F0%9F%8C%8A\u00e9"),
        "too many members": (NAME, query + 20 * "&a=b"),
        "a name that is a path": ("../../gateway.db", query),
        "no name": ("", query),
    }


@pytest.mark.parametrize(("name", "query"), forged().values(), ids=forged().keys())
def test_a_forged_url_opens_nothing(name: str, query: str) -> None:
    assert links().left_seconds(name, query, NOW) is None


def test_what_others_add_to_a_url_does_no_harm() -> None:
    assert links().left_seconds(NAME, f"{query_of(links().make(NAME, NOW))}&utm=a", NOW) == 3600


def test_an_old_pepper_opens_what_it_signed_and_a_lost_one_does_not() -> None:
    before = query_of(links(OLD).make(NAME, NOW))
    assert links(NEW, OLD).left_seconds(NAME, before, NOW) == 3600
    assert links(NEW).left_seconds(NAME, before, NOW) is None
    after = query_of(links(NEW, OLD).make(NAME, NOW))
    assert after == query_of(links(NEW).make(NAME, NOW))


# Answers


PICTURE = a_picture(30_000)
OTHER = a_picture(60_000)


def coded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


class Told:
    """What is counted, and whether the source was closed."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def head_of(document: Any, told: Told, size: int = 1000) -> Head:
    text = document if isinstance(document, bytes) else json.dumps(document, indent=1).encode()

    async def body() -> AsyncIterator[bytes]:
        for at in range(0, len(text), size):
            yield text[at : at + size]

    return Head(200, (("x-request-id", "req_0"),), len(text), body, told.close)


def hosting(folder: Path, told: Told, **options: Any) -> tuple[Hosting, DiskCache]:
    clock = StillClock(NOW)
    store = DiskCache(folder, clock, **{"max_bytes": 100 * MIB, **options})
    return Hosting(store, links(), clock, told.outcomes.append), store


async def read(head: Head) -> Any:
    content = b"".join([chunk async for chunk in head.body()])
    assert head.length == len(content)
    return json.loads(content)


async def fetched(hosting: Hosting, url: str) -> tuple[str, bytes]:
    parts = urlsplit(url)
    found = await hosting.find(parts.path.removeprefix(HOSTED), parts.query)
    content = b"".join([chunk async for chunk in found.chunks()])
    assert len(content) == found.size_bytes
    return found.media_type, content


@pytest.mark.parametrize("size", [1, 7, 1000, 65_536, 10**7])
async def test_each_picture_becomes_a_url_and_all_else_stays(tmp_path: Path, size: int) -> None:
    told = Told()
    small = b"GIF89a\x01\x00\x01\x00\x80\x00\x00" + bytes(20)
    document = {
        "created": 1,
        "data": [
            {"b64_json": coded(PICTURE), "revised_prompt": "A \u2603 lighthouse"},
            {"b64_json": "data:image/png;base64," + coded(OTHER)},
            {"b64_json": coded(small), "url": None},
            {"b64_json": "data:image/gif;base64," + coded(small)},
            {"url": "https://elsewhere.test/one.png"},
            {"b64_json": coded(b"what is this?" * 2000)},
        ],
        "usage": {"total_tokens": 3, "share": 0.25},
        "size": "1024x1024",
    }
    if size == 1:
        document["data"] = document["data"][2:5]  # type: ignore[index]
    puts, _ = hosting(tmp_path, told)
    found = await read(await puts.hosted(head_of(document, told, size), "growth"))
    wanted = json.loads(json.dumps(document))
    kinds = []
    for before, after in zip(wanted["data"], found["data"], strict=True):
        if "b64_json" not in before:
            assert after == before
            continue
        content = base64.b64decode(before.pop("b64_json").rpartition(",")[2])
        media_type, came = await fetched(puts, after["url"])
        assert came == content
        kinds.append((media_type, urlsplit(after["url"]).path.rpartition(".")[2]))
        before.pop("url", None)
        assert {**before, "url": after["url"]} == after
        before["url"] = after["url"]
    assert found == wanted
    gif = [("image/gif", "gif"), ("image/gif", "gif")]
    png, unknown = ("image/png", "png"), ("application/octet-stream", "bin")
    assert kinds == (gif if size == 1 else [png, png, *gif, unknown])
    assert told.outcomes == ["stored"] * len(kinds)
    assert told.closed == 1


async def test_long_texts_beside_a_picture_are_spliced_from_their_source(tmp_path: Path) -> None:
    told = Told()
    text = 'A "long" \u2603 text\n' * 5000
    document = {"before": text, "data": [{"b64_json": coded(PICTURE), "x": text}], "after": text}
    puts, _ = hosting(tmp_path, told)
    head = await puts.hosted(head_of(document, told), "growth")
    assert told.closed == 0
    found = await read(head)
    assert (await fetched(puts, found["data"][0].pop("url"))) == ("image/png", PICTURE)
    assert found == {"before": text, "data": [{"x": text}], "after": text}
    head.close()
    assert told.closed == 1


async def test_an_answer_that_was_handed_over_is_stored_no_second_time(tmp_path: Path) -> None:
    told, clock = Told(), StillClock(NOW)
    store = DiskCache(tmp_path, clock, max_bytes=100 * MIB)
    puts = Hosting(store, links(), clock, told.outcomes.append)
    document = {"data": [{"b64_json": coded(PICTURE)}, {"b64_json": coded(OTHER)}]}

    async def urls(team: str = "growth") -> list[str]:
        found = await read(await puts.hosted(head_of(document, told), team))
        return [one["url"] for one in found["data"]]

    first = await urls()
    assert len(set(first)) == 2
    assert told.outcomes == ["stored"] * 2
    clock.advance(1800)
    last = await urls()
    assert told.outcomes[2:] == ["reused"] * 2
    assert [urlsplit(url).path for url in first] == [urlsplit(url).path for url in last]
    assert len(store) == 2
    other = await urls("design")
    assert not {urlsplit(url).path for url in other} & {urlsplit(url).path for url in first}
    # Each url opens for all of its time, whenever its picture was stored.
    clock.advance(3599)
    for url, picture in zip(last, (PICTURE, OTHER), strict=True):
        assert (await fetched(puts, url))[1] == picture
    clock.advance(1)
    with pytest.raises(NotServed):
        await fetched(puts, last[0])


@pytest.mark.parametrize(("after", "outcome"), [(1799, "reused"), (1801, "stored")])
async def test_what_is_not_kept_for_long_enough_is_stored_anew(
    tmp_path: Path, after: float, outcome: str
) -> None:
    told, clock = Told(), StillClock(NOW)
    store = DiskCache(tmp_path, clock, max_bytes=100 * MIB)
    puts = Hosting(store, links(), clock, told.outcomes.append)
    document = {"data": [{"b64_json": coded(PICTURE)}]}
    await puts.hosted(head_of(document, told), "growth")
    clock.advance(after)
    found = await read(await puts.hosted(head_of(document, told), "growth"))
    assert told.outcomes == ["stored", outcome]
    clock.advance(3599)
    assert (await fetched(puts, found["data"][0]["url"]))[1] == PICTURE


def broken() -> dict[str, bytes]:
    picture = coded(PICTURE)
    return {
        "not JSON": b"<html>",
        "no data": b'{"created": 1}',
        "a list": b"[]",
        "data that is none": b'{"data": {"b64_json": "aaaa"}}',
        "not base64": json.dumps({"data": [{"b64_json": picture[:-1] + "!"}]}).encode(),
        "short, and not base64": b'{"data": [{"b64_json": "a"}]}',
        "not a text": b'{"data": [{"b64_json": 5}]}',
        "an escape": json.dumps({"data": [{"b64_json": picture}]}).replace("/", "\\/").encode(),
        "one good, one bad": json.dumps(
            {"data": [{"b64_json": picture}, {"b64_json": picture + "="}]}
        ).encode(),
        "a name twice": f'{{"a": "{picture}", "b": "{picture}", "data": [], '
        f'"a": "{picture}"}}'.encode(),
    }


@pytest.mark.parametrize("text", broken().values(), ids=broken().keys())
async def test_what_cannot_be_a_url_stays_as_it_was(tmp_path: Path, text: bytes) -> None:
    told = Told()
    puts, store = hosting(tmp_path, told)
    head = head_of(text, told)
    with pytest.raises(NotHosted):
        await puts.hosted(head, "growth")
    assert told.closed == 0
    assert b"".join([chunk async for chunk in head.body()]) == text
    assert told.outcomes[-1] == "failed"
    assert (len(store), [path for path in tmp_path.rglob("*") if path.is_file()]) == (0, [])


def full(folder: Path) -> dict[str, Any]:
    return {"max_bytes": len(PICTURE) - 1}


def read_only(folder: Path) -> dict[str, Any]:
    (folder / "hosted").write_text("a file where the folder should be")
    return {}


@pytest.mark.parametrize("spoil", [full, read_only])
async def test_a_store_that_does_not_take_it(
    tmp_path: Path, spoil: Callable[[Path], dict[str, Any]]
) -> None:
    told = Told()
    puts, _ = hosting(tmp_path / "hosted", told, **spoil(tmp_path))
    with pytest.raises(NotHosted):
        await puts.hosted(head_of({"data": [{"b64_json": coded(PICTURE)}]}, told), "growth")
    assert told.outcomes == ["failed"]


async def test_a_picture_that_is_gone_and_one_that_cannot_be_looked_for(tmp_path: Path) -> None:
    told = Told()
    puts, store = hosting(tmp_path / "hosted", told)
    head = await puts.hosted(head_of({"data": [{"b64_json": coded(PICTURE)}]}, told), "growth")
    url = urlsplit((await read(head))["data"][0]["url"])
    name = url.path.removeprefix(HOSTED)
    await store.delete(name.partition(".")[0])
    with pytest.raises(NotServed) as gone:
        await puts.find(name, url.query)
    with pytest.raises(NotServed) as forged:
        await puts.find(name, url.query[:-1])
    assert gone.value.content == forged.value.content
    for path in sorted((tmp_path / "hosted").rglob("*"), reverse=True):
        path.rmdir()
    (tmp_path / "hosted").rmdir()
    (tmp_path / "hosted").write_text("")
    with pytest.raises(Overloaded) as away:
        await puts.find(name, url.query)
    assert away.value.should_retry is True


async def test_a_large_picture_is_never_whole_in_memory(tmp_path: Path) -> None:
    told = Told()
    puts, _ = hosting(tmp_path, told)
    block = bytes(range(256)) * 3 * 64  # 48 KiB
    piece, count = base64.b64encode(block), 20 * MIB // len(block)
    before, after = b'{"created": 1, "data": [{"b64_json": "', b'"}], "size": "1024x1024"}'

    async def body() -> AsyncIterator[bytes]:
        yield before
        for _ in range(count):
            yield piece
        yield after

    head = Head(200, (), len(before) + count * len(piece) + len(after), body, told.close)
    tracemalloc.start()
    try:
        url = urlsplit((await read(await puts.hosted(head, "growth")))["data"][0]["url"])
        found = await puts.find(url.path.removeprefix(HOSTED), url.query)
        size = 0
        async for chunk in found.chunks():
            size += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == found.size_bytes == count * len(block)
    assert peak < 4 * MIB


# A skimmed value, written again


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner,
                                                                max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(values, st.integers(1, 40), st.booleans())
def test_a_document_written_again_is_the_same(value: Any, keep: int, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    skimmer = JsonSkimmer(keep_bytes=max(keep, 32), lenient=True)
    skimmer.feed(text)
    form = replay.written(skimmer.close().value)
    made = b"".join(
        text[part.start : part.end] if not isinstance(part, bytes) else part for part in form
    )
    assert json.loads(made) == value
    assert replay.length(form) == len(made)
