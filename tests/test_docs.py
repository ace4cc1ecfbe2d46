"""What the documents say is so: each file has its line, each command and path exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from gateway.cli import main
from gateway.settings import load

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gateway"
FLOOR_PLAN = (PACKAGE / "README.md").read_text()
README = (ROOT / "README.md").read_text()
CODE = re.compile(r"`([^`]+)`")


def listed_files() -> set[str]:
    """Every file of the floor plan; a heading like ``### `relay/`` says the folder."""
    found, folder = set(), ""
    for line in FLOOR_PLAN.partition("## What a newcomer touches")[0].splitlines():
        if line.startswith("### "):
            names = CODE.findall(line)
            folder = names[0] if len(names) == 1 else ""
        elif line.startswith("| `"):
            names = CODE.findall(line.split("|")[1])
            found |= {folder + name for name in names}
    return found


def test_every_file_has_one_line_in_the_floor_plan() -> None:
    suffixes = {".py", ".lua", ".sql"}
    files = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.suffix in suffixes
    }
    assert listed_files() == files


def test_every_decision_has_a_date() -> None:
    decisions = FLOOR_PLAN.partition("## Decisions")[2].strip().split("\n\n")
    for decision in decisions:
        assert re.match(r"\*\*\d{4}-\d\d-\d\d\. ", decision), decision[:60]


@pytest.mark.parametrize("document", [README, FLOOR_PLAN], ids=["README", "floor plan"])
def test_every_link_leads_somewhere(document: str) -> None:
    folder = ROOT if document is README else PACKAGE
    for target in re.findall(r"\]\(([^)#]+)\)", document):
        assert (folder / target).exists(), target


def test_every_command_of_the_readme_exists() -> None:
    commands = re.findall(r"^\$ gateway (\w+)(?: (\w+))?", README, re.M)
    assert commands
    for name, sub in commands:
        command = main.commands[name]
        if sub and hasattr(command, "commands"):
            assert sub in command.commands


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|\$ )make ([a-z]+)", README)) <= targets


def test_the_smallest_useful_file_loads(tmp_path: Path) -> None:
    text = re.findall(r"```yaml\n(.*?)```", README, re.S)[0]
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    secrets = {"OPENAI_API_KEY": "sk-test", "GROWTH_KEY": "growth-key-0123456789abcdef"}
    settings = load(path, secrets)
    assert set(settings.teams) == {"growth"}


def test_every_example_loads(tmp_path: Path) -> None:
    """Sections that an example leaves out are those of the first one."""
    first, *others = re.findall(r"```yaml\n(.*?)```", README, re.S)
    names = set(re.findall(r"\$\{([A-Z0-9_]+)\}", README))
    secrets = {name: f"key-of-{name.lower()}-0123456789" for name in names}
    for number, text in enumerate(others):
        whole = {**yaml.safe_load(first), **yaml.safe_load(text)}
        whole["models"] = {**yaml.safe_load(first)["models"], **whole["models"]}
        named = {one for model in whole["models"].values() for one in model.get("fallback", [])}
        whole["models"] |= {name: {"upstream": "openai"} for name in named}
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(whole))
        assert load(path, secrets).catalogue.models
    assert others


def test_the_shipped_file_loads_with_nothing_set() -> None:
    settings = load(ROOT / "config" / "gateway.yaml", {})
    assert not settings.upstreams["openai"].ready
    assert settings.catalogue.wildcard is not None


def test_nothing_tracked_speaks_of_what_is_outside_the_project() -> None:
    """No document or source may point to a place that a clone does not have."""
    outside = ("../" + "shared", ".lib" + "rary")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in filter(None, tracked.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 1_000_000:
            text = path.read_bytes().decode("utf-8", "replace")
            assert not any(word in text for word in outside), name
