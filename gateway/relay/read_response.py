"""Reading a response (contract 3.4): the image tool, what the text model reads, and every id.

What cannot be bounded is refused here: tools with a price of their own, templates and
conversations whose size is not known, tiers with other prices. Ids of responses, pictures and
files become references; whose they are is asked before the plan (``references.py``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gateway.domain.call import (
    Call,
    Change,
    Encoding,
    ImageTool,
    InputImage,
    Json,
    Operation,
    Reference,
    ResponseAsk,
)
from gateway.domain.errors import InvalidRequest, NotServed
from gateway.domain.owned import OwnedKind
from gateway.ports import Lent
from gateway.relay.inputs import digest_of_file, from_url
from gateway.relay.media import JSON_TYPE, check_encoding, check_media, too_large
from gateway.relay.meter_response import PICTURE_CALL
from gateway.relay.read import (
    DEFAULT_FRAMES,
    KNOWN_OF_SVG,
    MAX_DEPTH,
    MAX_KEPT_BYTES,
    STILL_FORMATS,
    Reader,
    ReadRules,
    bad_json,
    check_ids,
    check_spelling,
    kind_of,
    missing,
    model_of,
    number,
    settled,
    wrong_type,
)
from gateway.relay.references import Resolved
from gateway.relay.skim import BadJson, Hole, JsonSkimmer

IMAGE_TOOL = "image_generation"
KEEP_BYTES = 64 * 1024
"""Longer strings are passed over; of a picture this is enough for its size in pixels."""
MAX_VALUES = 50_000
"""A conversation that is sent along has many small members."""

MIN_OUTPUT_TOKENS = 16
"""The least that OpenAI takes as ``max_output_tokens``."""
OWN_TOOLS = frozenset({"function", "custom"})
"""Tools that the client runs itself: they cost nothing beside their text."""
TIERS = frozenset({"auto", "default"})
READ_HERE = frozenset(
    {
        *(
            "model",
            "input",
            "instructions",
            "tools",
            "tool_choice",
            "stream",
            "background",
            "store",
        ),
        *("previous_response_id", "conversation", "prompt", "service_tier"),
        *("max_output_tokens", "max_tool_calls"),
    }
)
KNOWN_OF_TOOL = frozenset(
    {
        *("type", "model", "action", "background", "complexity", "frame_count"),
        *("frame_duration_ms", "input_fidelity", "input_image_mask", "moderation"),
        *("output_compression", "output_format", "partial_images", "quality", "size", "svg"),
    }
)
"""Members of the image tool (contract 3.4)."""
KNOWN_OF_ITEM = frozenset(
    {
        *("type", "id", "role", "content", "output", "result"),
        *("image_url", "file_id", "file_url", "file_data"),
    }
)
"""Members of an item or of a part that decide what it is, whose, and how large."""
_BY_VALUE = frozenset(
    {"message", "function_call", "function_call_output", "custom_tool_call"}
    | {"custom_tool_call_output"}
)
"""Items that say all that they are. Others are looked up by their ids where they live."""
_DOCUMENTS = ("file_url", "file_data")
"""Members of a part that is a document, whatever type it says."""
_NOT_KNOWN: Mapping[str, str] = MappingProxyType(
    {
        "conversation": "how long it is, and whose, is not known here. Send previous_response_id, "
        "or the conversation itself as input",
        "prompt": "a stored template's size, and whose it is, is not known here. Send its text as "
        "instructions or input",
    }
)


def response_reader(
    operation: Operation,
    content_type: str,
    content_encoding: str | None,
    content_length: int | None,
    rules: ReadRules,
) -> Reader:
    """The reader of a response. Raises ``NotServed`` where they are switched off, and what
    ``read.reader_for`` raises."""
    if not rules.responses.enabled:
        raise NotServed(
            "This gateway does not offer /v1/responses. Ask for a picture with "
            "/v1/images/generations."
        )
    check_media(content_type, (JSON_TYPE,), f"/v1{operation.path}")
    check_encoding(content_encoding)
    reader = _ResponseReader(rules)
    reader.check_length(content_length or 0)
    return reader


class _ResponseReader:
    def __init__(self, rules: ReadRules) -> None:
        self._rules = rules
        self._length = 0
        self._limit = rules.body_limit(Operation.RESPONSE)
        self._skimmer = JsonSkimmer(
            keep_bytes=KEEP_BYTES,
            max_depth=MAX_DEPTH,
            digests=True,
            check_base64=True,
            max_kept=min(MAX_KEPT_BYTES, self._limit),
            max_values=MAX_VALUES,
            layout=True,
        )

    def check_length(self, length: int) -> None:
        """Raises ``BodyTooLarge``."""
        if length > self._limit:
            raise too_large(self._limit, f"/v1{Operation.RESPONSE.path}")

    def feed(self, chunk: bytes | Lent) -> None:
        self._length += len(chunk)
        self.check_length(self._length)
        try:
            self._skimmer.feed(bytes(chunk))
        except BadJson as bad:
            raise bad_json(bad) from None

    def close(self) -> Call:
        try:
            skimmed = self._skimmer.close()
        except BadJson as bad:
            raise bad_json(bad) from None
        if not isinstance(skimmed.value, dict):
            raise InvalidRequest(
                f"The body must be a JSON object, not {kind_of(skimmed.value)}.",
                code="invalid_type",
                reason="invalid_param",
            )
        check_spelling(skimmed.value, READ_HERE)
        given = {name: value for name, value in skimmed.value.items() if value is not None}
        _refuse_unknown_sizes(given)
        model = model_of(given)
        if not model:
            raise missing("model", "the name of a text model; GET /v1/models lists yours.")
        seen = _Seen(self._rules)
        seen.input(given.get("input"))
        # An answer shows items there; in a request they would be items that nobody looked at.
        if not isinstance(given.get("instructions", ""), str | Hole):
            raise wrong_type("instructions", "a string", given["instructions"])
        tool = _image_tool(given, seen, self._rules)
        changes: list[Change] = []
        most = self._rules.responses
        words = _filled(
            given, "max_output_tokens", MIN_OUTPUT_TOKENS, most.max_output_tokens, changes
        )
        calls = 0
        if tool is not None:
            calls = _filled(given, "max_tool_calls", 1, most.max_tool_calls, changes)
        flags = {name: _flag(given, name) for name in ("stream", "background", "store")}
        previous = _previous(given)
        if previous:
            place = "previous_response_id"
            seen.references.append(Reference(OwnedKind.RESPONSE.value, previous, place))
        ask = ResponseAsk(
            tool=tool,
            text_bytes=self._length - seen.picture_bytes,
            max_output_tokens=words,
            max_tool_calls=calls,
            background=flags["background"] or False,
            stored=flags["store"] is not False,
            previous=previous,
            context_pictures=seen.named_pictures,
        )
        return Call(
            operation=Operation.RESPONSE,
            encoding=Encoding.JSON,
            content_type=JSON_TYPE,
            model=model,
            prompt_bytes=ask.text_bytes,
            parameters={name: settled(value) for name, value in given.items() if name != "model"},
            inputs=tuple(seen.pictures),
            n=calls,
            size=tool.size if tool else "",
            quality=tool.quality if tool else "",
            stream=flags["stream"] or False,
            partial_images=tool.partial_images if tool else 0,
            output_format=tool.output_format if tool else "",
            body_bytes=self._length,
            references=tuple(dict.fromkeys(seen.references)),
            model_said=model,
            layout=skimmed.layout,
            changes=tuple(changes),
            asks=ask,
        )


@dataclass(slots=True)
class _Seen:
    """What an input holds: its pictures, and the ids in it. ``named_pictures`` are pictures of
    earlier responses, ``picture_bytes`` what the others take of the body."""

    rules: ReadRules
    pictures: list[InputImage] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    named_pictures: int = 0
    picture_bytes: int = 0

    def input(self, value: object) -> None:
        """Looks at all that is said: a text, or items. Raises ``InvalidRequest``."""
        if value is None or isinstance(value, str | Hole):
            return
        if not isinstance(value, list):
            raise wrong_type("input", "one of a string or an array", value)
        for index, item in enumerate(value):
            place = f"input[{index}]"
            if not isinstance(item, dict):
                raise wrong_type(place, "an object", item)
            self.walk(item, place)
            self._item(item, place)

    def walk(self, value: object, place: str) -> None:
        """Looks at a value and all that is in it. Raises ``InvalidRequest``."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                self.walk(item, f"{place}[{index}]")
        elif isinstance(value, dict):
            self._see(value, place)
            for name, item in value.items():
                if isinstance(item, list | dict):
                    self.walk(item, f"{place}.{name}")

    def _item(self, item: Mapping[str, object], place: str) -> None:
        """What one of the input's own items is: it is looked up where it may be known by its id."""
        kind = item.get("type")
        if kind is not None and not isinstance(kind, str):
            raise wrong_type(f"{place}.type", "a string", kind)
        # A reference need not say that it is one (openai-python, ItemReference.type).
        said = item.get("role") is not None and (
            item.get("content") is not None or item.get("id") is None
        )
        by_value = said if kind is None else kind in _BY_VALUE or kind == PICTURE_CALL
        if not by_value:
            self._refer(OwnedKind.ITEM, item.get("id"), f"{place}.id")

    def _see(self, item: Mapping[str, object], place: str) -> None:
        check_spelling(item, KNOWN_OF_ITEM, place)
        kind = item.get("type")
        if kind == "input_file" or any(item.get(name) is not None for name in _DOCUMENTS):
            raise InvalidRequest(
                f"'{place}' is a document, and how much of it a model reads is not known here. "
                "Send its text as input_text, or its pages as input_image.",
                code="input_not_priced",
                param=place,
                reason="unpriced",
            )
        if kind == PICTURE_CALL:
            self._drawn_before(item, place)
        self.picture(item, place, "image")

    def picture(self, item: Mapping[str, object], place: str, role: str) -> None:
        """One that is given by its address or the id of a file."""
        address, file_id = item.get("image_url"), item.get("file_id")
        if address is not None:
            param = f"{place}.image_url"
            if not isinstance(address, str | Hole):
                # Chat completions have an object there, with an address that nobody looked at.
                raise wrong_type(param, "a string, a data URL", address)
            self.picture_bytes += _size(address)
            self.pictures.append(from_url(address, role, param, self.rules.picture))
        if file_id is not None:
            found = self._refer(OwnedKind.FILE, file_id, f"{place}.file_id")
            self.pictures.append(InputImage(role, digest_of_file(found), 0, "file"))

    def _drawn_before(self, item: Mapping[str, object], place: str) -> None:
        """By the id under which it is kept, or itself, or both."""
        self.named_pictures += 1
        if item.get("id") is not None:
            self._refer(OwnedKind.PICTURE, item["id"], f"{place}.id")
        result = item.get("result")
        if isinstance(result, str | Hole):
            self.picture_bytes += _size(result)

    def _refer(self, kind: OwnedKind, name: object, param: str) -> str:
        if not isinstance(name, str) or not 0 < len(name) <= 256:
            raise wrong_type(param, "the id of something that was made here", name)
        self.references.append(Reference(kind.value, name, param))
        return name


