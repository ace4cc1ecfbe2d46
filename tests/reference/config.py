"""The page of every setting.

What a setting is called, what it may be and its default come from the typed tree of
``gateway/settings.py``; what it means, from the comment beside it in ``config/gateway.yaml``;
when a change of it holds, from ``gateway/reload.py``. A setting that none of them explains, and a
form that nobody put into words, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from datetime import timedelta
from enum import StrEnum
from inspect import getclosurevars
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from gateway import settings as tree
from gateway.reading import names_of
from gateway.reload import swapped
from gateway.settings import Settings, load
from tests.reference.markdown import table

ROOT = Path(__file__).parents[2]
FILE = ROOT / "config" / "gateway.yaml"

_FORMS: Mapping[str, str] = MappingProxyType(
    {
        "admin_key": "a text",
        "api_key": "a key",
        "base_url": "a url",
        "blobs": "a folder",
        "collector": "a url",
        "collector_headers": "a table of names and values",
        "database": "a url: `sqlite:///`, `postgresql://`",
        "existing_file": "a file that exists",
        "header_value": "a line of ASCII",
        "_named_upstream": "the name of an upstream",
        "headers": "a table of names and values",
        "_keep": "a time of a day or more",
        "_kind": "`openai` or `sandbox`",
        "network": "an address or a network",
        "origin": 'the origin of a page, or `"*"`',
        "any_path": "a path",
        "pepper": "a text, best of 32 characters or more",
        "provider_admin_key": "a key",
        "proxy": "a url",
        "public_url": "a url",
        "redis": "a url: `redis://`, `rediss://`, `redis+cluster://`, `redis+sentinel://`",
        "_row": "a row as in `prices.yaml`",
        "team_secret": "a key of 20 characters or more",
        "time_zone": "the name of a time zone",
        "verify": "`true`, or the file of a CA bundle",
        "webhook": "a url",
        "webhook_secret": "`whsec_` and 24 to 64 bytes in base64",
        "boolean": "`true` or `false`",
        "dollars": "dollars",
        "duration": "a time",
        "instant": "a day or a moment",
        "percent": "0 to 100",
        "share": "0 to 1",
        "size": "a size",
    }
)
"""What a reader that is no factory takes."""

_NAMED = frozenset({"upstreams", "models", "teams"})
"""Sections that are tables of names that the operator chooses."""

MORE: Mapping[str, str] = MappingProxyType(
    {
        "server.host": "the address to listen on; `::` for IPv6",
        "server.port": "0: any free one",
        "server.max_side": "of one picture: the most pixels along one side",
        "upstreams.NAME.base_url": "where the API is, with its path; a sandbox has none",
        "upstreams.NAME.api_keys[].key": "the key itself",
        "upstreams.NAME.api_keys[].weight": "its share among the keys of its order",
        "upstreams.NAME.api_keys[].order": "those of the lowest order are asked first",
        "upstreams.NAME.timeouts.connect_seconds": "for a connection, TLS included",
        "upstreams.NAME.timeouts.total_seconds": "from the request's first byte to the last one of "
        "the answer",
        "upstreams.NAME.proxy": "a forward proxy: `http://user:password@proxy:3128`",
        "upstreams.NAME.verify": "TLS is always verified: `true` by the authorities of certifi "
        "(`SSL_CERT_FILE` names others), a path by this CA bundle, which is read again when it "
        "changes",
        "upstreams.NAME.max_connections": "open there at once, in each process",
        "models.NAME.upstream": "one that stands under `upstreams`; this or `upstreams` is needed",
        "models.NAME.model": "its name at the upstream; left out: the name itself",
        "models.NAME.upstreams[].upstream": "one that stands under `upstreams`",
        "models.NAME.upstreams[].model": "its name there; left out: that of the model",
        "models.NAME.upstreams[].weight": "its share among those of its order",
        "models.NAME.upstreams[].order": "those of the lowest order are asked first; left out: its "
        "place in the list",
        "models.NAME.upstreams[].upstream_stream": "left out: that of the model",
        "models.NAME.upstream_stream": "`always`: upstreams are asked for events even where JSON "
        "was asked for, so that no proxy cuts a long silence",
        "models.NAME.unpriced": "what becomes of a call without a price. `allow`: it is booked as "
        "nothing, flagged and counted",
        "models.NAME.validate": "`strict`: what OpenAI would refuse is refused here, before it is "
        "sent",
        "models.NAME.unknown_parameters": "`forward`: passed on, and held at the model's worst "
        "case",
        "models.NAME.pin.size": "what a size that is left open becomes, with `auto: pin`",
        "models.NAME.pin.quality": "what a quality that is left open becomes, with `auto: pin`",
        "models.NAME.cache": "whether its results are kept, and shared",
        **{
            f"{whose}.compat.{name}": f"left out: {what}. `compat: false`: nothing is repaired"
            for whose, what in (
                ("models.NAME", "as for all models"),
                ("teams.NAME.keys[]", "as for the model"),
            )
            for name in (
                *("response_format", "style", "quality", "sizes", "media_types"),
                "repeated_images",
            )
        },
        "teams.NAME.keys[].compat.default_model": "for its requests that name no model",
        "compat.style": "taken out of the request: no model of today takes it",
        "compat.aliases": "names that no entry of `models` has, each with one that has; none where "
        "nothing is said",
        "cache.enabled": "whether results are kept, and shared",
        "cache.ttl": "how long a result is kept",
        "cache.memory_bytes": "in the memory of each process",
        "results.enabled": "whether results can be fetched, and requests be asynchronous",
        "results.ttl": "how long a result can be fetched",
        "responses.enabled": "whether `/v1/responses` is served",
        "responses.without_image_tool": "`allow`: a response may be text alone, without the tool",
        "files.enabled": "whether `/v1/files` is served",
        "moderations.enabled": "whether `/v1/moderations` is served",
        "provenance.enabled": "whether `/v1/content_provenance_checks` is served",
        "teams.NAME.keys": "what its clients send as their API key, or a table that says more; "
        "teams of the directory have theirs by `gateway key create`",
        "teams.NAME.keys[].key": "what its clients send; `openssl rand -hex 24` makes one. It is "
        'left out where a `"${NAME:-}"` is empty',
        "teams.NAME.keys[].name": "a name for people, seen in lists and usage",
        "teams.NAME.cache.enabled": "whether this team's results are kept and shared",
        **{
            f"{whose}.{name}": text
            for whose in ("teams.NAME", "teams.NAME.keys[]")
            for name, text in {
                "limits.requests_per_minute": "requests a minute",
                "limits.images_per_minute": "pictures a minute; `n` counts",
                "limits.concurrent_requests": "requests at one time",
                "limits.max_cost_per_request": "what one request may cost at the most",
                "budget.day": "a day; hard: what might cost more is not sent",
                "budget.week": "a week, Monday to Sunday; hard",
                "budget.month": "a month of the calendar; hard",
                "budget.total": "in all, for ever; hard",
                "soft_budget.day": "a day; may be passed, and `notify` hears of it",
                "soft_budget.week": "a week; may be passed",
                "soft_budget.month": "a month; may be passed",
                "soft_budget.total": "in all; may be passed",
                "disabled": "`true`: every call is refused",
            }.items()
        },
        "teams.NAME.per_user.limits.requests_per_minute": "of each user: requests a minute",
        "teams.NAME.per_user.limits.images_per_minute": "of each user: pictures a minute",
        "teams.NAME.per_user.limits.concurrent_requests": "of each user: requests at one time",
        "teams.NAME.per_user.budget.day": "of each user: a day; hard",
        "teams.NAME.per_user.budget.week": "of each user: a week, Monday to Sunday; hard",
        "teams.NAME.per_user.budget.month": "of each user: a month of the calendar; hard",
        "teams.NAME.per_user.budget.total": "of each user: in all, for ever; hard",
        "admin.keys": "must be empty: there is no Admin API in this version",
        "relay.log_prompts": "`true`: prompts are in the log; they are private, so by default "
        "nothing of them is",
        "log.level": "what is less grave is not logged",
        "log.format": "`json`: one object a line, for machines; `text` for people",
    }
)
"""What the file says of the line it stands on, of several settings at once, or not at all."""


@dataclass(frozen=True, slots=True)
class Row:
    """One setting. ``path`` has ``NAME`` for a name of the operator's and ``[]`` for an item."""

    path: str
    form: str
    default: str | None
    """As the file writes it; None where there is none."""
    variable: str
    """Of the environment, or empty."""
    at_once: bool
    """Whether a running gateway takes a change of it over."""


