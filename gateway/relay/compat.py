"""What older clients send, mended for the models of today; every repair is told. Pure.

Nothing is guessed: what is changed here would be refused as it came, or could not be answered.
Of a model that is none of OpenAI's pictures nothing is known, so its calls are sent as they came.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from gateway.domain.call import AnswerAs, Call, Change, Edit, FileSpot, InputImage, Json, Mend
from gateway.domain.compat import Compat
from gateway.domain.errors import InvalidRequest
from gateway.domain.family import FIXED_SIZES, family_of, is_gpt_image
from gateway.domain.price import parse_size
from gateway.domain.route import Model
from gateway.relay.inputs import OCTETS, PICTURE_ROLES
from gateway.relay.picture import JPEG, PNG, WEBP
from gateway.relay.read import duplicate, missing

QUALITIES: Mapping[str, str] = {"standard": "medium", "hd": "high"}
"""Those of dall-e-3, and what the contract calls them today (1.2)."""
URL_BY_DEFAULT = frozenset({"dall-e-2", "dall-e-3"})
"""Who asks for these by name and says no format expects urls: that was their default
(openai-python 1.109, ``types.Image.url``)."""
_ENDINGS: Mapping[str, tuple[str, ...]] = {
    PNG: (".png",),
    JPEG: (".jpg", ".jpeg"),
    WEBP: (".webp",),
}
_PLAIN = re.compile(r"[\w !#$&'()+,.=@^{}~-]{1,200}")
"""A file's name that every reader of forms reads alike."""
_ENDING = re.compile(r"\.[A-Za-z0-9]{1,5}")


def routed_name(call: Call, models: Mapping[str, Model], compat: Compat) -> str:
    """The configured model that a call is for. Raises ``InvalidRequest`` where none is named."""
    name = call.model or compat.default_model
    if not name:
        raise missing("model", "the name of a model; GET /v1/models lists yours.")
    return alias_of(name, models, compat)


def alias_of(name: str, models: Mapping[str, Model], compat: Compat) -> str:
    """What a name leads to: a model goes before an alias of the same name."""
    return name if name in models else compat.aliases.get(name, name)


def repaired(
    call: Call, model: Model, compat: Compat, *, hosting: bool, served: str | None = None
) -> Call:
    """``call`` as it is sent to ``model``, where that is ``served``; None: at its first target.
    ``hosting``: pictures can be handed over by urls.

    Raises ``InvalidRequest`` for what could be meant but not be done.
    """
    served = model.target.model if served is None else served
    ours, answer_as = is_gpt_image(served), call.answer_as
    changes: list[Change] = []
    # A path that names a model is the client's own word, as its body is.
    if (call.model_said or call.model) != model.name:
        changes.append(Change("model", call.model_said, model.name))
    if ours:
        if compat.response_format:
            if "response_format" in call.layout.fields:
                changes += _of_response_format(call)
            answer_as = _answer_as(call, hosting=hosting)
        changes += _of_fields(call, served, compat)
    typing = compat.media_types and ours
    mends = tuple(_of_files(call, compat, typing=typing)) if call.layout.files else ()
    if not changes and not mends:
        return call if call.model == model.name else replace(call, model=model.name)
    words: dict[str, Json] = {
        change.name: change.after for change in changes if change.name != "model"
    }
    parameters = {**call.parameters, **words}
    return replace(
        call,
        model=model.name,
        parameters={name: value for name, value in parameters.items() if value is not None},
        size=str(words.get("size", call.size)),
        quality=str(words.get("quality", call.quality)),
        changes=(*call.changes, *changes),
        mends=(*call.mends, *mends),
        answer_as=answer_as,
        inputs=_typed(call) if mends and typing else call.inputs,
    )


def _answer_as(call: Call, *, hosting: bool) -> AnswerAs:
    """A stream is never answered by urls: who reads events reads base64 from them."""
    asked = call.parameters.get("response_format")
    expected = asked is None and (call.model_said or call.model) in URL_BY_DEFAULT
    if call.stream or not (asked == AnswerAs.URL or (expected and hosting)):
        return call.answer_as
    if not hosting:
        raise InvalidRequest(
            "response_format 'url' cannot be answered: this gateway has no public address that a "
            "picture could be fetched from. Leave 'response_format' out and read 'b64_json', or "
            "ask the gateway's operator to set server.public_url.",
            code="urls_not_available",
            param="response_format",
            reason="invalid_param",
        )
    return AnswerAs.URL


