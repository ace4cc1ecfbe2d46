from __future__ import annotations

import pytest

from gateway.domain.tokens import image_tokens, tile_tokens

PUBLISHED = [
    # width, height, tokens at axis 16, 24, 48, 64, 96 (contract 5.3, as printed there)
    (1024, 1024, 196, 439, 1756, 3122, 7024),
    (1536, 1024, 158, 343, 1372, 2459, 5488),
    (1024, 1536, 158, 343, 1372, 2459, 5488),
    (1536, 864, 120, 280, 1078, 1917, 4312),
    (2048, 2048, 397, 892, 3568, 6343, 14272),
    (2560, 1440, 205, 478, 1843, 3276, 7370),
    (3840, 2160, 371, 865, 3336, 5930, 13342),
    (2880, 2880, 659, 1483, 5930, 10542, 23719),
]


@pytest.mark.parametrize("row", PUBLISHED)
def test_output_tokens_are_those_published(row: tuple[int, ...]) -> None:
    width, height, *published = row
    assert [image_tokens(axis, width, height) for axis in (16, 24, 48, 64, 96)] == published


@pytest.mark.parametrize("bad", [(0, 1, 1), (16, 0, 1), (16, 1, -1)])
def test_what_is_no_picture_has_no_tokens(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no picture"):
        image_tokens(*bad)


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(512, 512, 194), (513, 512, 323), (1024, 1024, 581), (1, 1, 194)],
)
def test_input_tokens_by_tiles(width: int, height: int, tokens: int) -> None:
    assert tile_tokens(width, height) == tokens
