"""What is asked: one call, read and canonical, without its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from gateway.domain.record import record

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Operation(StrEnum):
    """The relayed endpoints. The value is the label of metrics and of the ledger."""

    GENERATION = "generation"
    EDIT = "edit"
    RESPONSE = "response"
    """A text model's answer, in which the image tool may draw (contract 3.4)."""

    @property
    def path(self) -> str:
        """Below ``/v1`` of this gateway and of an upstream that speaks OpenAI."""
        return _PATHS[self]


_PATHS = {
    Operation.GENERATION: "/images/generations",
    Operation.EDIT: "/images/edits",
    Operation.RESPONSE: "/responses",
}


class Inquiry(StrEnum):
    """What can be asked about an operation. Nothing is booked under these names."""

    ESTIMATE = "estimate"

    @property
    def path(self) -> str:
        """Below ``/v1``."""
        return "/images/estimate"


class Passage(StrEnum):
    """What is passed on without being bought. The value is the label of metrics and of the log."""

    FILE = "file"
    RESPONSE_LOOKUP = "response_lookup"
    MODERATION = "moderation"
    PROVENANCE = "provenance"

    @property
    def path(self) -> str:
        """Below ``/v1``; of several the one that the others stand under."""
        return {
            Passage.FILE: "/files",
            Passage.RESPONSE_LOOKUP: "/responses",
            Passage.MODERATION: "/moderations",
            Passage.PROVENANCE: "/content_provenance_checks",
        }[self]


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


class Mend(NamedTuple):
    """The headers of a form's file, written anew: what is told of that, and the bytes."""

    changes: tuple[Change, ...]
    edit: Edit


class Spot(NamedTuple):
    """Where one field lies in a body, by four offsets of it: a call that waits keeps those of all
    its fields."""

    start: int
    value_start: int
    value_end: int
    end: int

    @property
    def value(self) -> Span:
        """Its value alone, quotes included in JSON."""
        return Span(self.value_start, self.value_end)

    @property
    def whole(self) -> Span:
        """A member from its name to its value's end, or a form's part from the line of its
        boundary to that of the next."""
        return Span(self.start, self.end)


class FileSpot(NamedTuple):
    """A file of a form. ``head`` are its headers without the empty line behind them;
    ``media_type`` is as declared, ``seen`` as its first bytes say: empty where they do not."""

    name: str
    filename: str
    media_type: str
    seen: str
    head: Span


@record
class Layout:
    """Where the fields of a body lie, in their order: what is needed to put one in, to change it
    and to cut it out (``splice.py``).

    ``opening`` is where a first one may stand: behind the brace of JSON, before a form's first
    boundary line. ``boundary`` is that of a form, without its dashes. ``files`` are those of a
    form, one for each of ``Call.inputs``.
    """

    opening: int = 0
    fields: Mapping[str, Spot] = field(default_factory=dict)
    files: tuple[FileSpot, ...] = ()
    boundary: bytes = b""


class AnswerAs(StrEnum):
    """How pictures are handed over: in the answer, or by an address in it."""

    B64 = "b64_json"
    URL = "url"


class Reference(NamedTuple):
    """An id of something at an upstream, named in a request. ``kind`` is an ``OwnedKind``'s value,
    ``param`` how an error names its place (``images[0].file_id``)."""

    kind: str
    id: str
    param: str


class Encoding(StrEnum):
    """How the fields of a request's body are written."""

    JSON = "json"
    MULTIPART = "multipart"


@record
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


@record
class Call:
    """One request for pictures.

    ``parameters`` holds every field but ``model`` and the pictures, nulls dropped, as Python
    values (multipart text fields that contract 1.2 types as numbers or booleans are converted).
    The typed members beside it are those that money and the relay need, with their defaults.
    ``n`` is 1-10, ``partial_images`` 0-3, ``frame_count`` 2-16 (1 where it is not a GIF).
    ``model`` is the name that is routed, empty where none was given yet; ``model_said`` is what
    the body says, None where it says nothing.
    ``unknown`` names the parameters that the contract does not list: they are forwarded.
    ``changes`` and ``mends`` are what the gateway sends on otherwise than it came: the members
    beside them hold what is sent, the body and its ``layout`` what came.
    """

    operation: Operation
    encoding: Encoding
    content_type: str
    model: str
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
    references: tuple[Reference, ...] = ()
    """Ids of files and responses at an upstream: whose they are is looked up before the plan."""
    model_said: str | None = None
    layout: Layout = field(default_factory=Layout)
    changes: tuple[Change, ...] = ()
    mends: tuple[Mend, ...] = ()
    answer_as: AnswerAs = AnswerAs.B64
    asks: ResponseAsk | None = None
    """What only a response has: None for the operations of images."""
    came: Call | None = field(default=None, compare=False, repr=False)
    """As its client sent it, for who repairs it for another model; None where nothing has."""

    def forget_prompt(self) -> None:
        """Takes the text out of ``parameters``: of a call that is planned and held it is in the
        body alone, which is what is sent. A call in flight would keep it twice."""
        for call in (self, self.came):
            if call is not None and isinstance(call.parameters, dict):
                call.parameters.pop("prompt", None)

    @property
    def changed(self) -> tuple[Change, ...]:
        """All that is told to the client, each change once."""
        told = list(self.changes)
        for mend in self.mends:
            told += [change for change in mend.changes if change not in told]
        return tuple(told)


@record
class ImageTool:
    """The image tool of a response, with its parameters as a call for one picture would have them.

    ``index`` is its place among the tools, ``model`` empty where it leaves the choice to the
    provider. ``whole``: the list of tools is known to its last byte (no string in it was too long
    to keep) and is ``tools``, so that it can be written anew.
    """

    index: int
    model: str
    size: str = "auto"
    quality: str = "auto"
    output_format: str = "png"
    partial_images: int = 0
    frame_count: int = 1
    parameters: Mapping[str, Json] = field(default_factory=dict)
    unknown: frozenset[str] = frozenset()
    tools: tuple[Json, ...] = ()
    whole: bool = True
    routed: str = ""
    """The name that ``model`` leads to, by an alias or the default; empty before it is known."""

    def drawn_by(self, model: str) -> Json:
        """The list of tools with another model in this one."""
        tools = list(self.tools)
        own = tools[self.index]
        tools[self.index] = {**own, "model": model} if isinstance(own, dict) else own
        return tools


@record
class ResponseAsk:
    """What a response may cost depends on this, beside the pictures of the call.

    ``text_bytes`` is the body without its pictures: no text has more tokens than bytes.
    ``context_tokens`` and ``context_pictures`` are those of the conversation that it goes on with,
    as it was when it was last seen here, and of pictures that it names. ``max_tool_calls``
    is 0 without an image tool.
    """

    tool: ImageTool | None
    text_bytes: int
    max_output_tokens: int
    max_tool_calls: int
    background: bool = False
    stored: bool = True
    previous: str = ""
    context_tokens: int = 0
    context_pictures: int = 0


@record
class SvgUsage:
    """The second model's bill inside an SVG answer (contract 1.3), in tokens."""

    model: str
    input_tokens: int
    output_tokens: int


@record
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
