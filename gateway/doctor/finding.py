"""What a check says: one line each, and the fix where something is not right."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    """It works, and will hurt one day."""
    FAIL = "fail"
    """Something does not work."""
    SKIPPED = "skipped"
    """Not looked at, and why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``subject`` is what was looked at, empty where ``check`` says it; ``fix`` is what
    to do, empty only where nothing is to be done."""

    check: str
    subject: str
    state: State
    says: str
    fix: str = ""


Check: TypeAlias = "AsyncGenerator[Finding, None]"


@dataclass(frozen=True, slots=True)
class Topic:
    """What a check is about: makes its findings."""

    check: str
    subject: str = ""

    def ok(self, says: str) -> Finding:
        return Finding(self.check, self.subject, State.OK, says)

    def warn(self, says: str, fix: str) -> Finding:
        return Finding(self.check, self.subject, State.WARN, says, fix)

    def fail(self, says: str, fix: str) -> Finding:
        return Finding(self.check, self.subject, State.FAIL, says, fix)

    def skipped(self, says: str) -> Finding:
        return Finding(self.check, self.subject, State.SKIPPED, says)


def is_failed(findings: Sequence[Finding]) -> bool:
    return any(finding.state is State.FAIL for finding in findings)


def sized(count: float) -> str:
    """Bytes for people: ``10 GiB``, ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 100 or count == int(count) else f"{count:.1f} {unit}"


def counted(count: int, thing: str) -> str:
    """``1 key``, ``2 keys``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
