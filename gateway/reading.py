"""Typed values out of a settings file, with every mistake noted and none raised.

A reader turns one node into a value. A dataclass whose fields are made by ``setting`` and
``group`` is read by ``record``: its field names are the names in the file, so one declaration
gives the type, the default, the environment's override and the suggestion for a misspelt name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from gateway.domain.money import Money, parse_dollars, without_exponent
from gateway.filewatch import Source
from gateway.yamlfile import Listing, Mistake, Node, Place, Scalar, Table, presentable, step

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
D = TypeVar("D", bound="DataclassInstance")


class Wrong(Exception):
    """The value is refused; the message goes on after its path ("must be ...")."""


class Reported(Exception):
    """The value is refused, and what is wrong with it has been noted."""


@dataclass(slots=True)
class Report:
    """Where mistakes and warnings are gathered, and the files that were read or are named, as they
    were then. Relative paths start at ``folder``."""

    folder: Path = field(default_factory=Path)
    mistakes: list[Mistake] = field(default_factory=list)
    warnings: list[Mistake] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Spot:
    """A path in the file, and the report that what is found there goes to."""

    report: Report
    path: str = ""

    def at(self, name: str | int) -> Spot:
        return Spot(self.report, step(self.path, name))

    def wrong(self, place: Place, message: str) -> None:
        self.report.mistakes.append(self._note(place, message))

    def warn(self, place: Place, message: str) -> None:
        self.report.warnings.append(self._note(place, message))

    def read(self, reader: Reader[T], node: Node) -> T:
        """The value at this path. Raises ``Reported`` once its mistakes are noted."""
        try:
            return reader(node, self)
        except Wrong as error:
            self.wrong(node.place, str(error))
            raise Reported from None

    def _note(self, place: Place, message: str) -> Mistake:
        return Mistake(place.file, place.line, place.column, self.path, message)


Reader: TypeAlias = Callable[[Node, Spot], T]
"""Raises ``Wrong`` with a message, or ``Reported``."""


@dataclass(frozen=True, slots=True)
class Located(Generic[T]):
    """A value that is checked against others later, and where it was written."""

    value: T
    place: Place
    spot: Spot = field(repr=False)

    def wrong(self, message: str) -> None:
        self.spot.wrong(self.place, message)

    def warn(self, message: str) -> None:
        self.spot.warn(self.place, message)


def setting(reader: Reader[T], default: Any = MISSING) -> T:
    """A field that is one scalar of the file; required where there is no default."""
    made: T = field(default=default, metadata={"reader": reader, "scalar": True})
    return made


def group(reader: Reader[T], default: Any = MISSING) -> T:
    """A field that is a list or a table of the file."""
    made: T = field(default=default, metadata={"reader": reader, "scalar": False})
    return made


def names_of(kind: type[DataclassInstance]) -> dict[str, bool]:
    """The settings of a record, and whether each is a scalar."""
    return {
        each.name: each.metadata["scalar"]
        for each in dataclasses.fields(kind)
        if "reader" in each.metadata
    }


def record(kind: type[D]) -> Reader[D]:
    """A table with the fields of ``kind``. What is left out has its default; nothing at all
    (``server:`` and no more) leaves everything out."""
    known = {each.name: each for each in dataclasses.fields(kind) if "reader" in each.metadata}

    def read(node: Node, spot: Spot) -> D:
        table = as_table(node)
        for name, entry in table.entries.items():
            if name not in known:
                spot.at(name).wrong(entry.place, "unknown key" + suggestion(name, known))
        values: dict[str, object] = {}
        complete = True
        for name, member in known.items():
            required = member.default is MISSING
            if name not in table.entries:
                if required:
                    spot.wrong(node.place, f'needs "{name}"')
                    complete = False
                continue
            try:
                value = table.entries[name].value
                values[name] = spot.at(name).read(member.metadata["reader"], value)
            except Reported:
                complete = complete and not required
        if not complete:
            raise Reported
        return kind(**values)

    return read


def mapping(reader: Reader[T], check: Callable[[str], str | None]) -> Reader[dict[str, T]]:
    """A table of names that the operator chooses. ``check`` says what is wrong with a name."""

    def read(node: Node, spot: Spot) -> dict[str, T]:
        values: dict[str, T] = {}
        for name, entry in as_table(node).entries.items():
            inside = spot.at(name)
            if (objection := check(name)) is not None:
                inside.wrong(entry.place, objection)
                continue
            try:
                values[name] = inside.read(reader, entry.value)
            except Reported:
                continue
        return values

    return read


def listing(reader: Reader[T]) -> Reader[tuple[T, ...]]:
    """A list; items that are refused are left out once they are noted."""

    def read(node: Node, spot: Spot) -> tuple[T, ...]:
        if isinstance(node, Scalar):
            _unless_broken(node)
            if node.is_null and not node.given:
                return ()
        if not isinstance(node, Listing):
            raise Wrong("must be a list: [one, two]")
        values: list[T] = []
        for index, item in enumerate(node.items):
            try:
                values.append(spot.at(index).read(reader, item))
            except Reported:
                continue
        return tuple(values)

    return read


def located(reader: Reader[T]) -> Reader[Located[T]]:
    def read(node: Node, spot: Spot) -> Located[T]:
        return Located(reader(node, spot), node.place, spot)

    return read


def optional(reader: Reader[T]) -> Reader[T | None]:
    def read(node: Node, spot: Spot) -> T | None:
        return None if isinstance(node, Scalar) and node.is_null else reader(node, spot)

    return read


def as_table(node: Node) -> Table:
    """The node as a table; null is an empty one. Raises ``Wrong`` or ``Reported``."""
    if isinstance(node, Scalar):
        _unless_broken(node)
        if node.is_null and not node.given:
            return Table(node.place, {})
    if not isinstance(node, Table):
        raise Wrong("must be a table of names and values: name: value")
    return node


def scalar(node: Node) -> Scalar:
    """The node as one value. Raises ``Wrong`` where it is a list, a table or null."""
    if not isinstance(node, Scalar):
        kind = "a list" if isinstance(node, Listing) else "a table"
        raise Wrong(f"must be one value, not {kind}")
    _unless_broken(node)
    if node.is_null:
        raise Wrong(
            f"is empty: set {' and '.join(node.sources)}"
            if node.sources
            else "needs a value; remove the line for the default"
        )
    return node


def but_is(value: Scalar) -> str:
    """``, not "808o"``, or nothing where the value may be a secret."""
    return "" if value.given or not presentable(value.text) else f', not "{value.text}"'


def text(pattern: str, form: str) -> Reader[str]:
    """A text that matches ``pattern`` as a whole; ``form`` is the words for it ("a host")."""
    wanted = re.compile(pattern)

    def read(node: Node, spot: Spot) -> str:
        value = scalar(node)
        if value.is_plain and value.text in ("true", "false") and not value.given:
            raise Wrong(f'must be {form}: put "{value.text}" in quotes if it is meant as a text')
        if wanted.fullmatch(value.text) is None:
            raise Wrong(f"must be {form}{but_is(value)}")
        return value.text

    return read


def boolean(node: Node, spot: Spot) -> bool:
    value = scalar(node)
    if not value.is_plain and value.text in ("true", "false"):
        raise Wrong(f"must be {value.text} without the quotes")
    if value.text not in ("true", "false"):
        raise Wrong(f"must be true or false{but_is(value)}")
    return value.text == "true"


def choice(kind: type[E]) -> Reader[E]:
    """One of an enum's values."""

    def read(node: Node, spot: Spot) -> E:
        value = scalar(node)
        try:
            return kind(value.text)
        except ValueError:
            raise Wrong(f"must be {_either(kind)}{but_is(value)}") from None

    return read


