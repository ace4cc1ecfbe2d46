"""Reading: a request's bytes go by, a ``Call`` comes out. Sans-I/O.

The gateway refuses what it cannot read, what it must understand to price the call, and what is
not safe to hold; every other mistake is the upstream's to name (``strict.py`` is for those who
want it named here). Nothing is rewritten: the body that is sent on is the body that came, so what
is priced here must be what the upstream reads there. Hence no second field of a name, no number
in quotes, no text field disguised as a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.domain.call import (
    Call,
    Encoding,
    FileSpot,
    InputImage,
    Json,
    Layout,
    Operation,
    Reference,
    Spot,
)
from gateway.domain.errors import InvalidRequest
from gateway.domain.owned import OwnedKind
from gateway.ports import Lent
from gateway.relay.inputs import PICTURE_ROLES, PictureRules, from_file, from_id, from_url
from gateway.relay.media import FORM_TYPE, JSON_TYPE, check_encoding, check_media, too_large
from gateway.relay.multipart import FormScanner, Part, boundary_of
from gateway.relay.skim import BadJson, Hole, JsonSkimmer
from gateway.relay.small_json import fields_of

KNOWN = frozenset(
    {
        *("prompt", "model", "n", "size", "quality", "complexity", "background", "moderation"),
        *("output_format", "output_compression", "frame_count", "frame_duration_ms", "svg"),
        *("stream", "partial_images", "safety_identifier", "user"),
        *("response_format", "style", "input_fidelity"),
    }
)
"""Fields of contract 1.2 and 2.1, without the pictures."""
READ_HERE = KNOWN | PICTURE_ROLES | {"images"}
KNOWN_OF_SVG = frozenset({"model", "reasoning"})
"""Of the object that says who writes an SVG: its model is priced."""
STILL_FORMATS = frozenset({"png", "jpeg", "webp", "svg"})

MAX_PROMPT_CHARS = 32_000
MAX_MODEL_CHARS = 256
MAX_DEPTH = 32
KEEP_BYTES = 12 * MAX_PROMPT_CHARS
"""Longer strings are passed over. The longest prompt of all, written as escaped surrogate pairs
(twelve bytes a character), is still kept."""
SMALL_BYTES = 16 * 1024
"""Up to this a body is kept until it is whole, and read in one go."""
MAX_KEPT_BYTES = 8 << 20
"""Room for the beginnings of eighteen pictures, and a prompt."""

DEFAULT_FRAMES = 9
_PRICED_NUMBERS: Mapping[str, tuple[int, int]] = {
    "n": (1, 10),
    "partial_images": (0, 3),
    "frame_count": (2, 16),
}
_PRICED_TEXTS = ("size", "quality", "output_format")
_FORM_NUMBERS = frozenset({*_PRICED_NUMBERS, "output_compression", "frame_duration_ms"})
_TAKES_IDS = "'images[].file_id', 'mask.file_id' and 'markup.file_id' of a JSON edit"
_ECHOED = ("model", "size", "quality", "output_format", "background", "safety_identifier", "user")
"""Fields that come back in an answer's headers or body."""

