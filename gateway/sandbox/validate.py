"""What OpenAI refuses today, in its own words (contract 1.2, 2.2, 4.2).

Messages marked [L] in the contract are exact. The others follow OpenAI's general forms
("Invalid type for ...", "Invalid value: ...", "integer above maximum value"), whose ``type``,
``code`` and ``param`` are what a client can rely on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType

from gateway.domain.call import Json, Operation
from gateway.sandbox.forms import Form, Upload
from gateway.sandbox.models import Family, ModelFacts, find
from gateway.sandbox.pictures import (
    MAX_IMAGE_BYTES,
    MAX_MASK_BYTES,
    Given,
    check_layer,
    check_picture,
    open_picture,
)
from gateway.sandbox.refusals import (
    USER_ERROR,
    Refused,
    bad_value,
    duplicate,
    in_range,
    missing,
    too_many,
    unknown,
    wrong_type,
)

MAX_PROMPT = 32_000
MAX_IMAGES = 16
OLD_SIZES = ("1024x1024", "1024x1536", "1536x1024")
MIN_PIXELS, MAX_PIXELS, MAX_EDGE = 655_360, 8_294_400, 3840
SVG_AUTHOR = "gpt-6-astra"
"""Who writes an SVG when the request names nobody; the real default is not published."""

_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
_IMAGE_FIELD = re.compile(r"image(\[[0-9]*\])?")
_JSON_IMAGE = re.compile(r"images\[([0-9]+)\]\.(image_url|file_id)")

_TYPES: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "prompt": (str, "a string"),
        "model": (str, "a string"),
        "size": (str, "a string"),
        "quality": (str, "a string"),
        "complexity": (str, "a string"),
        "background": (str, "a string"),
        "moderation": (str, "a string"),
        "output_format": (str, "a string"),
        "input_fidelity": (str, "a string"),
        "safety_identifier": (str, "a string"),
        "user": (str, "a string"),
        "n": (int, "an integer"),
        "output_compression": (int, "an integer"),
        "frame_count": (int, "an integer"),
        "frame_duration_ms": (int, "an integer"),
        "partial_images": (int, "an integer"),
        "stream": (bool, "a boolean"),
        "svg": (dict, "an object"),
        "images": (list, "an array"),
        "mask": (dict, "an object"),
        "markup": (dict, "an object"),
    }
)
_EDIT_ONLY = frozenset({"input_fidelity"})
_JSON_FILES = frozenset({"images", "mask", "markup"})
_RANGES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "n": (1, 10),
        "output_compression": (0, 100),
        "frame_count": (2, 16),
        "frame_duration_ms": (1, 655_350),
        "partial_images": (0, 3),
    }
)


@dataclass(frozen=True, slots=True)
class Order:
    """A good request, every ``auto`` resolved: size to 1024x1024, quality to medium, background
    to opaque."""

    operation: Operation
    model: ModelFacts
    prompt: str
    n: int = 1
    width: int = 1024
    height: int = 1024
    quality: str = "medium"
    background: str = "opaque"
    output_format: str = "png"
    output_compression: int = 100
    frame_count: int = 1
    frame_duration_ms: int = 200
    stream: bool = False
    partial_images: int = 0
    input_fidelity: str = "low"
    safety_identifier: str | None = None
    svg_model: str = SVG_AUTHOR
    svg_effort: str = "medium"
    inputs: tuple[Given, ...] = ()

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def images(self) -> list[Given]:
        return [given for given in self.inputs if given.role == "image"]


def check(operation: Operation, form: Form, now: datetime) -> Order:
    """The order that a form is, or ``Refused``. Decodes no picture: headers are enough."""
    sent = {name: value for name, value in form.fields.items() if value is not None}
    model = _model(sent, now)
    fields = _typed(operation, sent, form)
    if "prompt" not in fields:
        raise missing("prompt")
    order = _order(operation, model, fields)
    if operation is Operation.EDIT:
        order = _with_inputs(order, fields, form)
    _combinations(order, fields)
    return order


def _model(fields: Mapping[str, Json], now: datetime) -> ModelFacts:
    """First of all, since which parameters there are depends on it."""
    if "model" not in fields:
        raise missing("model")
    name = fields["model"]
    if not isinstance(name, str):
        raise wrong_type("model", "a string", name)
    model = find(name, now)
    if model is None:
        raise Refused(
            f"The model '{name}' does not exist.",
            type_=USER_ERROR,
            code="invalid_value",
            param="model",
        )
    return model


def _typed(operation: Operation, fields: Mapping[str, Json], form: Form) -> dict[str, Json]:
    """Known fields only, each of its type and in its range; texts of a form converted."""
    edit = operation is Operation.EDIT
    known = set(_TYPES) - (set() if edit else _EDIT_ONLY)
    known -= set() if edit and not form.texts else _JSON_FILES
    typed: dict[str, Json] = {}
    for name, given in fields.items():
        if name not in known:
            if edit and form.texts and name in ("image", "mask", "markup"):
                raise wrong_type(name, "a file", given)
            raise unknown(name)
        if name in form.repeated:
            raise duplicate(name)
        wanted, words = _TYPES[name]
        value = _convert(wanted, given) if form.texts else given
        # In Python True is an int; in JSON it is not.
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise wrong_type(name, words, given)
        if isinstance(value, int) and name in _RANGES:
            in_range(name, value, *_RANGES[name])
        typed[name] = value
    return typed


def _convert(wanted: type, text: Json) -> Json:
    """The value that a form's text stands for, or the text where it stands for none."""
    if wanted is int and isinstance(text, str) and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if wanted is bool and text in ("true", "false"):
        return text == "true"
    return text


