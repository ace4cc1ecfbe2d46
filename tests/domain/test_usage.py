"""The usage of an answer, as OpenAI and others write it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.call import Operation, SvgUsage, Usage
from gateway.domain.usage import InvalidUsage, read_usage

GENERATION, EDIT = Operation.GENERATION, Operation.EDIT

RECORDED = {
    "input_tokens": 1474,
    "input_tokens_details": {"image_tokens": 1457, "text_tokens": 17},
    "output_tokens": 1372,
    "output_tokens_details": {"image_tokens": 1372, "text_tokens": 0},
    "total_tokens": 2846,
}
STREAMED = {
    "input_tokens": 50,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 50},
    "output_tokens": 1756,
    "total_tokens": 1806,
}
BARE = {"input_tokens": 100, "output_tokens": 10}
MIXED = {**BARE, "input_tokens_details": {"text_tokens": 30, "image_tokens": 70}}


@pytest.mark.parametrize(
    ("raw", "operation", "usage"),
    [
        (RECORDED, EDIT, Usage(text_in=17, image_in=1457, image_out=1372)),
        (STREAMED, GENERATION, Usage(text_in=50, image_out=1756)),
        (BARE, GENERATION, Usage(text_in=100, image_out=10)),
        (BARE, EDIT, Usage(image_in=100, image_out=10)),
        ({**BARE, "input_tokens_details": None}, EDIT, Usage(image_in=100, image_out=10)),
        ({**BARE, "input_tokens_details": {}}, EDIT, Usage(image_in=100, image_out=10)),
        (
            {**BARE, "output_tokens_details": {"text_tokens": 4, "image_tokens": 6}},
            GENERATION,
            Usage(text_in=100, text_out=4, image_out=6),
        ),
        (
            {**BARE, "output_tokens_details": {"image_tokens": 6}},
            GENERATION,
            Usage(text_in=100, text_out=4, image_out=6),
        ),
        (
            {**BARE, "input_tokens_details": {"text_tokens": 30}},
            GENERATION,
            Usage(text_in=30, image_in=70, image_out=10),
        ),
        # Cached: the three places, and without details text first.
        (
            {**MIXED, "cached_tokens": 20},
            EDIT,
            Usage(text_in=30, image_in=70, cached_text_in=20, image_out=10),
        ),
        (
            {**MIXED, "cached_tokens": 50},
            EDIT,
            Usage(30, 70, cached_text_in=30, cached_image_in=20, image_out=10),
        ),
        (
            {
                **MIXED,
                "cached_tokens": 50,
                "cached_tokens_details": {"cached_image_tokens": 45, "cached_text_tokens": 5},
            },
            EDIT,
            Usage(30, 70, cached_text_in=5, cached_image_in=45, image_out=10),
        ),
        (
            {
                **MIXED,
                "cached_tokens": 50,
                "cached_tokens_details": {"cached_image_tokens": 45},
            },
            EDIT,
            Usage(30, 70, cached_text_in=5, cached_image_in=45, image_out=10),
        ),
        (
            {**MIXED, "cached_tokens_details": {"cached_image_tokens": 45}},
            EDIT,
            Usage(30, 70, cached_image_in=45, image_out=10),
        ),
        (
            {
                **BARE,
                "input_tokens_details": {
                    "text_tokens": 30,
                    "image_tokens": 70,
                    "cached_tokens": 10,
                },
            },
            EDIT,
            Usage(30, 70, cached_text_in=10, image_out=10),
        ),
        ({**BARE, "something_new": "x"}, GENERATION, Usage(text_in=100, image_out=10)),
        # No usage at all.
        (None, GENERATION, None),
        ({}, GENERATION, None),
        ({"input_tokens": None, "output_tokens": None}, GENERATION, None),
        (
            {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11, "image_count": 1},
            GENERATION,
            None,
        ),
    ],
)
def test_what_is_read(raw: object, operation: Operation, usage: Usage | None) -> None:
    assert read_usage(raw, None, operation) == usage


@pytest.mark.parametrize(
    "raw",
    [
        "1474",
        [1],
        7,
        {"input_tokens": 5},
        {"output_tokens": 5},
        {**BARE, "output_tokens": -1},
        {**BARE, "output_tokens": "10"},
        {**BARE, "output_tokens": True},
        {**BARE, "output_tokens": 10.0},
        {**BARE, "output_tokens": 10**18},
        {**BARE, "output_tokens": 0},
        {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
        {**BARE, "total_tokens": 111},
        {**BARE, "total_tokens": "110"},
        {**BARE, "input_tokens_details": {"text_tokens": 30, "image_tokens": 71}},
        {**BARE, "input_tokens_details": {"text_tokens": 101}},
        {**BARE, "input_tokens_details": {"text_tokens": -1, "image_tokens": 101}},
        {**BARE, "input_tokens_details": [30, 70]},
        {**BARE, "output_tokens_details": {"text_tokens": 1, "image_tokens": 1}},
        {**MIXED, "cached_tokens": 101},
        {**MIXED, "cached_tokens": -1},
        {**MIXED, "cached_tokens_details": {"cached_text_tokens": 31}},
        {**MIXED, "cached_tokens": 5, "cached_tokens_details": {"cached_text_tokens": 6}},
        {**BARE, "cached_tokens": 5, "input_tokens_details": {"cached_tokens": 6}},
    ],
)
def test_what_cannot_be_true_is_refused(raw: object) -> None:
    with pytest.raises(InvalidUsage):
        read_usage(raw, None, GENERATION)


AUTHOR = {"model": "gpt-6", "input_tokens": 40, "output_tokens": 900, "reasoning_tokens": 300}


@pytest.mark.parametrize(
    ("raw", "svg"),
    [
        (AUTHOR, SvgUsage("gpt-6", 40, 900)),
        ({**AUTHOR, "total_tokens": 940}, SvgUsage("gpt-6", 40, 900)),
        ({**AUTHOR, "total_tokens": 1240}, SvgUsage("gpt-6", 40, 1200)),
    ],
)
def test_the_author_of_an_svg_has_a_bill_of_its_own(raw: object, svg: SvgUsage) -> None:
    usage = read_usage(BARE, raw, GENERATION)
    assert usage is not None
    assert usage.svg == svg


def test_an_svg_may_need_no_reference_picture() -> None:
    zero = {"input_tokens": 0, "output_tokens": 0}
    assert read_usage(zero, AUTHOR, GENERATION) == Usage(svg=SvgUsage("gpt-6", 40, 900))


@pytest.mark.parametrize(
    "raw",
    [
        "gpt-6",
        {**AUTHOR, "model": ""},
        {**AUTHOR, "model": None},
        {**AUTHOR, "output_tokens": None},
        {**AUTHOR, "output_tokens": 0, "reasoning_tokens": 0},
        {**AUTHOR, "input_tokens": -1},
        {**AUTHOR, "total_tokens": 1},
    ],
)
def test_an_authors_bill_that_cannot_be_true_is_refused(raw: object) -> None:
    with pytest.raises(InvalidUsage):
        read_usage(BARE, raw, GENERATION)


COUNTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**10),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
)
DETAILS = st.one_of(
    COUNTS,
    st.dictionaries(
        st.sampled_from(
            [
                "text_tokens",
                "image_tokens",
                "cached_tokens",
                "cached_text_tokens",
                "cached_image_tokens",
            ]
        ),
        COUNTS,
    ),
)


@settings(deadline=None)
@given(
    raw=st.dictionaries(
        st.sampled_from(
            [
                "input_tokens",
                "output_tokens",
                "total_tokens",
                "cached_tokens",
                "input_tokens_details",
                "output_tokens_details",
                "cached_tokens_details",
            ]
        ),
        DETAILS,
    ),
    operation=st.sampled_from(Operation),
)
def test_whatever_comes_is_a_whole_usage_or_refused(
    raw: dict[str, object], operation: Operation
) -> None:
    try:
        usage = read_usage(raw, None, operation)
    except InvalidUsage:
        return
    if usage is None:
        assert raw.get("input_tokens") is None
        assert raw.get("output_tokens") is None
        return
    assert usage.text_in + usage.image_in == raw["input_tokens"]
    assert usage.text_out + usage.image_out == raw["output_tokens"]
    assert 0 <= usage.cached_text_in <= usage.text_in
    assert 0 <= usage.cached_image_in <= usage.image_in
