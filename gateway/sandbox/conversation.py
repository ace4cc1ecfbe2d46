"""A request for a response, understood: what is said, shown and asked for (contract 3.4)."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType

from gateway.domain.call import Json, Operation
from gateway.sandbox.archive import Recall
from gateway.sandbox.forms import Form, Upload, kind_of, picture, upload
from gateway.sandbox.models import TEXT_MODELS, Listed
from gateway.sandbox.pictures import MAX_IMAGE_BYTES, check_picture, open_picture
from gateway.sandbox.refusals import (
    Refused,
    bad_value,
    in_range,
    missing,
    unknown,
    wrong_type,
)
from gateway.sandbox.validate import MAX_IMAGES, MAX_PROMPT, Order, check

TOOL = "image_generation"
DEFAULT_IMAGE_MODEL = "gpt-image-2.6-sunburst"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MIN_OUTPUT_TOKENS = 16
_UNBOUNDED = 10**12
_TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = MappingProxyType(
    {
        "model": (str, "a string"),
        "input": ((str, list), "one of a string or an array"),
        "background": (bool, "a boolean"),
        "conversation": ((str, dict), "one of a string or an object"),
        "include": (list, "an array"),
        "instructions": (str, "a string"),
        "max_output_tokens": (int, "an integer"),
        "max_tool_calls": (int, "an integer"),
        "metadata": (dict, "an object"),
        "parallel_tool_calls": (bool, "a boolean"),
        "previous_response_id": (str, "a string"),
        "prompt": (dict, "an object"),
        "prompt_cache_key": (str, "a string"),
        "reasoning": (dict, "an object"),
        "safety_identifier": (str, "a string"),
        "service_tier": (str, "a string"),
        "store": (bool, "a boolean"),
        "stream": (bool, "a boolean"),
        "stream_options": (dict, "an object"),
        "temperature": ((int, float), "a decimal number"),
        "text": (dict, "an object"),
        "tool_choice": ((str, dict), "one of a string or an object"),
        "tools": (list, "an array"),
        "top_logprobs": (int, "an integer"),
        "top_p": ((int, float), "a decimal number"),
        "truncation": (str, "a string"),
        "user": (str, "a string"),
    }
)
_TOOL_FIELDS = frozenset(
    {
        "background",
        "complexity",
        "frame_count",
        "frame_duration_ms",
        "input_fidelity",
        "model",
        "moderation",
        "output_compression",
        "output_format",
        "quality",
        "size",
        "svg",
    }
)
"""Those that mean the same in the images API; the tool's others are read here."""
_OTHER_TOOLS = frozenset(
    {"function", "custom", "web_search", "web_search_preview", "code_interpreter", "file_search"}
    | {"mcp", "local_shell", "shell", "computer", "apply_patch"}
)
_PICTURE_FIELDS = frozenset({"type", "image_url", "file_id", "detail", "prompt_cache_breakpoint"})
_SILENT_ITEMS = frozenset(
    {"reasoning", "function_call", "function_call_output", "custom_tool_call"}
    | {"custom_tool_call_output"}
)


@dataclass(frozen=True, slots=True)
class Ask:
    """A good request. ``items`` are the input as it is given back, ``text`` all of it that is
    counted. ``order`` is one call of the image tool, None where it is not to be called."""

    model: Listed
    fields: Mapping[str, Json]
    tools: list[Json]
    items: list[Json]
    text: str
    prompt: str
    seen_pictures: int = 0
    order: Order | None = None
    action: str = "generate"
    partial_images: int = 0
    effort: str | None = None
    context_tokens: int = 0
    earlier_pictures: tuple[str, ...] = ()

    @property
    def max_output_tokens(self) -> int | None:
        return self._limit("max_output_tokens")

    @property
    def max_tool_calls(self) -> int | None:
        return self._limit("max_tool_calls")

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name)
        return value if isinstance(value, bool) else default

    def _limit(self, name: str) -> int | None:
        value = self.fields.get(name)
        return value if isinstance(value, int) else None