def _size(text: str | Hole) -> int:
    return text.end - text.start if isinstance(text, Hole) else len(text)


def _refuse_unknown_sizes(given: Mapping[str, object]) -> None:
    for name, why in _NOT_KNOWN.items():
        if name in given:
            raise InvalidRequest(
                f"'{name}' is not taken by this gateway: {why}.",
                code="unsupported_parameter",
                param=name,
                reason="unpriced",
            )
    tier = given.get("service_tier", "auto")
    if not isinstance(tier, str):
        raise wrong_type("service_tier", "a string", tier)
    if tier not in TIERS:
        raise InvalidRequest(
            "'service_tier' must be 'auto' or 'default': other tiers have prices that are not "
            "known here.",
            code="unsupported_parameter",
            param="service_tier",
            reason="unpriced",
        )


def _image_tool(given: Mapping[str, object], seen: _Seen, rules: ReadRules) -> ImageTool | None:
    """The image tool among the tools. Raises ``InvalidRequest`` for one whose price is not known,
    for a second one, and for none where that is not allowed."""
    tools = given.get("tools", [])
    if not isinstance(tools, list):
        raise wrong_type("tools", "an array of objects", tools)
    found: ImageTool | None = None
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise wrong_type(place, "an object", tool)
        kind = tool.get("type")
        if kind is not None and not isinstance(kind, str):
            raise wrong_type(f"{place}.type", "a string", kind)
        if kind in OWN_TOOLS:
            continue
        if kind != IMAGE_TOOL:
            named = "without a type" if kind is None else f"'{kind[:64]}'"
            raise InvalidRequest(
                f"The tool {named} is not taken by this gateway: its price is not known here. "
                f"Take it out of 'tools'; '{IMAGE_TOOL}' and tools that you run yourself can stay.",
                code="tool_not_priced",
                param=f"{place}.type",
                reason="unpriced",
            )
        if found is not None:
            raise InvalidRequest(
                f"'{place}' is a second image tool: a response has at most one.",
                code="invalid_value",
                param=place,
                reason="invalid_param",
            )
        found = _read_tool(tool, index, tools, seen)
    if found is None and not rules.responses.without_image_tool:
        raise InvalidRequest(
            "This gateway serves pictures: a response needs the tool "
            '{"type": "image_generation"} in \'tools\'.',
            code="image_tool_required",
            param="tools",
            reason="invalid_param",
        )
    return found


