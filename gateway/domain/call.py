"""What is asked: one call, read and canonical, without its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Operation(StrEnum):
    """The relayed endpoints. The value is the label of metrics and of the ledger."""

    GENERATION = "generation"
    EDIT = "edit"

    @property
    def path(self) -> str:
        """Below ``/v1`` of this gateway and of an upstream that speaks OpenAI."""
        return {Operation.GENERATION: "/images/generations", Operation.EDIT: "/images/edits"}[self]


class Inquiry(StrEnum):
    """What can be asked about an operation. Nothing is booked under these names."""

    ESTIMATE = "estimate"

    @property
    def path(self) -> str:
        """Below ``/v1``."""
        return "/images/estimate"


class Span(NamedTuple):
    """Bytes ``[start, end)`` of a request's body."""

    start: int
    end: int


class Edit(NamedTuple):
    """Replace the bytes of ``span`` by ``content``; everything else stays as it came."""

    span: Span
    content: bytes


class Change(NamedTuple):
    """A field that is sent on otherwise than it came. ``before`` None: it was not said;
    ``after`` None: it is left out."""

    name: str
    before: Json
    after: Json


class Reference(NamedTuple):
    """An id of something at an upstream, named in a request. ``kind`` is an ``OwnedKind``'s value,
    ``param`` how an error names its place (``images[0].file_id``)."""

    kind: str
    id: str
    param: str


class AnswerAs(StrEnum):
    """How the pictures of an answer are handed over: in it, or as urls of this gateway."""

    B64 = "b64_json"
    URL = "url"


class Encoding(StrEnum):
    """How the fields of a request's body are written."""

    JSON = "json"
    MULTIPART = "multipart"


@dataclass(frozen=True, slots=True)
class InputImage:
    """One picture that came with the request, by what is known without decoding it.

    ``role`` is ``image``, ``mask`` or ``markup`` (or the field's own name, where it is none of
    these). ``digest`` is the SHA-256 of the file's bytes, or of the text of a data URL or url.
    ``width`` and ``height`` are in pixels, 0 where the header was not understood.
    """

    role: str
    digest: str
    size_bytes: int
    media_type: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One request for pictures.

    ``parameters`` holds every field but ``model`` and the pictures, nulls dropped, as Python
    values (multipart text fields that contract 1.2 types as numbers or booleans are converted).
    The typed members beside it are those that money and the relay need, with their defaults.
    ``n`` is 1-10, ``partial_images`` 0-3, ``frame_count`` 2-16 (1 where it is not a GIF).
    ``model_span`` is where the model's name lies in the body, quotes excluded. ``value_spans`` is
    where the values of size, quality and stream lie, as far as they were sent: quotes included in
    JSON.
    ``boundary`` is that of a form, without its dashes.
    ``unknown`` names the parameters that the contract does not list: they are forwarded.
    ``pinned`` are sizes and qualities that the client left open and the gateway fills in: what
    the body does not say yet.
    """

    operation: Operation
    encoding: Encoding
    content_type: str
    model: str
    model_span: Span
    prompt_bytes: int
    parameters: Mapping[str, Json]
    inputs: tuple[InputImage, ...] = ()
    n: int = 1
    size: str = "auto"
    quality: str = "auto"
    stream: bool = False
    partial_images: int = 0
    output_format: str = "png"
    frame_count: int = 1
    unknown: frozenset[str] = frozenset()
    body_bytes: int = 0
    value_spans: Mapping[str, Span] = field(default_factory=dict)
    boundary: bytes = b""
    pinned: Mapping[str, str] = field(default_factory=dict)
    references: tuple[Reference, ...] = ()
    """Ids of files and responses at an upstream: whose they are is looked up before the plan."""
    answer_as: AnswerAs = AnswerAs.B64
    """``URL``: asked for with `response_format=url`, which no upstream is told of."""


@dataclass(frozen=True, slots=True)
class SvgUsage:
    """The second model's bill inside an SVG answer (contract 1.3), in tokens."""

    model: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, by direction and modality. Cached tokens are a part of their input, not beside it:
    ``cached_text_in <= text_in``."""

    text_in: int = 0
    image_in: int = 0
    cached_text_in: int = 0
    cached_image_in: int = 0
    text_out: int = 0
    image_out: int = 0
    svg: SvgUsage | None = None

    def __add__(self, other: Usage) -> Usage:
        """Both together. Of two SVG bills the later stands: one author writes one document."""
        return Usage(
            self.text_in + other.text_in,
            self.image_in + other.image_in,
            self.cached_text_in + other.cached_text_in,
            self.cached_image_in + other.cached_image_in,
            self.text_out + other.text_out,
            self.image_out + other.image_out,
            other.svg or self.svg,
        )
