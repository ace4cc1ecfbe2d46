"""How many tokens a picture is: the two published rules, as arithmetic without names or prices.

Which axis a model has at which quality is data and stands in ``config/prices.yaml``.
"""

from __future__ import annotations

from functools import lru_cache

TILE_PIXELS = 512
BASE_INPUT_TOKENS = 65
TOKENS_PER_TILE = 129


@lru_cache(maxsize=256)
def image_tokens(axis: int, width: int, height: int) -> int:
    """Output tokens of one picture by gpt-image-2 and later (contract 5.3), exact.

    ``axis`` is the number of tokens along the longer edge, by model and quality: 16, 24, 48, 64
    or 96. ``width`` and ``height`` are in pixels. Raises ``ValueError`` for what is no picture.
    """
    if axis < 1 or width < 1 or height < 1:
        raise ValueError(f"no picture has axis {axis} and {width}x{height} pixels")
    longer, shorter = max(width, height), min(width, height)
    # round(axis * shorter / longer), halves up, in integers: floats would differ at the edges.
    across = (2 * axis * shorter + longer) // (2 * longer)
    return -(-axis * across * (2_000_000 + width * height) // 4_000_000)


def tile_tokens(width: int, height: int) -> int:
    """Input tokens of one picture given to gpt-image-1.x at low fidelity (money.md 7): 65, and
    129 for each tile of 512 pixels. High fidelity adds a constant to this."""
    if width < 1 or height < 1:
        raise ValueError(f"no picture has {width}x{height} pixels")
    tiles = -(-width // TILE_PIXELS) * -(-height // TILE_PIXELS)
    return BASE_INPUT_TOKENS + TOKENS_PER_TILE * tiles
