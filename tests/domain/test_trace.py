"""W3C Trace Context: which headers name a span, and which do not."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.trace import MAX_STATE_CHARS, TraceContext, begin, of_stranger, parse

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NOW = datetime(2026, 11, 22, tzinfo=UTC)
SEEN = TraceContext(TRACE, SPAN, sampled=True)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"00-{TRACE}-{SPAN}-01", SEEN),
        (f"00-{TRACE}-{SPAN}-00", replace(SEEN, sampled=False)),
        (f"00-{TRACE}-{SPAN}-03", replace(SEEN, random=True)),
        (f"00-{TRACE}-{SPAN}-02", replace(SEEN, sampled=False, random=True)),
        # Flags that have no meaning yet are ignored.
        (f"00-{TRACE}-{SPAN}-ff", replace(SEEN, random=True)),
        (f"00-{TRACE}-{SPAN}-08", replace(SEEN, sampled=False)),
        # Of a later version that much is read.
        (f"01-{TRACE}-{SPAN}-01", SEEN),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-then", SEEN),
        (f"fe-{TRACE}-{SPAN}-01-", SEEN),
    ],
)
def test_a_header_names_a_span(header: str, expected: TraceContext) -> None:
    assert parse(header) == expected


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-001",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01.more",
        f"01-{TRACE}-{SPAN}-01more",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"000-{TRACE}-{SPAN}-01",
        f"0x-{TRACE}-{SPAN}-01",
        f"FE-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{TRACE}-{SPAN}-0A",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE}-{SPAN[1:]}-01",
        f"00-{TRACE}-{SPAN}0-01",
        f"00-{TRACE[:-1]}.-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0.",
        f"00_{TRACE}_{SPAN}_01",
        f" 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        # Two headers of the name, joined as HTTP joins them.
        f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01,01-{TRACE}-{SPAN}-01",
        "00-" + "٤" * 32 + f"-{SPAN}-01",
    ],
)
def test_anything_else_names_none(header: str) -> None:
    assert parse(header, "vendor=1") is None


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", ""),
        ("foo=1", "foo=1"),
        ("foo=1,bar=2", "foo=1,bar=2"),
        ("foo=1 \t, \tbar=2", "foo=1,bar=2"),
        ("foo=1,", "foo=1"),
        ("foo=1,,, ,bar=2", "foo=1,bar=2"),
        ("foo@bar=1,t1@sys/x*=a=b", ""),
        ("foo@bar=1,t1@sys/x*=ab", "foo@bar=1,t1@sys/x*=ab"),
        ("0a=1", "0a=1"),
        ("a=b c", "a=b c"),
        ("a= b", "a= b"),
        (f"{'a' * 256}=1", f"{'a' * 256}=1"),
        (f"a={'b' * 256}", f"a={'b' * 256}"),
        (",".join(f"k{n}={n}" for n in range(32)), ",".join(f"k{n}={n}" for n in range(32))),
        # Not valid: dropped whole.
        ("foo", ""),
        ("foo=", ""),
        ("=1", ""),
        ("foo=1,bar", ""),
        ("Foo=1", ""),
        ("foo =1", ""),
        ("föö=1", ""),
        ("foo=\x01", ""),
        ("foo=é", ""),
        ("foo=1,foo=2", ""),
        ("foo=1;bar=2", ""),
        (f"{'a' * 257}=1", ""),
        (f"a={'b' * 257}", ""),
        (",".join(f"k{n}={n}" for n in range(33)), ""),
        ("a=1," * 100_000, ""),
        # Too long: the long ones go first, then the last.
        (f"a=1,long={'x' * 200},b=2,longer={'y' * 250},c=3,more={'z' * 120}",
         f"a=1,b=2,c=3,more={'z' * 120}"),
        (",".join(f"k{n}={'v' * 97}" for n in range(9)),
         ",".join(f"k{n}={'v' * 97}" for n in range(5))),
    ],
)  # fmt: skip
def test_the_state_of_other_vendors(header: str, expected: str) -> None:
    found = parse(f"00-{TRACE}-{SPAN}-01", header)
    assert found is not None
    assert found.state == expected
    again = parse(found.traceparent, found.state)
    assert again == found


@given(st.text(max_size=80), st.text(max_size=1200))
def test_no_header_breaks_it(parent: str, state: str) -> None:
    assert parse(parent, state) is None or parent[:2].isalnum()
    found = parse(f"00-{TRACE}-{SPAN}-01", state)
    assert found is not None
    assert len(found.state) <= MAX_STATE_CHARS
    assert found.state.isascii()


def test_what_is_said_onward() -> None:
    assert SEEN.headers == (("traceparent", f"00-{TRACE}-{SPAN}-01"),)
    known = replace(SEEN, sampled=False, random=True, state="a=1")
    assert known.headers == (("traceparent", f"00-{TRACE}-{SPAN}-02"),)


def test_a_request_is_a_child_of_its_client() -> None:
    client = replace(SEEN, state="a=1")
    for sampled in (True, False):
        trace = begin(replace(client, sampled=sampled), 0.5, NOW)
        assert (trace.parent, trace.began) == (SPAN, NOW)
        assert trace.context.span_id != SPAN
        assert replace(trace.context, span_id=SPAN) == replace(client, sampled=sampled)
        assert parse(trace.context.traceparent, "a=1") == trace.context


def test_a_trace_that_begins_here() -> None:
    first, second = begin(None, 1, NOW), begin(None, 1, NOW)
    assert first.parent == ""
    assert first.context.sampled
    assert first.context.random
    assert parse(first.context.traceparent) == first.context
    assert first.context.trace_id != second.context.trace_id
    assert not any(begin(None, 0, NOW).context.sampled for _ in range(100))


def test_a_share_is_sampled_by_the_id_of_the_trace() -> None:
    made = [begin(None, 0.25, NOW).context for _ in range(2000)]
    for one in made:
        assert one.sampled == (int(one.trace_id[16:], 16) < 2**62)
    # 500 on average; less likely beyond these bounds than 1 in 10**12.
    assert 350 < sum(one.sampled for one in made) < 650


def test_a_stranger_does_not_decide() -> None:
    low = replace(SEEN, trace_id="0" * 31 + "1", sampled=True)
    trace = begin(low, 1, NOW)
    assert not any(of_stranger(trace, 0).context.sampled for _ in range(100))
    assert of_stranger(begin(replace(SEEN, sampled=False), 0, NOW), 1).context.sampled
    assert of_stranger(trace, 1) == trace
    # 500 on average; less likely beyond these bounds than 1 in 10**12.
    assert 350 < sum(of_stranger(trace, 0.25).context.sampled for _ in range(2000)) < 650
    begun = begin(None, 0, NOW)
    assert of_stranger(begun, 1) is begun