@dataclass(slots=True)
class _Heard:
    """The input, as far as it was read. ``pictures`` are shown, the earlier ones first;
    ``earlier`` are ids."""

    items: list[Json] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    prompt: str = ""
    pictures: list[Upload] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    seen: int = 0


def understand(fields: Mapping[str, Json], recall: Recall, now: datetime) -> Ask:
    """The request that a body is. Raises ``Refused``."""
    sent = {name: value for name, value in fields.items() if value is not None}
    _typed(sent)
    model = _model(sent)
    heard, context = _Heard(), 0
    previous = sent.get("previous_response_id")
    if isinstance(previous, str):
        found = recall.response(previous)
        if found is None:
            raise Refused(
                f"Previous response with id '{previous}' not found.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        context = found.context_tokens
        for id_ in found.pictures:
            if recall.item(id_) is not None:
                _remember(heard, id_, recall)
    _hear(heard, sent["input"], recall)
    instructions = sent.get("instructions")
    if isinstance(instructions, str):
        heard.texts.append(instructions.encode("utf-8", "replace").decode())
    tools = _tools(sent)
    place, tool = next(
        ((place, tool) for place, tool in enumerate(tools) if tool["type"] == TOOL), (0, None)
    )
    action, partials, order = "generate", 0, None
    if tool is not None:
        action, partials, order = _order(tool, f"tools[{place}]", heard, recall, now)
    if sent.get("tool_choice") == "none":
        order = None
    _choice(sent, tools)
    return Ask(
        model=model,
        fields=sent,
        tools=list(tools),
        items=heard.items,
        text="\n".join(heard.texts),
        prompt=heard.prompt,
        seen_pictures=heard.seen,
        order=order,
        action=action,
        partial_images=partials,
        effort=_effort(model, sent),
        context_tokens=context,
        earlier_pictures=tuple(heard.earlier),
    )


def _typed(fields: Mapping[str, Json]) -> None:
    for name, value in fields.items():
        if name not in _TYPES:
            raise unknown(name)
        wanted, words = _TYPES[name]
        # In Python True is an int; in JSON it is not.
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise wrong_type(name, words, value)
    limit, calls = fields.get("max_output_tokens"), fields.get("max_tool_calls")
    if isinstance(limit, int):
        in_range("max_output_tokens", limit, MIN_OUTPUT_TOKENS, _UNBOUNDED)
    if isinstance(calls, int):
        in_range("max_tool_calls", calls, 1, _UNBOUNDED)
    if "input" not in fields:
        raise missing("input")
    if fields.get("background") is True and fields.get("store") is False:
        raise Refused("Background mode requires 'store' to be true.", code=None, param="store")
    for name in ("conversation", "prompt"):
        if name in fields:
            raise Refused(
                f"The sandbox keeps no {name}s.", code="not_found", param=name, status=404
            )


def _model(fields: Mapping[str, Json]) -> Listed:
    if "model" not in fields:
        raise missing("model")
    name = fields["model"]
    model = next((row for row in TEXT_MODELS if row.id == name), None)
    if model is None:
        raise Refused(
            f"The requested model '{name}' does not exist.",
            code="model_not_found",
            param="model",
        )
    return model


def _effort(model: Listed, fields: Mapping[str, Json]) -> str | None:
    """None for a model that does not reason."""
    asked = fields.get("reasoning")
    effort = asked.get("effort") if isinstance(asked, dict) else None
    if model.id.startswith("gpt-4"):
        if effort is not None:
            raise Refused(
                "Unsupported parameter: 'reasoning.effort' is not supported with this model.",
                code="unsupported_parameter",
                param="reasoning.effort",
            )
        return None
    if effort is None:
        return "medium"
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise bad_value("reasoning.effort", effort, EFFORTS)
    return effort


def _hear(heard: _Heard, said: Json, recall: Recall) -> None:
    """Reads the input, a text or items."""
    if isinstance(said, str):
        said = [{"type": "message", "role": "user", "content": said}]
    for place, item in enumerate(said if isinstance(said, list) else []):
        name = f"input[{place}]"
        if not isinstance(item, dict):
            raise wrong_type(name, "an object", item)
        id_ = item.get("id")
        # A reference need not say that it is one (openai-python, ItemReference.type).
        usual = "message" if item.get("role") is not None else "item_reference"
        kind = usual if item.get("type") is None else item["type"]
        if kind == "message":
            _message(heard, name, item, recall)
        elif kind in (TOOL + "_call", "item_reference"):
            if not isinstance(id_, str):
                raise missing(f"{name}.id")
            _remember(heard, id_, recall)
            heard.items.append(recall.item(id_) or item)
        elif kind in _SILENT_ITEMS:
            heard.texts.append(json.dumps(item))
            heard.items.append({"id": f"item_{secrets.token_hex(24)}", **item})
        else:
            kinds = ("message", TOOL + "_call", "item_reference", *sorted(_SILENT_ITEMS))
            raise bad_value(f"{name}.type", kind, kinds)


def _message(heard: _Heard, name: str, item: dict[str, Json], recall: Recall) -> None:
    role, content = item.get("role"), item.get("content")
    roles = ("assistant", "system", "developer", "user")
    if not isinstance(role, str) or role not in roles:
        raise bad_value(f"{name}.role", role, roles)
    spoken = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        content = [{"type": spoken, "text": content}]
    if not isinstance(content, list):
        raise wrong_type(f"{name}.content", "one of a string or an array", content)
    texts: list[str] = []
    for place, part in enumerate(content):
        at = f"{name}.content[{place}]"
        if not isinstance(part, dict):
            raise wrong_type(at, "an object", part)
        kind, text = part.get("type"), part.get("text")
        if kind in ("input_text", "output_text", "refusal"):
            if not isinstance(text, str):
                raise (
                    missing(f"{at}.text")
                    if text is None
                    else wrong_type(f"{at}.text", "a string", text)
                )
            # Half a surrogate pair is legal in JSON and has no bytes.
            texts.append(text.encode("utf-8", "replace").decode())
        elif kind == "input_image":
            heard.pictures.append(_shown(at, part, recall))
            heard.seen += 1
        else:
            raise bad_value(f"{at}.type", kind, ("input_text", "input_image", "output_text"))
    heard.texts += texts
    if role == "user" and texts:
        heard.prompt = "\n".join(texts)
    heard.items.append(
        {
            "id": f"msg_{secrets.token_hex(24)}",
            "type": "message",
            "status": "completed",
            "role": role,
            "content": content,
        }
    )


def _shown(name: str, part: Mapping[str, Json], recall: Recall) -> Upload:
    """A picture of a message."""
    extra = next((key for key in part if key not in _PICTURE_FIELDS), None)
    if extra is not None:
        raise unknown(f"{name}.{extra}")
    holder: dict[str, Json] = {
        key: part[key] for key in ("image_url", "file_id") if part.get(key) is not None
    }
    found = picture(name, holder, recall.file)
    check_picture(name, holder, {found.part.field} if found is not None else set())
    assert found is not None
    open_picture("image", found.part.field, found, MAX_IMAGE_BYTES)
    return found


def _remember(heard: _Heard, id_: str, recall: Recall) -> None:
    """An item of an earlier response; a picture is one more to work from."""
    item = recall.item(id_)
    if item is None:
        raise Refused(
            f"Item with id '{id_}' not found. Items are not persisted when `store` is set to "
            "false. Try again with `store` set to true, or remove this item from your input.",
            code=None,
            param="input",
            status=404,
        )
    result = item.get("result")
    if isinstance(result, str) and id_ not in heard.earlier:
        content = base64.b64decode(result)
        heard.earlier.append(id_)
        heard.pictures.append(upload(id_, "", kind_of(content), content))


def _tools(fields: Mapping[str, Json]) -> list[dict[str, Json]]:
    given = fields.get("tools", [])
    tools: list[dict[str, Json]] = []
    for place, tool in enumerate(given if isinstance(given, list) else []):
        if not isinstance(tool, dict):
            raise wrong_type(f"tools[{place}]", "an object", tool)
        if "type" not in tool:
            raise missing(f"tools[{place}].type")
        kind = tool["type"]
        if kind != TOOL and kind not in _OTHER_TOOLS:
            raise bad_value(f"tools[{place}].type", kind, (TOOL, *sorted(_OTHER_TOOLS)))
        if kind in ("function", "custom") and not isinstance(tool.get("name"), str):
            raise missing(f"tools[{place}].name")
        tools.append(tool)
    return tools


def _choice(fields: Mapping[str, Json], tools: list[dict[str, Json]]) -> None:
    choice = fields.get("tool_choice", "auto")
    modes = ("none", "auto", "required")
    if isinstance(choice, str):
        if choice not in modes:
            raise bad_value("tool_choice", choice, modes)
        return
    wanted = choice.get("type") if isinstance(choice, dict) else None
    if wanted == TOOL and not any(tool["type"] == TOOL for tool in tools):
        raise Refused(
            f"Tool choice '{TOOL}' not found in 'tools' parameter.",
            code=None,
            param="tool_choice",
        )


def _order(
    tool: Mapping[str, Json],
    name: str,
    heard: _Heard,
    recall: Recall,
    now: datetime,
) -> tuple[str, int, Order]:
    """The tool's action, its partial images and one call of it, checked as an image request."""
    sent = {key: value for key, value in tool.items() if value is not None and key != "type"}
    action = sent.pop("action", "auto")
    if action not in ("generate", "edit", "auto"):
        raise bad_value(f"{name}.action", action, ("generate", "edit", "auto"))
    partials = sent.pop("partial_images", 0)
    if not isinstance(partials, int) or isinstance(partials, bool):
        raise wrong_type(f"{name}.partial_images", "an integer", partials)
    in_range(f"{name}.partial_images", partials, 0, 3)
    mask = sent.pop("input_image_mask", None)
    extra = next((key for key in sent if key not in _TOOL_FIELDS), None)
    if extra is not None:
        raise unknown(f"{name}.{extra}")
    # What is shown beyond the images API's limit is seen, not worked on.
    shown = heard.pictures[-MAX_IMAGES:] if action != "generate" else []
    fields: dict[str, Json] = {
        "model": DEFAULT_IMAGE_MODEL,
        **sent,
        "prompt": heard.prompt[:MAX_PROMPT] or "A picture",
    }
    uploads = []
    if shown:
        fields["images"] = [{"image_url": ""} for _ in shown]
        uploads = [
            upload(f"images[{place}].image_url", "", one.part.content_type, one.content)
            for place, one in enumerate(shown)
        ]
        if mask is not None:
            layer = picture("mask", mask, recall.file)
            check_picture(f"{name}.input_image_mask", mask, _paths(layer, name))
            if layer is not None:
                fields["mask"] = {"image_url": ""}
                uploads.append(upload("mask.image_url", "", layer.part.content_type, layer.content))
    elif action == "edit" or mask is not None:
        raise Refused(
            "There is no image to edit in the input.", code="invalid_value", param=f"{name}.action"
        )
    else:
        fields.pop("input_fidelity", None)
    operation = Operation.EDIT if shown else Operation.GENERATION
    try:
        order = check(operation, Form(fields, tuple(uploads)), now)
    except Refused as refused:
        at = refused.error["param"]
        where = "input_image_mask" if at == "mask" else at
        refused.error["param"] = f"{name}.{where}"
        raise
    # A GIF's or an SVG's events are sent without partial images (contract 3.4).
    still = order.output_format not in ("gif", "svg")
    return "edit" if shown else "generate", partials if still else 0, order


def _paths(layer: Upload | None, name: str) -> set[str]:
    """Where a mask was found, as the tool names it."""
    if layer is None:
        return set()
    return {layer.part.field.replace("mask", f"{name}.input_image_mask", 1)}
