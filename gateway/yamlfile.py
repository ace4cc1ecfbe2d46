"""YAML the way a settings file needs it: every value with its place and its exact text.

Values are not typed here. ``1.10`` stays the text ``1.10``, so that money never passes through a
float, and a reader that wants a number says so itself. What is left is small: scalars, lists and
tables, read from the parser's events, so that nothing of YAML 1.1 (``no`` as a boolean, ``1:30``
as 90, tags that build objects, merge keys) can come in unseen.

``${NAME}``, ``${NAME:-default}`` and ``${file:/path}`` are replaced inside scalars, after parsing:
what a variable holds can never become structure. ``$$`` is a dollar sign.

Nothing here prints a value that came through a reference: it may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, TypeAlias

import yaml

from gateway.filewatch import Source, source

MAX_FILE_BYTES = 1024 * 1024
MAX_NODES = 50_000
"""After every alias is expanded: a few lines of aliases of aliases can stand for billions."""
MAX_DEPTH = 20
MAX_VALUE_CHARS = 64 * 1024

Plain: TypeAlias = "bool | int | Decimal | str | list[Plain] | dict[str, Plain] | None"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where something is written: line and column count from 1.

    What has no line (an environment variable, a file that cannot be read) has line 0; ``file`` is
    then the name of the variable or the path.
    """

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """What is wrong, where, and what to do. ``path`` is like ``teams.growth.budget.day``."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        place = Place(self.file, self.line, self.column)
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value as text.

    ``given`` says that a part of it came from the environment or a file: the quotes around it
    then say nothing about its type, and it is never shown. ``sources`` names the variables, and
    ``optional`` is set when each of them had a default. ``broken`` values are already reported.
    """

    place: Place
    text: str = field(repr=False)
    quoted: bool = False
    given: bool = False
    optional: bool = False
    sources: tuple[str, ...] = ()
    broken: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the text may stand for something other than text: a number, null, true."""
        return self.given or not self.quoted

    @property
    def is_null(self) -> bool:
        return self.is_plain and self.text in _NULLS and not self.broken


@dataclass(frozen=True, slots=True)
class Listing:
    place: Place
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value; ``place`` is the key's."""

    place: Place
    value: Node


@dataclass(frozen=True, slots=True)
class Table:
    place: Place
    entries: Mapping[str, Entry]


Node: TypeAlias = Scalar | Listing | Table


def plain(node: Node) -> Plain:
    """A node as Python values: whole numbers as int, others as ``Decimal``, dates as text."""
    if isinstance(node, Table):
        return {name: plain(entry.value) for name, entry in node.entries.items()}
    if isinstance(node, Listing):
        return [plain(item) for item in node.items]
    if node.is_null:
        return None
    if node.is_plain and node.text in ("true", "false"):
        return node.text == "true"
    if node.is_plain and _WHOLE.fullmatch(node.text):
        return int(node.text)
    if node.is_plain and _DECIMAL.fullmatch(node.text):
        return Decimal(node.text)
    return node.text


def presentable(text: str) -> bool:
    """Whether a text from the file may stand in a message: short, and no secret by its looks."""
    return (
        _PRESENTABLE.fullmatch(text) is not None
        and not text.lower().startswith(_SECRET_PREFIXES)
        and _RANDOM_RUN.search(text) is None
        and not ("://" in text and "@" in text)
    )


def step(path: str, name: str | int) -> str:
    """The path of a child: ``teams`` + ``growth`` -> ``teams.growth``, ``keys`` + 0 -> ``keys[0]``.

    A name that could be a misplaced secret is shown as ``***``.
    """
    if isinstance(name, int):
        return f"{path}[{name}]"
    shown = name if presentable(name) else "***"
    return f"{path}.{shown}" if path else shown