def _read_tool(
    tool: Mapping[str, object], index: int, tools: list[object], seen: _Seen
) -> ImageTool:
    place = f"tools[{index}]"
    said = {name: value for name, value in tool.items() if value is not None}
    check_spelling(tool, KNOWN_OF_TOOL, place)
    unknown = frozenset(said.keys() - KNOWN_OF_TOOL)
    check_ids({name: said[name] for name in unknown}, place, f"'{place}.input_image_mask.file_id'")
    if "n" in said:
        raise InvalidRequest(
            f"'{place}.n' is not taken: the tool draws one picture a call. Ask for more of them in "
            "the text, and raise max_tool_calls.",
            code="unknown_parameter",
            param=f"{place}.n",
            reason="invalid_param",
        )
    texts: dict[str, str] = {}
    for name in ("model", "size", "quality", "output_format"):
        value = said.get(name, "")
        if not isinstance(value, str):
            raise wrong_type(f"{place}.{name}", "a short string", value)
        texts[name] = value
    svg = said.get("svg", {})
    if not isinstance(svg, dict):
        raise wrong_type(f"{place}.svg", "an object", svg)
    check_spelling(svg, KNOWN_OF_SVG, f"{place}.svg")
    mask, at = said.get("input_image_mask"), f"{place}.input_image_mask"
    if mask is not None:
        if not isinstance(mask, dict):
            raise wrong_type(at, "an object with 'file_id' or 'image_url'", mask)
        check_spelling(mask, KNOWN_OF_ITEM, at)
        seen.picture(mask, at, "mask")
    output_format = texts["output_format"] or "png"
    frames = number(said, "frame_count", 2, 16, f"{place}.frame_count")
    return ImageTool(
        index=index,
        model=texts["model"],
        size=texts["size"] or "auto",
        quality=texts["quality"] or "auto",
        output_format=output_format,
        partial_images=number(said, "partial_images", 0, 3, f"{place}.partial_images") or 0,
        frame_count=1 if output_format in STILL_FORMATS else (frames or DEFAULT_FRAMES),
        parameters={name: settled(value) for name, value in said.items() if name != "type"},
        unknown=unknown,
        tools=tuple(settled(one) for one in tools),
        whole=not any(_holes(tools)),
    )