def whole(least: int, most: int, noun: str = "a whole number") -> Reader[int]:
    """A whole number in decimal digits, in groups with ``_`` if one likes (100_000_000)."""

    def read(node: Node, spot: Spot) -> int:
        number = _digits(scalar(node), noun)
        if not least <= number <= most:
            raise Wrong(f"must be {noun} from {least} to {most}")
        return number

    return read


def seconds(least: float = 0.001) -> Reader[float]:
    """A number of seconds, at most a day: 5 or 0.5."""

    def read(node: Node, spot: Spot) -> float:
        value = _unquoted(scalar(node), "a number of seconds")
        digits = without_exponent(value.text)
        if _NUMBER.fullmatch(digits) is None:
            raise Wrong(f"must be a number of seconds, like 5 or 0.5{but_is(value)}")
        number = float(digits)
        if not least <= number <= 86_400:
            raise Wrong(f"must be a number of seconds from {least:g} to 86400")
        return number

    return read


def percent(node: Node, spot: Spot) -> float:
    """A share of a hundred: 1 or 0.5."""
    value = _unquoted(scalar(node), "a percentage")
    digits = without_exponent(value.text)
    if _NUMBER.fullmatch(digits) is None or not 0 <= float(digits) <= 100:
        raise Wrong(f"must be a percentage from 0 to 100, like 1 or 0.5{but_is(value)}")
    return float(digits)


def share(node: Node, spot: Spot) -> float:
    """A part of the whole: 1 or 0.05."""
    value = _unquoted(scalar(node), "a share")
    digits = without_exponent(value.text)
    if _NUMBER.fullmatch(digits) is None or not 0 <= float(digits) <= 1:
        raise Wrong(f"must be a share from 0 to 1, like 1 or 0.05{but_is(value)}")
    return float(digits)