class Unresolved(Exception):
    """A reference cannot be replaced; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class References:
    """What ``${...}`` may refer to. Relative paths of files start at ``folder``."""

    environ: Mapping[str, str] = field(repr=False)
    folder: Path = Path()
    sources: list[Source] = field(default_factory=list, compare=False)
    """The files that were referred to, as they were when they were read."""

    def scalar(self, place: Place, text: str, *, quoted: bool) -> Scalar:
        """The scalar with its references replaced. Raises ``Unresolved``."""
        if "$" not in text:
            return Scalar(place, text, quoted)
        sources: list[str] = []
        defaults: list[bool] = []

        def replacement(match: re.Match[str]) -> str:
            if match["escape"]:
                return "$"
            if match["file"] is not None:
                sources.append(f"file:{match['file']}")
                defaults.append(False)
                return self._file(match["file"])
            name, default = match["name"], match["default"]
            if name is None:
                raise Unresolved(
                    'holds a "$" that is no reference: write ${NAME}, ${NAME:-default} or '
                    "${file:/path}, and $$ for a dollar sign"
                )
            sources.append(name)
            defaults.append(default is not None)
            value = self.environ.get(name)
            if value:
                return value
            if default is not None:
                return str(default)
            if value is None:
                raise Unresolved(
                    f"the environment variable {name} is not set: set it, or write "
                    f"${{{name}:-}} for a value that may be empty"
                )
            return value

        value = _REFERENCE.sub(replacement, text)
        if len(value) > MAX_VALUE_CHARS:
            raise Unresolved(f"is longer than {MAX_VALUE_CHARS} characters")
        return Scalar(
            place,
            value,
            quoted,
            given=bool(sources),
            optional=bool(defaults) and all(defaults),
            sources=tuple(sources),
        )

    def _file(self, name: str) -> str:
        """A file's text without the newlines at its end."""
        shown = name if presentable(name) else "of ${file:...}"
        try:
            path = self.folder / name
            self.sources.append(source(path))
            if not path.is_file():
                raise Unresolved(f"the file {shown} does not exist")
            with path.open("rb") as stream:
                content = stream.read(MAX_VALUE_CHARS + 1)
            if len(content) > MAX_VALUE_CHARS:
                raise Unresolved(f"the file {shown} is longer than {MAX_VALUE_CHARS} bytes")
            return content.decode().rstrip("\r\n")
        except OSError as error:
            raise Unresolved(f"the file {shown} cannot be read: {error.strerror}") from None
        except ValueError:  # no UTF-8, or a path with a zero byte
            raise Unresolved(f"the file {shown} is not text in UTF-8") from None


def parse(content: bytes, file: str, references: References) -> tuple[Node | None, list[Mistake]]:
    """A file's one document, None where it is empty, and every mistake met on the way.

    A mistake of syntax ends the reading; what is then returned is None.
    """
    builder = _Builder(file, references)
    try:
        return builder.document(content), builder.mistakes
    except _Stop:
        return None, builder.mistakes


class _Stop(Exception):
    """Nothing after this place can be read; the mistake is noted."""