_SCALARS: frozenset[type] = frozenset({str, int, float, bool, type(None)})
_NONE_UNKNOWN: frozenset[str] = frozenset()  # each that is made takes 216 bytes
"""What JSON has that holds nothing else: asked by class, for one lookup instead of a call."""
_DIGITS = re.compile(r"0|-?[1-9][0-9]{0,17}")
_BREAKS = re.compile(r"[\x00\r\n]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_UNPRINTED = re.compile(r"[\x01-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""The controls beside ``_BREAKS``."""
_NESTED = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])+)")
_IMAGE = re.compile(r"image(?:\[([0-9]{0,4})\])?")


@dataclass(frozen=True, slots=True)
class ResponseRules:
    """What a response may ask for (``responses`` in the configuration). The two numbers are filled
    in where a request leaves them open, and the most that it may say."""

    enabled: bool = True
    without_image_tool: bool = False
    max_output_tokens: int = 16_384
    max_tool_calls: int = 4


@dataclass(frozen=True, slots=True)
class ReadRules:
    """The limits of a request (reliability 5.4), in bytes, pixels and pictures.

    ``image_urls_allowed`` lets https addresses of pictures pass to the upstream, which fetches
    them; the gateway itself never does.
    """

    max_json_bytes: int = 4 << 20
    max_form_bytes: int = 200 << 20
    max_file_bytes: int = 50 << 20
    max_pixels: int = 100_000_000
    max_side: int = 16_384
    max_images: int = 16
    image_urls_allowed: bool = False
    responses: ResponseRules = ResponseRules()

    def body_limit(self, operation: Operation) -> int:
        """The most bytes a request may have: no pictures come with a generation."""
        small = operation is Operation.GENERATION
        return self.max_json_bytes if small else self.max_form_bytes

    @property
    def picture(self) -> PictureRules:
        return PictureRules(
            self.max_file_bytes, self.max_pixels, self.max_side, self.image_urls_allowed
        )


class Reader(Protocol):
    """Reads one body. Both methods raise ``InvalidRequest`` and ``BodyTooLarge``; a reader that
    has raised is not used again."""

    def feed(self, chunk: bytes | Lent) -> None: ...

    def close(self) -> Call:
        """The body is complete."""


def reader_for(
    operation: Operation,
    content_type: str,
    content_encoding: str | None,
    content_length: int | None,
    rules: ReadRules,
    *,
    path: str = "",
) -> Reader:
    """The reader for a body announced by these headers; ``content_length`` is None if chunked.
    ``path`` is the one that was asked, where it is not the operation's.

    Raises ``UnsupportedMedia`` for a body in another form than the operation takes or in any
    content encoding, ``BodyTooLarge`` at once for a length over the limit.
    """
    media = content_type
    if media != JSON_TYPE:  # Which all of them take, and nearly all clients write so.
        wanted = (FORM_TYPE, JSON_TYPE) if operation is Operation.EDIT else (JSON_TYPE,)
        media = check_media(content_type, wanted, f"/v1{path or operation.path}")
    if content_encoding is not None:
        check_encoding(content_encoding)
    limit = rules.body_limit(operation)
    if content_length is not None and content_length > limit:
        raise too_large(limit, f"/v1{operation.path}")
    if media == JSON_TYPE:
        return _JsonReader(operation, rules, limit)
    return _FormReader(operation, content_type, rules)


class _JsonReader:
    def __init__(self, operation: Operation, rules: ReadRules, limit_bytes: int) -> None:
        self._operation = operation
        self._rules = rules
        self._limit = limit_bytes
        self._length = 0
        self._references: list[Reference] = []
        self._small: bytes | None = b""
        """All that came, as long as it is read in one go."""
        self._skimmer: JsonSkimmer | None = None

    def feed(self, chunk: bytes | Lent) -> None:
        """What is small is read when it is whole: so is what is wrong with it."""
        self._length += len(chunk)
        if self._length > self._limit:
            raise too_large(self._limit, f"/v1{self._operation.path}")
        if self._small is not None:
            chunk, self._small = self._small + bytes(chunk), None
            if len(chunk) <= SMALL_BYTES:
                self._small = chunk
                return
        try:
            self._begun().feed(bytes(chunk))
        except BadJson as bad:
            raise bad_json(bad) from None

    def _begun(self) -> JsonSkimmer:
        if self._skimmer is None:
            self._skimmer = JsonSkimmer(
                keep_bytes=KEEP_BYTES,
                max_depth=MAX_DEPTH,
                digests=True,
                check_base64=self._operation is Operation.EDIT,
                check_controls=self._operation is Operation.GENERATION,
                max_kept=min(MAX_KEPT_BYTES, self._limit),
                layout=True,
            )
        return self._skimmer

    def _document(self) -> tuple[Any, Layout]:
        """What was sent, and where its members lie."""
        if self._small is not None:
            found = fields_of(self._small, max_depth=MAX_DEPTH)
            if found is not None:
                return found
        skimmer = self._begun()
        try:
            if self._small is not None:
                skimmer.feed(self._small)
            skimmed = skimmer.close()
        except BadJson as bad:
            raise bad_json(bad) from None
        return skimmed.value, skimmed.layout

    def close(self) -> Call:
        fields, layout = self._document()
        if not isinstance(fields, dict):
            raise InvalidRequest(
                f"The body must be a JSON object, not {kind_of(fields)}.",
                code="invalid_type",
                reason="invalid_param",
            )
        inputs: tuple[InputImage, ...] = ()
        extras: list[Json] = []
        taken: frozenset[str] = frozenset()
        references: tuple[Reference, ...] = ()
        if self._operation is Operation.EDIT:
            taken = frozenset({"images", "mask", "markup"})
            inputs, extras = self._pictures(fields)
            references = tuple(self._references)
        parameters = fields
        if taken:
            parameters = {name: value for name, value in fields.items() if name not in taken}
        if extras and any(extras):
            # What stands beside a picture's address decides the answer too: it is kept with the
            # parameters, without the pictures.
            parameters["images"] = extras
        return _call(
            operation=self._operation,
            encoding=Encoding.JSON,
            # Not as it was declared: a charset could make another reader see other names.
            content_type=JSON_TYPE,
            layout=layout,
            fields=parameters,
            inputs=inputs,
            unknown=parameters.keys() - KNOWN,
            body_bytes=self._length,
            references=references,
        )

    def _pictures(self, fields: Mapping[str, object]) -> tuple[tuple[InputImage, ...], list[Json]]:
        """Every picture, and per picture the members that are not its address."""
        images = fields.get("images")
        if images is None or images == []:
            raise missing("images", 'a list like [{"image_url": "data:image/png;base64,..."}].')
        if not isinstance(images, list):
            raise wrong_type("images", "an array of objects", images)
        if len(images) > self._rules.max_images:
            raise _too_many("images", self._rules.max_images)
        places = [("image", f"images[{index}]", item) for index, item in enumerate(images)]
        places += [
            (role, role, fields[role])
            for role in ("mask", "markup")
            if fields.get(role) is not None
        ]
        inputs: list[InputImage] = []
        extras: list[Json] = []
        for role, param, item in places:
            inputs.append(self._picture(role, param, item))
            extras.append(
                {
                    name: settled(value)
                    for name, value in item.items()
                    if name not in ("image_url", "file_id") and value is not None
                }
            )
        return tuple(inputs), extras

    def _picture(self, role: str, param: str, item: object) -> InputImage:
        if not isinstance(item, dict):
            raise wrong_type(param, "an object with 'image_url'", item)
        if item.get("file_id") is not None:
            return self._file(role, param, item)
        param = f"{param}.image_url"
        address = item.get("image_url")
        if address is None:
            raise missing(param, "a data URL like data:image/png;base64,....")
        if not isinstance(address, (str, Hole)):
            raise wrong_type(param, "a string", address)
        return from_url(address, role, param, self._rules.picture)

    def _file(self, role: str, param: str, item: Mapping[str, object]) -> InputImage:
        """A file that was uploaded before; whose it is, is not known here."""
        id, place = item["file_id"], f"{param}.file_id"
        if item.get("image_url") is not None:
            raise InvalidRequest(
                f"Invalid value for '{param}': send one of 'image_url' and 'file_id', not both.",
                code="invalid_value",
                param=param,
                reason="invalid_param",
            )
        if not isinstance(id, str) or not id:
            raise wrong_type(place, "the id of a file, like file-...", id)
        self._references.append(Reference(OwnedKind.FILE.value, id, place))
        return from_id(id, role)


class _FormReader:
    def __init__(self, operation: Operation, content_type: str, rules: ReadRules) -> None:
        self._operation = operation
        self._content_type = content_type
        self._rules = rules
        self._limit = rules.body_limit(operation)
        self._length = 0
        self._boundary = boundary_of(content_type)
        self._scanner = FormScanner(self._boundary, max_file_bytes=rules.max_file_bytes)
        self._fields: dict[str, Json] = {}
        self._inputs: list[InputImage] = []
        self._names: set[str] = set()
        self._unknown_files: set[str] = set()
        self._spots: dict[str, Spot] = {}
        self._files: list[FileSpot] = []
        self._opening = -1
        self._images = 0
        self._spelling = ""
        self._last_index = -1

    def feed(self, chunk: bytes | Lent) -> None:
        self._length += len(chunk)
        if self._length > self._limit:
            raise too_large(self._limit, f"/v1{self._operation.path}")
        for part in self._scanner.feed(chunk):
            if part.name in self._names and not _is_list(part):
                raise duplicate(part.name)
            self._names.add(part.name)
            if self._opening < 0:
                self._opening = part.whole.start
            if part.is_file:
                self._file(part)
            else:
                self._text(part)

    def close(self) -> Call:
        self._scanner.close()
        if self._images == 0:
            raise missing("image", "the picture to edit, as a file of the form.")
        return _call(
            operation=self._operation,
            encoding=Encoding.MULTIPART,
            content_type=self._content_type,
            layout=Layout(self._opening, self._spots, tuple(self._files), self._boundary),
            fields=self._fields,
            inputs=tuple(self._inputs),
            unknown=(self._fields.keys() - KNOWN) | self._unknown_files,
            body_bytes=self._length,
        )

    def _file(self, part: Part) -> None:
        name = part.name
        if _base(name) in KNOWN:
            raise InvalidRequest(
                f"Invalid type for '{name[:64]}': expected text, but got a file. Send the field "
                "without a filename.",
                code="invalid_type",
                param=name[:64],
                reason="invalid_param",
            )
        image = _IMAGE.fullmatch(name)
        if image is not None:
            role, param = "image", self._count_image(name, image[1])
        else:
            role = param = name
            if name not in PICTURE_ROLES:
                self._unknown_files.add(name)
        picture, seen = from_file(part, role, param, self._rules.picture)
        self._inputs.append(picture)
        self._files.append(FileSpot(name, part.filename or "", part.content_type, seen, part.head))

    def _count_image(self, name: str, index: str | None) -> str:
        """Counts an image and returns how an error names it. One spelling, in one order: how an
        upstream would order a mixture is not known, and the pictures' order matters."""
        spelling = name if not index else "image[0]"
        if self._spelling not in ("", spelling):
            raise duplicate("image")
        self._spelling = spelling
        if index:
            if int(index) <= self._last_index:
                raise InvalidRequest(
                    f"'image[{index}]' comes after 'image[{self._last_index}]': send the pictures "
                    "in their order, or all of them as 'image[]'.",
                    code="invalid_value",
                    param=f"image[{index}]",
                    reason="invalid_param",
                )
            self._last_index = int(index)
        self._images += 1
        if self._images > self._rules.max_images:
            raise _too_many("image", self._rules.max_images)
        return "image" if name == "image" and self._images == 1 else f"image[{self._images - 1}]"

    def _text(self, part: Part) -> None:
        name = part.name
        if _base(name) in PICTURE_ROLES:
            raise InvalidRequest(
                f"Invalid type for '{name[:64]}': expected a file, but got text. Send the picture "
                "as a file part, with a filename.",
                code="invalid_type",
                param=name[:64],
                reason="invalid_param",
            )
        try:
            text = part.content.decode("utf-8")
        except UnicodeDecodeError as bad:
            raise InvalidRequest(
                f"The text of '{name[:64]}' is not valid UTF-8 at byte "
                f"{part.span.start + bad.start}.",
                code="invalid_unicode",
                param=name[:64],
                reason="invalid_multipart",
            ) from None
        self._spots[name] = Spot(part.whole.start, *part.span, part.whole.end)
        _put(self._fields, name, _from_text(name, text))


def _is_list(part: Part) -> bool:
    """Whether a name may come again. Pictures that are all called ``image`` are a list to some
    readers and not to others: ``compat.py`` decides."""
    return "[]" in part.name or (part.is_file and part.name == "image")


def _base(name: str) -> str:
    """``svg[model]`` -> ``svg``."""
    return name.partition("[")[0]


def _from_text(name: str, text: str) -> Json:
    """A form has only text; fields that the contract types otherwise are read as what they say.
    What does not read so stays text, and is refused later where it matters."""
    if name in _FORM_NUMBERS and _DIGITS.fullmatch(text):
        return int(text)
    if name == "stream" and text in ("true", "false"):
        return text == "true"
    return text


def _put(fields: dict[str, Json], name: str, value: Json) -> None:
    """Sets ``a[b][c]`` or adds to ``a[b][]`` as the SDKs write nested values (contract 2.2).

    A list of objects (``a[][b]``) cannot be told apart in a form: such a name is kept as it is.
    """
    nested = _NESTED.fullmatch(name)
    path = [name] if nested is None else [nested[1], *nested[2][1:-1].split("][")]
    many = "[]" in name
    if many and path[-1] == "" and "" not in path[:-1]:
        path.pop()
    elif "" in path:
        path = [name]
    if len(path) > MAX_DEPTH:
        raise InvalidRequest(
            f"The name {name[:64]!r} is nested more than {MAX_DEPTH} deep.",
            code="invalid_multipart",
            param=name[:64],
            reason="invalid_multipart",
        )
    *parents, last = path
    place = fields
    for key in parents:
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise duplicate(name)
        place = inner
    if many:
        items = place.setdefault(last, [])
        if not isinstance(items, list):
            raise duplicate(name)
        items.append(value)
    elif last not in place:
        place[last] = value
    elif name in KNOWN or len(path) > 1:
        raise duplicate(name)
    else:
        # Nobody here knows what it means twice: it is passed on, and all of it is the call's.
        before = place[last]
        place[last] = [*before, value] if isinstance(before, list) else [before, value]


def _call(
    *,
    operation: Operation,
    encoding: Encoding,
    content_type: str,
    layout: Layout,
    fields: Mapping[str, object],
    inputs: tuple[InputImage, ...],
    unknown: set[str],
    body_bytes: int,
    references: tuple[Reference, ...] = (),
) -> Call:
    """Checks the types of what is needed and priced. Raises ``InvalidRequest``."""
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    nested: list[str] = []
    printable = typed = True
    for name, value in given.items():
        kind = value.__class__
        if kind is not str:
            if kind not in _SCALARS:
                nested.append(name)
            if name in _PRICED_TEXTS:
                typed = False
        # What can be printed has no break; to ask for that is a tenth of looking for one.
        elif name in _ECHOED and not value.isprintable():
            printable = False
    # Neither is wrong with known fields that hold nothing else: those of nearly every request.
    if unknown:
        check_spelling(unknown)
    if unknown or nested:
        check_ids({**dict.fromkeys(unknown), **fields})
    model = model_of(given)
    prompt = _prompt(given)
    numbers: dict[str, int | None] = {}
    for name, bounds in _PRICED_NUMBERS.items():
        if name in given:
            numbers[name] = number(given, name, *bounds)
    if not typed:
        for name in _PRICED_TEXTS:
            _check_text(given, name)
    stream = given.get("stream", False)
    if not isinstance(stream, bool):
        raise wrong_type("stream", "true or false", stream)
    if "svg" in given:
        _check_svg(given["svg"])
    if not printable:
        _check_echoed(given)
    output_format = given.get("output_format") or "png"
    frames = numbers.get("frame_count")
    for name in nested:
        if name != "model":
            said = given[name]
            given[name] = _without_nulls(said) if name == "svg" else settled(said)
    given.pop("model", None)
    if unknown:
        unknown = unknown & given.keys() | unknown - fields.keys()
    return Call(
        operation=operation,
        encoding=encoding,
        content_type=content_type,
        model=model,
        prompt_bytes=len(prompt.encode()),
        parameters=given,
        inputs=inputs,
        n=numbers.get("n") or 1,
        size=given.get("size") or "auto",
        quality=given.get("quality") or "auto",
        stream=stream,
        partial_images=numbers.get("partial_images") or 0,
        output_format=output_format,
        frame_count=1 if output_format in STILL_FORMATS else (frames or DEFAULT_FRAMES),
        unknown=frozenset(unknown) if unknown else _NONE_UNKNOWN,
        body_bytes=body_bytes,
        references=references,
        model_said=model or None,
        layout=layout,
    )


def check_spelling(
    fields: Iterable[str], known: frozenset[str] = READ_HERE, place: str = ""
) -> None:
    """Refuses a name that differs from a known one in case alone. ``place`` is where the fields
    stand, empty for the body itself.

    Servers written in Go match names whatever their case, and let the last one win: what was
    priced and allowed here would not be what is served there.
    """
    for name in fields:
        if name in known:
            continue
        meant = name.casefold()
        if name != meant and meant in known:
            given = f"{place}.{name[:64]}" if place else name[:64]
            raise InvalidRequest(
                f"Unknown parameter: '{given}'. Parameters are written in lower case: '{meant}'.",
                code="unknown_parameter",
                param=given,
                reason="invalid_param",
            )


def check_ids(value: object, path: str = "", taken: str = _TAKES_IDS) -> None:
    """Refuses the id of a file where this gateway does not look whose it is: the provider's account
    is all teams', and takes every id that it knows. ``taken`` is where it may stand."""
    if isinstance(value, dict):
        for name, item in value.items():
            place = f"{path}.{name}" if path else name
            if "file_id" in name.casefold():
                raise InvalidRequest(
                    f"Unknown parameter: '{place[:64]}'. The id of a file is taken in {taken}.",
                    code="unknown_parameter",
                    param=place[:64],
                    reason="invalid_param",
                )
            if item.__class__ not in _SCALARS:
                check_ids(item, place, taken)
    elif isinstance(value, list):
        for item in value:
            check_ids(item, path, taken)


def model_of(given: Mapping[str, object]) -> str:
    """The name, empty where none is given: the path or the configuration may say it."""
    model = given.get("model", "")
    if not isinstance(model, str):
        raise _long_name() if isinstance(model, Hole) else wrong_type("model", "a string", model)
    check_model(model)
    return model


def check_model(model: str) -> None:
    """Whether a name can be a model's, wherever it was said: in a body, or in a path, where it may
    hold whatever can be percent-encoded. Raises ``InvalidRequest``.

    A name is a row's in the ledger, a metric's label and a line of a log, and is written into
    headers and into forms.
    """
    if len(model) > MAX_MODEL_CHARS:
        raise _long_name()
    if model.isprintable():
        return
    _check_breaks("model", model)
    unprinted = _UNPRINTED.search(model)
    if unprinted is not None:
        raise InvalidRequest(
            f"Invalid value for 'model': it holds the control character U+{ord(unprinted[0]):04X} "
            f"at character {unprinted.start()}. Send the name as GET /v1/models lists it.",
            code="invalid_value",
            param="model",
            reason="invalid_param",
        )


def _long_name() -> InvalidRequest:
    return InvalidRequest(
        f"Invalid value for 'model': a name has at most {MAX_MODEL_CHARS} characters.",
        code="invalid_value",
        param="model",
        reason="invalid_param",
    )


def _check_echoed(given: Mapping[str, object]) -> None:
    for name in _ECHOED:
        value = given.get(name)
        if isinstance(value, str):
            _check_breaks(name, value)


def _check_breaks(name: str, value: str) -> None:
    if _BREAKS.search(value):
        raise InvalidRequest(
            f"'{name}' must not hold NUL, CR or LF characters.",
            code="bad_header",
            param=name,
            reason="bad_header",
        )


def _prompt(given: Mapping[str, object]) -> str:
    prompt = given.get("prompt")
    if isinstance(prompt, str) and 0 < len(prompt) <= MAX_PROMPT_CHARS and prompt.isprintable():
        return prompt
    if prompt is None or prompt == "":
        raise missing("prompt", "a text that says what to draw.")
    if not isinstance(prompt, (str, Hole)):
        raise wrong_type("prompt", "a string", prompt)
    if isinstance(prompt, Hole) or len(prompt) > MAX_PROMPT_CHARS:
        length = "more" if isinstance(prompt, Hole) else f"{len(prompt):,}"
        raise InvalidRequest(
            f"The prompt may have at most {MAX_PROMPT_CHARS:,} characters; this one has {length}. "
            "Shorten it.",
            code="prompt_too_long",
            param="prompt",
            reason="invalid_param",
        )
    control = None if prompt.isprintable() else _CONTROLS.search(prompt)
    if control is not None:
        raise InvalidRequest(
            f"The prompt holds the control character U+{ord(control[0]):04X} at character "
            f"{control.start()}. Only tab, LF and CR are taken; remove it.",
            code="invalid_prompt",
            param="prompt",
            reason="invalid_param",
        )
    return prompt


def number(
    given: Mapping[str, object], name: str, low: int, high: int, param: str = ""
) -> int | None:
    value = given.get(name)
    param = param or name
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(param, f"an integer from {low} to {high}", value)
    if not low <= value <= high:
        # Python does not print an integer of thousands of digits, and nobody reads one.
        shown = str(value) if abs(value) < 10**18 else "this one"
        raise InvalidRequest(
            f"Invalid value for '{param}': {shown} is not an integer from {low} to {high}.",
            code="invalid_value",
            param=param,
            reason="invalid_param",
        )
    return value


def _check_text(given: Mapping[str, object], name: str) -> None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong_type(name, "a short string", value)


def _check_svg(svg: object) -> None:
    """The second model's name is priced; the rest of the object is the upstream's."""
    if not isinstance(svg, dict):
        raise wrong_type("svg", "an object", svg)
    check_spelling(svg, KNOWN_OF_SVG, "svg")
    model = svg.get("model")
    if model is not None and not isinstance(model, str):
        raise wrong_type("svg.model", "a string", model)


def _without_nulls(value: object) -> Json:
    """Like ``settled``, for an object whose nulls mean what their absence means."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return settled(value)


def settled(value: object) -> Json:
    """A parsed value with its long strings replaced by ``{"sha256": ..., "bytes": ...}``."""
    if isinstance(value, Hole):
        return {"sha256": value.digest, "bytes": value.end - value.start}
    if isinstance(value, list):
        return [settled(item) for item in value]
    if isinstance(value, dict):
        return {name: settled(item) for name, item in value.items()}
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} is not JSON")


def kind_of(value: object) -> str:
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number with a fraction"),
        (str, "a string"),
        (Hole, "a very long string"),
        (list, "an array"),
        (dict, "an object"),
    )
    return next((said for kind, said in kinds if isinstance(value, kind)), "null")


def missing(param: str, wanted: str) -> InvalidRequest:
    return InvalidRequest(
        f"Missing required parameter: '{param}'. Send {wanted}",
        code="missing_required_parameter",
        param=param,
        reason="invalid_param",
    )


def wrong_type(param: str, wanted: str, value: object) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid type for '{param}': expected {wanted}, but got {kind_of(value)}.",
        code="invalid_type",
        param=param,
        reason="invalid_param",
    )


def duplicate(name: str) -> InvalidRequest:
    name = name[:64]
    return InvalidRequest(
        f"Duplicate parameter: '{name}'. You provided multiple values for this parameter, whereas "
        "only one is allowed. If you are trying to provide a list of values, use the array syntax "
        f"instead e.g. '{name}[]=<value>'.",
        code="duplicate_parameter",
        param=name,
        reason="invalid_param",
    )


def _too_many(param: str, limit: int) -> InvalidRequest:
    return InvalidRequest(
        f"Too many pictures in '{param}': one edit takes at most {limit}.",
        code="invalid_value",
        param=param,
        reason="invalid_param",
    )


def bad_json(bad: BadJson) -> InvalidRequest:
    return InvalidRequest(f"The body cannot be read as JSON. {bad}", code=bad.code, reason=bad.code)