def _order(operation: Operation, model: ModelFacts, fields: Mapping[str, Json]) -> Order:
    text = {name: value for name, value in fields.items() if isinstance(value, str)}
    number = {name: value for name, value in fields.items() if isinstance(value, int)}
    # Half a surrogate pair is legal in JSON and has no bytes.
    prompt = text["prompt"].encode("utf-8", "replace").decode()
    if not prompt:
        raise Refused(
            "Invalid 'prompt': empty string. Expected a string with minimum length 1, but got an "
            "empty string instead.",
            code="empty_string",
            param="prompt",
        )
    if len(prompt) > MAX_PROMPT:
        raise Refused(
            f"Invalid 'prompt': string too long. Expected a string with maximum length "
            f"{MAX_PROMPT}, but got a string with length {len(prompt)} instead.",
            code="string_above_max_length",
            param="prompt",
        )
    quality = _choice(text, "quality", (*model.family.qualities, "auto"), "auto")
    background = _choice(text, "background", ("transparent", "opaque", "auto"), "auto")
    _choice(text, "moderation", ("low", "auto"), "auto")
    _choice(text, "complexity", ("low", "medium", "high"), "medium")
    animated = () if model.family is Family.ONE else ("gif", "svg")
    output_format = _choice(text, "output_format", ("png", "webp", "jpeg", *animated), "png")
    width, height = _size(model.family, text.get("size", "auto"))
    author, effort = _svg(fields)
    return Order(
        operation=operation,
        model=model,
        prompt=prompt,
        n=number.get("n", 1),
        width=width,
        height=height,
        quality="medium" if quality == "auto" else quality,
        background="opaque" if background == "auto" else background,
        output_format=output_format,
        output_compression=number.get("output_compression", 100),
        frame_count=number.get("frame_count", 9) if output_format == "gif" else 1,
        frame_duration_ms=number.get("frame_duration_ms", 200),
        stream=bool(fields.get("stream", False)),
        partial_images=number.get("partial_images", 0),
        input_fidelity=_fidelity(model, text),
        safety_identifier=text.get("safety_identifier") or text.get("user") or None,
        svg_model=author,
        svg_effort=effort,
    )


