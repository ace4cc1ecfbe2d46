"""The pages that are generated from the code, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from tests.reference import cli, config, errors, metrics

DOCS = Path(__file__).parents[2] / "gateway" / "docs"

PAGES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "cli.md": cli.page,
        "config.md": config.page,
        "errors.md": errors.page,
        "metrics.md": metrics.page,
    }
)
"""File -> its text."""
