"""What a PromQL expression names: metrics, the labels it matches, and those it groups by.

It reads enough of the language to hold expressions against the table of metrics; whether they are
PromQL at all, promtool and Prometheus say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from gateway.telemetry.metrics import TABLE, Kind

TARGET = frozenset({"job", "namespace", "instance"})
"""What a scrape adds."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NAME = re.compile(r"\b(?:gateway[_:][a-z0-9_:]+|up)\b(?!\s*\()")
_MATCHER = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)")
_CLAUSE = re.compile(r"\b(by|on|group_left|group_right|without|ignoring)\s*\(([^()]*)\)")


def of_the_table() -> dict[str, frozenset[str]]:
    """Every series that the gateway exposes, and its labels."""
    found: dict[str, frozenset[str]] = {"up": TARGET}
    for spec in TABLE:
        labels = frozenset(spec.labels) | TARGET
        if spec.kind is Kind.HISTOGRAM:
            found[f"{spec.name}_bucket"] = labels | {"le"}
            found |= {f"{spec.name}_count": labels, f"{spec.name}_sum": labels}
        else:
            found[spec.name] = labels
    return found


def metrics(expression: str) -> set[str]:
    """The names of the metrics in it."""
    return set(_NAME.findall(_bare(expression)))


def mistakes(expression: str, known: Mapping[str, frozenset[str]]) -> list[str]:
    """What the expression names that is not there: metrics, and labels of theirs."""
    bare = _bare(expression)
    found = [f"no metric {name}" for name in metrics(expression) if name not in known]
    if found:
        return found
    for one in _NAME.finditer(bare):
        rest = bare[one.end() :]
        inside = rest[1 : rest.index("}")] if rest.startswith("{") else ""
        found += [
            f"{one[0]} has no label {label}"
            for label in _MATCHER.findall(inside)
            if label not in known[one[0]]
        ]
    made = set(re.findall(r'label_replace\(.*?"([a-z_]+)", "\$1"', expression, re.DOTALL))
    for clause in _CLAUSE.finditer(bare):
        labels = {label.strip() for label in clause[2].split(",")} - {""} - made
        named = metrics(_inside(bare, clause.end())) if clause[1] == "by" else metrics(bare)
        named = named - {"up"} or named  # It stands beside others only to be compared with.
        for label in labels:
            without = sorted(name for name in named if label not in known[name])
            # A clause of a join is about both of its sides, and each must have it somewhere.
            if without and (clause[1] == "by" or len(without) == len(named)):
                found.append(f"{clause[0]}: {', '.join(without)} has no {label}")
    return found


def grouped_by(expression: str) -> frozenset[str]:
    """The labels that the result can have, where all of it is grouped."""
    return frozenset(
        label.strip()
        for clause in _CLAUSE.finditer(_bare(expression))
        if clause[1] == "by"
        for label in clause[2].split(",")
    )


def _bare(expression: str) -> str:
    """Without what is in quotes."""
    return _STRING.sub('""', expression)


def _inside(text: str, start: int) -> str:
    """What is in the brackets that open behind ``start``."""
    return next(_brackets(text, text.index("(", start)))


def _brackets(text: str, start: int) -> Iterator[str]:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            yield text[start : place + 1]
            return
    raise ValueError(f"a bracket is not closed: {text[start:]}")
