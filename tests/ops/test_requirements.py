"""What the image installs is locked by hash, and is what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNS = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"]["otel"],
]
BUILDS = PROJECT["build-system"]["requires"]
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)", re.M)
HASH = re.compile(r"^ +--hash=sha256:[0-9a-f]{64}(?: \\)?$", re.M)

each_lock = pytest.mark.parametrize(
    ("name", "wanted"), [("requirements.txt", RUNS), ("requirements-build.txt", BUILDS)]
)


def locked(name: str) -> dict[str, str]:
    """Package -> version."""
    return dict(PIN.findall((ROOT / name).read_text()))


@each_lock
def test_what_is_asked_for_is_locked_within_its_range(name: str, wanted: list[str]) -> None:
    versions = locked(name)
    for text in wanted:
        requirement = Requirement(text)
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{name} has no {requirement.name}: make lock"
        assert requirement.specifier.contains(version), f"{text}, but {version}: make lock"


@each_lock
def test_each_line_is_a_version_or_its_hash(name: str, wanted: list[str]) -> None:
    """No index, no url, no option: where it comes from is decided where it is installed."""
    text = (ROOT / name).read_text()
    assert len(locked(name)) > len(wanted)
    entries = re.split(r"\n(?=\S)", re.sub(r"^ *#.*\n?", "", text, flags=re.M).strip())
    for entry in entries:
        head, *hashes = entry.splitlines()
        assert PIN.match(head), head
        assert hashes, f"{head} has no hash"
        assert all(HASH.fullmatch(line) for line in hashes), head


def test_what_only_tests_need_is_not_in_the_image() -> None:
    assert not {"pytest", "hypothesis", "openai", "uv", "hatchling"} & set(
        locked("requirements.txt")
    )