def rows() -> Iterator[Row]:
    """Every setting, in the order of the code."""
    document = tree._Document
    overridable = tree._OVERRIDABLE
    live = _live()
    for section in _settings(document):
        kind, suffix = _below(section.metadata["reader"])
        assert kind is not None, section.name
        for path, each in _walk(kind, section.name + suffix):
            name = path.removeprefix(section.name + ".")
            by_variable = overridable.get(section.name, {}).get(name, False)
            yield Row(
                path,
                _form(each.metadata["reader"]),
                _default(path, each),
                f"GATEWAY_{section.name}__{name}".upper() if by_variable else "",
                section.name in live or f"{section.name}.{name}" in live,
            )


def meanings() -> dict[str, str]:
    """Path -> what the comments of ``config/gateway.yaml`` say of it."""
    return {path: text for _, said in _sections().values() for path, text in said.items()}


def page() -> str:
    said = {**meanings(), **MORE}
    by_section: dict[str, list[Row]] = {}
    for row in rows():
        by_section.setdefault(row.path.partition(".")[0], []).append(row)
    parts = [_HEAD]
    introductions = {name: intro for name, (intro, _) in _sections().items()}
    order = [*introductions, *(name for name in by_section if name not in introductions)]
    for section in order:
        parts.append(f"\n## `{section}`\n\n")
        if intro := introductions.get(section):
            parts.append(f"{intro}\n\n")
        found = by_section.pop(section)
        parts.append(_when(found))
        parts.append(table(("setting", "form", "default", "meaning"), _cells(found, said)))
    assert not by_section, f"not in {FILE.name}: {list(by_section)}"
    return "".join(parts)