def _size(family: Family, size: str) -> tuple[int, int]:
    """Pixels of a legal size: three for gpt-image-1.x, a grid within limits for later ones."""
    if size == "auto":
        return 1024, 1024
    found = _SIZE.fullmatch(size)
    if found is None or (family is Family.ONE and size not in OLD_SIZES):
        raise _bad_size(size, "Supported sizes are 1024x1024, 1024x1536, 1536x1024, and auto.")
    width, height = int(found[1]), int(found[2])
    if width % 16 or height % 16:
        raise _bad_size(
            size, "Supported sizes are those whose width and height are divisible by 16."
        )
    if max(width, height) > MAX_EDGE:
        raise _bad_size(size, f"Supported sizes are those of at most {MAX_EDGE} pixels an edge.")
    if max(width, height) > 3 * min(width, height):
        raise _bad_size(size, "Supported sizes are those with a ratio between 1:3 and 3:1.")
    if not MIN_PIXELS <= width * height <= MAX_PIXELS:
        raise _bad_size(
            size, f"Supported sizes are those of {MIN_PIXELS} to {MAX_PIXELS} pixels in all."
        )
    return width, height


def _svg(fields: Mapping[str, Json]) -> tuple[str, str]:
    """The author model and its effort."""
    svg = fields.get("svg")
    if not isinstance(svg, dict):
        return SVG_AUTHOR, "medium"
    extra = next((name for name in svg if name not in ("model", "reasoning")), None)
    if extra is not None:
        raise unknown(f"svg.{extra}")
    author = svg.get("model")
    if author is None:
        raise missing("svg.model")
    if not isinstance(author, str):
        raise wrong_type("svg.model", "a string", author)
    reasoning = svg.get("reasoning") or {}
    if not isinstance(reasoning, dict):
        raise wrong_type("svg.reasoning", "an object", reasoning)
    effort = reasoning.get("effort") or "medium"
    efforts = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
    if not isinstance(effort, str) or effort not in efforts:
        raise bad_value("svg.reasoning.effort", effort, efforts)
    return author, effort


def _fidelity(model: ModelFacts, text: Mapping[str, str]) -> str:
    """Which models take ``input_fidelity`` (contract 2.1); 2.5 and 2.6 are not stated, so they
    take both."""
    if "input_fidelity" not in text:
        return "low"
    if model.family is Family.TWO:
        raise Refused(
            f"The parameter 'input_fidelity' is not supported by '{model.id}'.",
            type_=USER_ERROR,
            code="invalid_value",
            param="input_fidelity",
        )
    allowed = ("low",) if model.id == "gpt-image-1-mini" else ("high", "low")
    return _choice(text, "input_fidelity", allowed, "low")


def _combinations(order: Order, fields: Mapping[str, Json]) -> None:
    """What is legal alone and not together (contract 1.2)."""
    drawn = order.output_format
    if drawn == "png" and order.output_compression < 100:
        raise _conflict(
            "output_compression", "Compression less than 100 is not supported for PNG output format"
        )
    if drawn in ("gif", "svg"):
        if "output_compression" in fields:
            raise _conflict(
                "output_compression", f"output_compression is not supported for {drawn} output."
            )
        if order.stream:
            raise _conflict("stream", f"Streaming is not supported for {drawn} output.")
    if order.partial_images and not order.stream:
        raise _conflict("partial_images", "partial_images is only supported when stream is true.")
    if order.background == "transparent" and drawn not in ("png", "webp"):
        raise _conflict("background", "Transparent background requires png or webp output.")
    if drawn == "svg" and order.n != 1:
        raise _conflict("n", "n must be 1 for svg output.")
    for name in ("frame_count", "frame_duration_ms"):
        if name in fields and drawn != "gif":
            raise _conflict(name, f"{name} is only supported for gif output.")
    if "svg" in fields and drawn != "svg":
        raise _conflict("svg", "svg is only supported for svg output.")
    roles = {given.role for given in order.inputs}
    if drawn == "gif" and "mask" in roles:
        raise _conflict("mask", "Masks are not supported for gif output.")
    if {"mask", "markup"} <= roles:
        raise _conflict("markup", "markup cannot be combined with mask.")
    if "markup" in roles and order.model.family not in (Family.TWO_FIVE, Family.TWO_SIX):
        raise _conflict("markup", f"markup is not supported by '{order.model.id}'.")