def _of_response_format(call: Call) -> Sequence[Change]:
    """What it asks for is done here, or is what there is; other words are the upstream's to
    refuse. A null is cut too: its name alone is refused."""
    asked = call.parameters.get("response_format")
    return (Change("response_format", asked, None),) if asked in (None, *AnswerAs) else ()


def _of_fields(call: Call, served: str, compat: Compat) -> Sequence[Change]:
    changes: list[Change] = []
    if compat.style and "style" in call.layout.fields:
        changes.append(Change("style", call.parameters.get("style"), None))
    if compat.quality and call.quality in QUALITIES:
        changes.append(Change("quality", call.quality, QUALITIES[call.quality]))
    pixels = parse_size(call.size) if compat.sizes else None
    if pixels is not None and (size := served_size(served, *pixels)) is not None:
        changes.append(Change("size", call.size, size))
    return changes


@lru_cache(maxsize=256)
def served_size(served: str, width: int, height: int) -> str | None:
    """The standard size whose shape is nearest to one that the model does not serve, in pixels;
    None where it does, or where that is not known."""
    family = family_of(served)
    if family is None or not family.size_problem(width, height):
        return None
    wide, high = min(
        FIXED_SIZES, key=lambda size: abs(math.log(size[0] * height / (size[1] * width)))
    )
    return f"{wide}x{high}"


def _of_files(call: Call, compat: Compat, *, typing: bool) -> Iterator[Mend]:
    """The parts whose headers are written anew; ``typing``: with the types that their bytes say.

    Raises ``InvalidRequest`` for pictures that are all called ``image``, unless those are a list
    here: what an upstream would make of them is not known.
    """
    files = call.layout.files
    several = sum(file.name == "image" for file in files) > 1
    if several and not compat.repeated_images:
        raise duplicate("image")
    for file, picture in zip(files, call.inputs, strict=True):
        mended = typing and _is_untyped(file, picture)
        renamed = several and file.name == "image"
        changes = (
            *((Change("content_type", file.media_type or None, file.seen),) if mended else ()),
            *((Change("image", "image", "image[]"),) if renamed else ()),
        )
        if changes:
            yield Mend(changes, Edit(file.head, _head(file, mended=mended, renamed=renamed)))


def _is_untyped(file: FileSpot, picture: InputImage) -> bool:
    return picture.role in PICTURE_ROLES and picture.media_type == OCTETS and file.seen in _ENDINGS


def _typed(call: Call) -> tuple[InputImage, ...]:
    """The pictures with the types that their parts now have."""
    return tuple(
        replace(picture, media_type=file.seen) if _is_untyped(file, picture) else picture
        for file, picture in zip(call.layout.files, call.inputs, strict=True)
    )


def _head(file: FileSpot, *, mended: bool, renamed: bool) -> bytes:
    """The headers of a part. A name that readers could take for another one is not kept."""
    field = "image[]" if renamed else file.name
    name = file.filename if _PLAIN.fullmatch(file.filename) else file.name.partition("[")[0]
    if mended:
        name = _ended(name, _ENDINGS[file.seen])
    media_type = file.seen if mended else file.media_type
    head = f'Content-Disposition: form-data; name="{field}"; filename="{name}"'.encode()
    # As it was declared: bytes that the scanner read as Latin-1.
    return head + (b"\r\nContent-Type: " + media_type.encode("latin-1") if media_type else b"")


def _ended(name: str, endings: tuple[str, ...]) -> str:
    """A file's name with an ending that fits: its own, or in place of its own."""
    stem, dot, ending = name.rpartition(".")
    if dot and f".{ending.lower()}" in endings:
        return name
    return (stem if stem and _ENDING.fullmatch(f".{ending}") else name) + endings[0]