def _holes(value: object) -> Iterator[Hole]:
    if isinstance(value, Hole):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _holes(item)


def _filled(
    given: dict[str, object], name: str, least: int, most: int, changes: list[Change]
) -> int:
    """What a request says, or the most that it may say, which is then filled in."""
    value = given.get(name)
    if value is None:
        given[name] = most
        changes.append(Change(name, None, most))
        return most
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(name, "an integer", value)
    if not least <= value <= most:
        raise InvalidRequest(
            f"Invalid value for '{name}': this gateway takes {least} to {most}.",
            code="invalid_value",
            param=name,
            reason="invalid_param",
        )
    return value


def _flag(given: Mapping[str, object], name: str) -> bool | None:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)
    return value


def _previous(given: Mapping[str, object]) -> str:
    value = given.get("previous_response_id", "")
    if not isinstance(value, str) or len(value) > 256:
        raise wrong_type("previous_response_id", "the id of a response", value)
    return value


def remembered(found: Resolved) -> Resolved:
    """A response with what is remembered of all that it goes on with; another call as it is.

    Raises ``InvalidRequest`` for an item of which nobody remembers how large it may be.
    """
    ask = found.call.asks
    if ask is None:
        return found
    tokens, pictures = _of_items(found)
    if ask.previous:
        detail = found.owned[ask.previous].detail
        tokens += _count(detail, "context_tokens") or 0
        pictures += _count(detail, "pictures") or 0
    if not tokens and not pictures:
        return found
    ask = replace(
        ask,
        context_tokens=ask.context_tokens + tokens,
        context_pictures=ask.context_pictures + pictures,
    )
    return found._replace(call=replace(found.call, asks=ask))


def _of_items(found: Resolved) -> tuple[int, int]:
    """The most tokens, and the pictures, that a call names as items. The items of one response
    have together no more tokens than it had, so it counts once, or as often as one of them is
    named."""
    named = Counter(one.id for one in found.call.references if one.kind == OwnedKind.ITEM.value)
    params = {one.id: one.param for one in found.call.references}
    tokens: defaultdict[str, int] = defaultdict(int)
    pictures = 0
    for id, times in named.items():
        owned = found.owned[id]
        if owned.kind is OwnedKind.PICTURE:
            pictures += times
            continue
        most = _count(owned.detail, "context_tokens")
        if most is None:
            raise InvalidRequest(
                f"How long the item of '{params[id]}' is, is not known here any more. Send it as "
                "it is, without its id.",
                code="input_not_priced",
                param=params[id],
                reason="unpriced",
            )
        response = str(owned.detail.get("response", id))
        tokens[response] = max(tokens[response], times * most)
    return sum(tokens.values()), pictures


def _count(detail: Mapping[str, Json], name: str) -> int | None:
    value = detail.get(name)
    return value if isinstance(value, int) else None