def _when(found: list[Row]) -> str:
    """When a change of these holds."""
    live = [row for row in found if row.at_once]
    if len(live) == len(found):
        return "A running gateway takes a change over at once.\n\n"
    if not live:
        return "A change holds from the next start on.\n\n"
    names = ", ".join(f"`{row.path.rpartition('.')[2]}`" for row in live)
    return (
        f"A running gateway takes a change of {names} over at once; the others hold from the next "
        "start on.\n\n"
    )


def _cells(found: list[Row], said: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    for row in found:
        default = "needed" if row.default is None else f"`{row.default}`" if row.default else ""
        variable = f"<br>`{row.variable}`" if row.variable else ""
        assert row.path in said, f"nothing says what {row.path} is: say it in {FILE}"
        yield f"`{row.path}`{variable}", row.form, default, said[row.path]


_HEAD = """\
# Every setting

<!-- Written by `make docs` from gateway/settings.py and config/gateway.yaml. -->

The file is [`config/gateway.yaml`](../../config/gateway.yaml): it has each setting with its
default. Which one is read: `--config`, else `$GATEWAY_CONFIG`, else `config/gateway.yaml` here,
else the copy that ships. `gateway check` says every mistake at once, with its line.

- A setting that is scalar and stands directly in its section can be set by the variable below its
  name, which wins over the file. It is taken as it is: `${...}` means nothing there.
- In the file, `"${NAME}"` must be set; `"${NAME:-default}"` may be unset or empty;
  `"${file:/path}"` is a file's text without the newline at its end; `$$` is a dollar sign.
- Sizes are `128MiB`, `10GiB`, `500MB` or bytes; times `30s`, `15m`, `24h`, `7d` or seconds;
  dollars `50` or `0.25`, exact to the nano-dollar; moments `2027-01-01` or `2027-01-01T12:00:00Z`,
  in UTC. Relative paths start at the folder of the file.
- `NAME` is a name of your choice; `[]` an item of a list. *Needed* has no default.
- What holds at once and what needs a start: see [Changing the configuration while it
  runs](../../README.md#changing-the-configuration-while-it-runs).
"""


def _settings(kind: type[Any]) -> list[Field[Any]]:
    known = names_of(kind)
    return [each for each in fields(kind) if each.name in known]


def _walk(kind: type[Any], path: str) -> Iterator[tuple[str, Field[Any]]]:
    """Every setting below ``path`` that is no table of settings itself."""
    for each in _settings(kind):
        inside, suffix = _below(each.metadata["reader"])
        here = f"{path}.{each.name}"
        if inside is None:
            yield here, each
        else:
            if suffix == "[]" and each.default is not MISSING:
                yield here, each
            yield from _walk(inside, here + suffix)


def _below(reader: Callable[..., Any]) -> tuple[type[Any] | None, str]:
    """The record that a reader reads, if it does; and how its path goes on."""
    factory, given = _made_by(reader)
    match factory:
        case "record":
            return given["kind"], ""
        case "mapping":
            return _below(given["reader"])[0], ".NAME"
        case "listing":
            return _below(given["reader"])[0], "[]"
        case "located" | "optional" | "_stated" | "_or_off":
            return _below(given["reader"])
    used = getclosurevars(reader).globals.values()
    records = [one for one in used if isinstance(one, type) and is_dataclass(one)]
    found = [one for one in records if names_of(one)]
    assert len(found) <= 1, reader
    return (found[0] if found else None), ""


def _made_by(reader: Callable[..., Any]) -> tuple[str, Mapping[str, Any]]:
    """The factory that made a reader, and with what."""
    name, _, inner = reader.__qualname__.partition(".")
    return (name, getclosurevars(reader).nonlocals) if inner else ("", {})


def _form(reader: Callable[..., Any]) -> str:
    """What a setting may be, in words."""
    factory, given = _made_by(reader)
    match factory:
        case "optional":
            return f"{_form(given['reader'])}; `null`"
        case "mapping":
            return "a table of names and values"
        case "located" | "_stated" | "_or_off":
            return _form(given["reader"])
        case "listing":
            kind = _below(given["reader"])[0]
            item = "one value each, or a table" if kind else _form(given["reader"])
            return f"a list: {item}"
        case "text":
            return str(given["form"])
        case "choice":
            *most, last = (f"`{one}`" for one in given["kind"])
            return f"{', '.join(most)} or {last}"
        case "whole":
            noun = given["noun"].removeprefix("a whole number")
            return f"{noun}{', ' if noun else ''}{given['least']} to {_number(given['most'])}"
        case "seconds":
            return f"seconds, {given['least']:g} to 86400"
        case "":
            assert reader.__name__ in _FORMS, f"put the form of {reader.__name__} into words here"
            return _FORMS[reader.__name__]
    raise AssertionError(f"put what {factory} takes into words here")


def _default(path: str, each: Field[Any]) -> str | None:
    """A default as the file writes it; empty for "left out"."""
    value, form = each.default, _form(each.metadata["reader"])
    if value is MISSING:
        return None
    if path == "storage.database":
        return f"sqlite:///{value}"
    match value:
        case None:
            return "null" if form.endswith("`null`") else ""
        case bool():
            return str(value).lower()
        case StrEnum():
            return value.value
        case timedelta():
            return _time(value)
        case int() if form == "a size":
            return _size(value)
        case int() if not isinstance(value, bool):
            return _number(value)
        case float():
            return f"{value:g}"
        case ():
            return "{}" if form.startswith("a table") else "[]"
        case tuple():
            return f"[{', '.join(str(one) for one in value)}]"
    return str(value)


def _number(value: int) -> str:
    return f"{value:_}" if value >= 1_000_000 else str(value)


def _time(value: timedelta) -> str:
    left = int(value.total_seconds())
    for unit, seconds in (("h", 3600), ("m", 60)):
        if left % seconds == 0:
            return f"{left // seconds}{unit}"
    return f"{left}s"


def _size(value: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def _live() -> frozenset[str]:
    """Sections, and settings of sections, that a running gateway takes over: what is new once a
    configuration was read again that differs in everything."""
    taken = swapped(load(FILE, {}), cast(Settings, _Other()))
    live: set[str] = set()
    for each in fields(Settings):
        value = getattr(taken, each.name)
        if isinstance(value, _Other):
            live.add("models" if each.name == "catalogue" else each.name)
        elif is_dataclass(value):
            live |= {
                f"{each.name}.{one.name}"
                for one in fields(value)
                if isinstance(getattr(value, one.name), _Other)
            }
    return frozenset(live)


class _Other:
    """Another value, whatever is asked of it."""

    def __getattr__(self, name: str) -> _Other:
        return _Other()


_LISTED = re.compile(r"^# All that .* can have:$", re.M)
_SETTING = re.compile(r"""( *)(- )?([\w.*"-]+): *([^#]*?)(?: +# (.*))?""")


def _sections() -> dict[str, tuple[str, dict[str, str]]]:
    """Section -> what stands above it, as prose; and path -> the comment beside it."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for block in re.split(r"\n\n\n+", FILE.read_text())[1:]:
        above, section, below = re.split(r"^([a-z]+):.*\n", block, maxsplit=1, flags=re.M)
        prose, *listed = _LISTED.split(above)
        said: dict[str, str] = {}
        if listed:
            said |= _comments(listed[0], [(0, f"{section}.NAME")])
        said |= _comments(below, [(0, section)])
        found[section] = (_prose(prose), said)
    return found


def _prose(comment: str) -> str:
    """The sentences of a comment; a line that is set in is an example."""
    lines = [line.removeprefix("#").removeprefix(" ") for line in comment.splitlines()]
    return " ".join(f"`{line.strip()}`" if line.startswith(" ") else line for line in lines)


def _comments(text: str, above: list[tuple[int, str]]) -> dict[str, str]:
    """Path -> comment, of settings that stand below ``above`` (how far in, and what). A line that
    is commented out as a whole is read as if it were not."""
    found: dict[str, list[str]] = {}
    stack, last = list(above), ""
    for raw in text.splitlines():
        line = re.sub(r"^#", " ", raw)
        if line.strip().startswith("#") and last:
            found[last].append(line.strip().lstrip("# "))
            continue
        if (match := _SETTING.fullmatch(line)) is None:
            continue
        indent, item, name, _, comment = match.groups()
        depth = len(indent) + len(item or "")
        while len(stack) > len(above) and stack[-1][0] >= depth:
            stack.pop()
        parent = stack[-1][1]
        if item or parent.endswith(".keys"):
            parent += "[]"
        path = f"{parent}.NAME" if parent in _NAMED else f"{parent}.{name}"
        stack.append((depth, path))
        last = path
        if comment:
            found.setdefault(path, []).append(comment)
        else:
            found.setdefault(path, [])
    return {path: " ".join(lines) for path, lines in found.items() if lines}