class _Builder:
    """Pulls the parser's events and builds nodes of them. Used once."""

    def __init__(self, file: str, references: References) -> None:
        self.mistakes: list[Mistake] = []
        self._file = file
        self._references = references
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._nodes = 0

    def document(self, content: bytes) -> Node | None:
        text = self._decode(content)
        self._parser = yaml.BaseLoader(text)
        try:
            return self._document()
        except yaml.MarkedYAMLError as error:
            line, column, message = _explain(error)
            self._stop(Place(self._file, line, column), "", message)
        except (ValueError, OverflowError):
            # PyYAML lets these through for escapes and versions beyond every range.
            self._stop(self._here(), "", "not valid YAML: a number or an escape is out of range")

    def _decode(self, content: bytes) -> str:
        if len(content) > MAX_FILE_BYTES:
            self._stop(
                Place(self._file, 1, 1), "", f"the file is larger than {MAX_FILE_BYTES} bytes"
            )
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place = self._place_of(content[: error.start].decode("utf-8", "replace"))
            self._stop(place, "", "the file is not text in UTF-8")
        if (bad := _UNPRINTABLE.search(text)) is not None:
            place = self._place_of(text[: bad.start()])
            self._stop(place, "", f"the control character U+{ord(bad[0]):04X} is not allowed")
        return text

    def _document(self) -> Node | None:
        self._event()
        if isinstance(self._event(), yaml.StreamEndEvent):
            return None
        node = self._node("", 0)
        self._event()
        after = self._event()
        if not isinstance(after, yaml.StreamEndEvent):
            self._stop(self._place(after), "", 'a second document starts here: remove the "---"')
        return node

    def _node(self, path: str, depth: int) -> Node:
        event = self._event()
        place = self._place(event)
        if depth > MAX_DEPTH:
            self._stop(place, path, f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path)
        assert isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent))
        before = self._nodes
        self._count(place, 1)
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._listing(place, path, depth)
        else:
            node = self._table(place, path, depth)
        if event.tag is not None:
            node = self._broken(
                place, path, 'a tag is not allowed: a value with a "!" needs quotes'
            )
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, self._nodes - before)
        return node

    def _alias(self, event: yaml.AliasEvent, path: str) -> Node:
        # The name is not shown: an unquoted password that starts with "*" is read as an alias.
        place = self._place(event)
        if event.anchor not in self._anchors:
            message = 'refers to an anchor that is not above it; a value with a "*" needs quotes'
            return self._broken(place, path, message)
        node, nodes = self._anchors[event.anchor]
        self._count(place, nodes)
        return node

    def _scalar(self, event: yaml.ScalarEvent, path: str) -> Scalar:
        place = self._place(event)
        quoted = event.style is not None
        if not quoted and event.value.lower() in _OLD_BOOLEANS:
            return self._broken(place, path, _old_boolean(event.value))
        try:
            return self._references.scalar(place, event.value, quoted=quoted)
        except Unresolved as error:
            return self._broken(place, path, str(error))

    def _listing(self, place: Place, path: str, depth: int) -> Listing:
        items: list[Node] = []
        while not self._parser.check_event(yaml.SequenceEndEvent):
            items.append(self._node(step(path, len(items)), depth + 1))
        self._event()
        return Listing(place, tuple(items))

    def _table(self, place: Place, path: str, depth: int) -> Table:
        entries: dict[str, Entry] = {}
        while not self._parser.check_event(yaml.MappingEndEvent):
            key = self._key(path, depth)
            value = self._node(step(path, key.text if key else "?"), depth + 1)
            if key is None:
                continue
            if (first := entries.get(key.text)) is not None:
                self._wrong(
                    key.place,
                    step(path, key.text),
                    f"is here twice: the first is on line {first.place.line}; remove one",
                )
                continue
            entries[key.text] = Entry(key.place, value)
        self._event()
        return Table(place, MappingProxyType(entries))

    def _key(self, path: str, depth: int) -> Scalar | None:
        """The name before a colon, taken as it stands; None where it is not usable as one."""
        event: yaml.Event = self._parser.peek_event()  # type: ignore[no-untyped-call]
        place = self._place(event)
        if not isinstance(event, yaml.ScalarEvent):
            self._node(step(path, "?"), depth + 1)
            self._wrong(place, path, "a name before a colon must be one plain text")
            return None
        self._event()
        self._count(place, 1)
        if event.tag is not None or event.anchor is not None:
            self._wrong(place, path, "a name before a colon has no tag and no anchor")
        if event.style is None and event.value == "<<":
            self._wrong(
                place,
                path,
                'merging with "<<" is not supported: give the whole value an anchor '
                "(limits: &standard {...}) and repeat that (limits: *standard)",
            )
            return None
        if event.style is None and event.value.lower() in _OLD_BOOLEANS:
            self._wrong(place, step(path, event.value), _old_boolean(event.value))
        return Scalar(place, event.value, event.style is not None)

    def _event(self) -> yaml.Event:
        event: yaml.Event = self._parser.get_event()  # type: ignore[no-untyped-call]
        return event

    def _count(self, place: Place, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            self._stop(place, "", f"the file has more than {MAX_NODES} values, aliases expanded")

    def _place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        return Place(self._file, mark.line + 1, mark.column + 1) if mark else self._here()

    def _here(self) -> Place:
        return Place(self._file, self._parser.line + 1, self._parser.column + 1)

    def _place_of(self, before: str) -> Place:
        return Place(self._file, before.count("\n") + 1, len(before) - before.rfind("\n"))

    def _wrong(self, place: Place, path: str, message: str) -> None:
        self.mistakes.append(Mistake(place.file, place.line, place.column, path, message))

    def _broken(self, place: Place, path: str, message: str) -> Scalar:
        self._wrong(place, path, message)
        return Scalar(place, "", broken=True)

    def _stop(self, place: Place, path: str, message: str) -> NoReturn:
        self._wrong(place, path, message)
        raise _Stop


def _old_boolean(word: str) -> str:
    return (
        f"{word} is a boolean in old YAML and a text in new: write true or false, "
        f'or "{word}" in quotes for the text'
    )


def _explain(error: yaml.MarkedYAMLError) -> tuple[int, int, str]:
    """Line, column (from 1) and a sentence for the parser's own error, without its content."""
    problem = error.problem or "the document cannot be read"
    mark = error.problem_mark or error.context_mark
    if problem in ("could not find expected ':'", "found unexpected end of stream"):
        mark = error.context_mark or mark  # where it begins, not where it was missed
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    for start, sentence in _EXPLANATIONS:
        if problem.startswith(start):
            return line, column, sentence
    return line, column, f"not valid YAML: {problem}"


_EXPLANATIONS = (
    ("found character '\\t'", "a tab is not allowed here: indent with spaces"),
    ("found character", 'a value that starts with this character needs quotes: "..."'),
    ("mapping values are not allowed", "a colon is not allowed here: check the indentation, or "
     'put a value that holds ": " in quotes'),
    ("could not find expected ':'", "a name without its colon: write name: value"),
    ("expected ',' or ']', but got '{'", 'a value with ${...} inside [ ] needs quotes: "${NAME}"'),
    ("expected ',' or '}', but got '{'", 'a value with ${...} inside { } needs quotes: "${NAME}"'),
    ("expected ',' or ']'", "the [ before it is not closed here: a comma or a ] is missing, or a "
     "value needs quotes"),
    ("expected ',' or '}'", "the { before it is not closed here: a comma or a } is missing, or a "
     "value needs quotes"),
    ("expected <block end>", "this does not fit the lines above: check the indentation, or put "
     "the value in quotes"),
    ("expected '<document start>'", "this does not fit the lines above: check the indentation"),
    ("expected the node content", "a value is missing here, or needs quotes"),
    ("found unexpected end of stream", "this quote is not closed"),
    ("expected alphabetic or numeric", 'a value or a name that starts with "*" or "&" needs '
     'quotes: "*"'),
    ("found undefined tag handle", 'a value that starts with "!" needs quotes'),
)  # fmt: skip
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_OLD_BOOLEANS = frozenset({"yes", "no", "on", "off"})
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,30})", re.ASCII)
_DECIMAL = re.compile(r"-?[0-9]{1,30}\.[0-9]{1,30}", re.ASCII)
_PRESENTABLE = re.compile(r"[A-Za-z0-9_.,*:/@ +%?~<>=()-]{1,64}")
_RANDOM_RUN = re.compile(r"[A-Za-z0-9+]{24}")
_SECRET_PREFIXES = ("sk-", "igw_")
_UNPRINTABLE = re.compile(
    "[^\x09\x0a\x0d\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
_REFERENCE = re.compile(
    r"(?P<escape>\$\$)"
    r"|\$\{file:(?P<file>[^}]+)\}"
    r"|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}"
    r"|\$\{|^\$[A-Za-z_][A-Za-z0-9_]*$"  # the latter would be sent to a provider as its key
)