def _with_inputs(order: Order, fields: Mapping[str, Json], form: Form) -> Order:
    """The pictures of an edit, looked at."""
    if not form.texts:
        _references(fields, form.uploads)
    images, others = [], []
    for upload in form.uploads:
        name = upload.part.field
        if _IMAGE_FIELD.fullmatch(name) or _JSON_IMAGE.fullmatch(name):
            images.append(upload)
        elif name.partition(".")[0] in ("mask", "markup"):
            others.append(upload)
        else:
            raise unknown(name)
    names = [upload.part.field for upload in form.uploads]
    for single in ("image", "mask", "markup"):
        if names.count(single) > 1:
            raise duplicate(single)
    if not images:
        raise missing("image" if form.texts else "images")
    if len(images) > MAX_IMAGES:
        raise too_many(len(images), "image" if form.texts else "images", MAX_IMAGES)
    given = [
        open_picture("image", _label(upload, place), upload, MAX_IMAGE_BYTES)
        for place, upload in enumerate(images)
    ]
    for upload in others:
        role = upload.part.field.partition(".")[0]
        layer = open_picture(role, role, upload, MAX_MASK_BYTES)
        wanted = given[0].upright if role == "markup" else (given[0].width, given[0].height)
        check_layer(role, upload, (layer.width, layer.height), wanted)
        given.append(layer)
    return replace(order, inputs=tuple(given))


def _references(fields: Mapping[str, Json], uploads: Iterable[Upload]) -> None:
    """The JSON form: every item a data URL or a stored file."""
    read = {upload.part.field for upload in uploads}
    images = fields.get("images", [])
    holders: list[tuple[str, Json]] = []
    if isinstance(images, list):
        if len(images) > MAX_IMAGES:
            raise too_many(len(images), "images", MAX_IMAGES)
        holders += [(f"images[{place}]", image) for place, image in enumerate(images)]
    holders += [(name, fields[name]) for name in ("mask", "markup") if name in fields]
    for name, holder in holders:
        check_picture(name, holder, read)


def _label(upload: Upload, place: int) -> str:
    """How OpenAI names an image in an error: ``image``, or ``image[0]`` of a list."""
    name = upload.part.field
    return f"image[{place}]" if name == "image[]" else name


def blocked(prompt: str, request_id: str) -> Refused | None:
    """A refusal for two words that nobody means, so that it can be tried without meaning harm."""
    folded = prompt.lower()
    if "moderationtest" not in folded and "forbidden-by-sandbox" not in folded:
        return None
    return Refused(
        "Your request was rejected by the safety system. If you believe this is an error, "
        f"contact us at help.openai.com and include the request ID {request_id}.",
        type_=USER_ERROR,
        code="moderation_blocked",
        extra={"moderation_details": {"moderation_stage": "input", "categories": ["violence"]}},
    )


def _choice(text: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = text.get(name, default)
    if value not in allowed:
        raise bad_value(name, value, allowed)
    return value


def _bad_size(size: str, supported: str) -> Refused:
    return Refused(
        f"Invalid size '{size}'. {supported}", type_=USER_ERROR, code="invalid_value", param="size"
    )


def _conflict(name: str, message: str) -> Refused:
    return Refused(message, type_=USER_ERROR, code="invalid_value", param=name)


def the_file(form: Form) -> Upload:
    """The one file of a form, in its field ``file``. Raises ``Refused``."""
    for upload in form.uploads:
        if upload.part.field != "file":
            raise unknown(upload.part.field)
    if not form.uploads:
        raise missing("file")
    if len(form.uploads) > 1:
        raise duplicate("file")
    return form.uploads[0]
