"""What the GPT image models take, by generation (contract 1.2). One table for all who judge a call
or mend it; a model of no known generation is held to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

FIXED_SIZES = ((1024, 1024), (1536, 1024), (1024, 1536))
"""The sizes that every generation serves."""
QUALITIES = ("low", "medium", "high", "auto")
MORE_QUALITIES = ("low", "medium", "high", "xhigh", "max", "auto")
_STEP, _MAX_RATIO, _MAX_EDGE = 16, 3, 3840
_MIN_PIXELS, _MAX_PIXELS = 655_360, 8_294_400
_GPT_IMAGE = ("gpt-image-", "chatgpt-image-")


@dataclass(frozen=True, slots=True)
class Family:
    """What the models of one generation take. ``sizes`` empty: any that the area rules allow."""

    sizes: tuple[tuple[int, int], ...] = ()
    qualities: tuple[str, ...] = MORE_QUALITIES
    fidelities: tuple[str, ...] = ("high", "low")
    markup: bool = True

    def size_problem(self, width: int, height: int) -> str:
        """Why a size is not served, in pixels; empty where it is."""
        if self.sizes:
            return "" if (width, height) in self.sizes else "It takes three sizes and auto."
        return _area_problem(width, height)

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """A size that is served, of about the shape and area that was asked for."""
        if not self.sizes:
            return _nearest(width, height)
        return min(
            self.sizes,
            key=lambda size: (
                abs(size[0] * height - size[1] * width) / (size[1] * height),
                abs(size[0] - width),
            ),
        )


_FAMILIES: tuple[tuple[str, Family], ...] = (
    ("gpt-image-1-mini", Family(FIXED_SIZES, QUALITIES, ("low",), markup=False)),
    ("gpt-image-1", Family(FIXED_SIZES, QUALITIES, markup=False)),
    ("chatgpt-image", Family(FIXED_SIZES, QUALITIES, markup=False)),
    ("gpt-image-2.", Family()),
    ("gpt-image-2", Family((), QUALITIES, (), markup=False)),
)
"""By the beginning of a model's name, the first that fits."""


@lru_cache(maxsize=256)
def family_of(model: str) -> Family | None:
    """By a model's name at its provider."""
    return next((family for start, family in _FAMILIES if model.startswith(start)), None)


def is_gpt_image(model: str) -> bool:
    """Whether a model, by its name at its provider, is one of OpenAI's that always answer with
    base64 and know no ``style``."""
    return model.startswith(_GPT_IMAGE)


def _area_problem(width: int, height: int) -> str:
    """Why gpt-image-2 and later refuse a size, empty where they take it."""
    if width % _STEP or height % _STEP:
        return f"Both sides must be divisible by {_STEP}."
    if max(width, height) > _MAX_RATIO * min(width, height):
        return f"One side may be at most {_MAX_RATIO} times the other."
    if max(width, height) > _MAX_EDGE:
        return f"A side may have at most {_MAX_EDGE} pixels."
    if not _MIN_PIXELS <= width * height <= _MAX_PIXELS:
        return f"The picture must have from {_MIN_PIXELS:,} to {_MAX_PIXELS:,} pixels."
    return ""


def _nearest(width: int, height: int) -> tuple[int, int]:
    """A size that is served, of about the shape and area that was asked for."""
    ratio = min(max(width / height, 1 / _MAX_RATIO), _MAX_RATIO)
    area = min(max(width * height, _MIN_PIXELS), _MAX_PIXELS)
    ideal = min((area * ratio) ** 0.5, _MAX_EDGE, _MAX_EDGE * ratio)
    first = int(ideal / ratio) // _STEP * _STEP, int(ideal) // _STEP * _STEP
    around = [
        (first[1] + right * _STEP, first[0] + down * _STEP)
        for right in range(-2, 4)
        for down in range(-2, 4)
    ]
    served = [size for size in around if not _area_problem(*size)]
    return min(
        served,
        key=lambda size: abs(size[0] - ideal) + abs(size[1] - ideal / ratio),
        default=(1024, 1024),
    )