def size(node: Node, spot: Spot) -> int:
    """Bytes: a whole number, or one with a unit (10GiB, 500MB)."""
    value = scalar(node)
    match = _SIZE.fullmatch(value.text)
    if match is None:
        raise Wrong(f"must be a size, like 128MiB, 10GiB or a number of bytes{but_is(value)}")
    number = int(match["number"]) * _SIZES[match["unit"]]
    if not 1 <= number <= _MOST_BYTES:
        raise Wrong("must be a size from 1 byte to 1024TiB")
    return number


def duration(node: Node, spot: Spot) -> timedelta:
    """A time with its unit (30s, 15m, 24h, 7d), or a whole number of seconds."""
    value = scalar(node)
    match = _DURATION.fullmatch(value.text)
    if match is None:
        raise Wrong(f"must be a time, like 30s, 15m, 24h or 7d{but_is(value)}")
    number = int(match["number"]) * _DURATIONS[match["unit"]]
    if not 1 <= number <= _MOST_SECONDS:
        raise Wrong("must be a time from 1s to 3650d")
    return timedelta(seconds=number)


def dollars(node: Node, spot: Spot) -> Money:
    """Dollars as decimal text, quoted or not, to nano-dollars; no float is ever made."""
    value = scalar(node)
    amount = without_exponent(value.text)
    match = _DOLLARS.fullmatch(amount)
    if match is None:
        raise Wrong(f"must be an amount of dollars, like 50 or 0.25{but_is(value)}")
    if len((match["cents"] or "").rstrip("0")) > 9:
        raise Wrong("is finer than a nano-dollar: at most 9 digits after the point")
    try:
        return parse_dollars(amount)
    except ValueError:
        raise Wrong("is more dollars than the ledger can hold") from None


def instant(node: Node, spot: Spot) -> datetime:
    """A moment in UTC. A day (2027-01-01) is its first moment."""
    value = scalar(node)
    if _INSTANT.fullmatch(value.text) is None:
        raise Wrong(f"must be a day (2027-01-01) or a moment (2027-01-01T12:00:00Z){but_is(value)}")
    try:
        moment = datetime.fromisoformat(value.text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Wrong(f"is no day of the calendar{but_is(value)}") from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean "limits"?``, or what is known where nothing is near and it is little."""
    candidates = [each for each in known if presentable(each)]
    close = get_close_matches(name.lower(), candidates, n=1, cutoff=0.6) if len(name) < 65 else []
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known here: {', '.join(candidates)}" if 0 < len(candidates) <= 24 else ""


def _unless_broken(node: Scalar) -> None:
    if node.broken:
        raise Reported


def _unquoted(value: Scalar, noun: str) -> Scalar:
    if not value.is_plain and _NUMBER.fullmatch(value.text):
        raise Wrong(f"must be {noun}: remove the quotes")
    return value


def _digits(value: Scalar, noun: str) -> int:
    """A whole number. Raises ``Wrong`` for what old and new YAML read differently."""
    digits = _unquoted(value, noun).text
    if re.fullmatch(r"0[0-9_]+|0[oxb][0-9A-Fa-f_]+", digits):
        raise Wrong(f"must be {noun} in decimal digits, without a leading zero{but_is(value)}")
    if re.fullmatch(r"[0-9]+(:[0-5]?[0-9])+", digits):
        raise Wrong(f"must be {noun}: old YAML reads this in base 60{but_is(value)}")
    if _WHOLE.fullmatch(digits) is None:
        raise Wrong(f"must be {noun}{but_is(value)}")
    return int(digits)


def _either(kind: Iterable[StrEnum]) -> str:
    *most, last = (f'"{each}"' for each in kind)
    return f"{', '.join(most)} or {last}" if most else last


_WHOLE = re.compile(r"-?[0-9]{1,18}|[0-9]{1,3}(_[0-9]{3}){1,5}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,9})?", re.ASCII)
_DOLLARS = re.compile(r"[0-9]{1,18}(\.(?P<cents>[0-9]{1,30}))?", re.ASCII)
_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:[0-9]{2}))?",
    re.ASCII,
)
_SIZES = {
    "": 1, "B": 1,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SIZE = re.compile(rf"(?P<number>0|[1-9][0-9]{{0,17}}) ?(?P<unit>{'|'.join(_SIZES)})", re.ASCII)
_MOST_BYTES = 2**50
_DURATIONS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(?P<number>0|[1-9][0-9]{0,11})(?P<unit>[smhd]?)", re.ASCII)
_MOST_SECONDS = 3650 * 86_400
