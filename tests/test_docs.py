"""What the documents say is so: each file has its line, each command and path exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import fields, is_dataclass
from datetime import date
from pathlib import Path

import click
import pytest
import yaml

from gateway.assembly import price_book, unpriced_models
from gateway.cli import main
from gateway.domain.errors import GatewayError, UpstreamRefused
from gateway.settings import load
from gateway.telemetry.metrics import TABLE
from tests.reference import cli, config, errors
from tests.reference.pages import DOCS, PAGES

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
        dates = re.findall(r"^\*\*\d{4}-\d\d-\d\d\. ", decision, re.M)
        assert len(dates) == 1, decision[:60]
        assert decision.startswith(dates[0]), decision[:60]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_reference_page_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), f"{name} is not current: run make docs"


def test_the_index_has_every_page() -> None:
    """Of the folder of the reference; those that are generated are marked so."""
    index = (DOCS / "README.md").read_text()
    listed = re.findall(r"^\| \[(\w+\.md)\]\(\1\)( ⚙)?", index, re.M)
    assert {name for name, _ in listed} == {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert {name for name, generated in listed if generated} == set(PAGES)


DOCUMENTS = [
    ROOT / "README.md", ROOT / "CHANGELOG.md", PACKAGE / "README.md", *sorted(DOCS.glob("*.md"))
]  # fmt: skip


def anchors(text: str) -> set[str]:
    """The names that a page's headings have on GitHub."""
    found: set[str] = set()
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.+)$", outside, re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(1 for one in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", one))
        found.add(f"{name}-{number}" if number else name)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_section_stands_twice(document: Path) -> None:
    found = re.findall(r"^## .+", document.read_text(), re.MULTILINE)
    assert [title for title in found if found.count(title) > 1] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        page = document.parent / file if file else document
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text()), target


# The changelog speaks of what was, too.
@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.name != "CHANGELOG.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_name_in_a_document_exists(document: Path) -> None:
    """Of metrics, settings and commands, wherever they are spoken of."""
    text = document.read_text()
    metrics = {re.sub("_(bucket|sum|count)$", "", name) for name in spoken("gateway_[a-z_]+", text)}
    assert metrics <= {spec.name for spec in TABLE}
    for name in spoken(r"[a-z]+\.[a-z_.]+(?=[:`])", text) - {"budget.warning", "budget.reached"}:
        is_file = name.endswith((".py", ".yaml", ".md"))
        assert is_file or name.partition(".")[0] not in SECTIONS or is_setting(name), name
    for words in spoken("gateway [a-z]+(?: [a-z]+)?", text):
        _, name, *sub = words.split()
        command = main.commands[name]
        if sub and isinstance(command, click.Group):
            assert sub[0] in command.commands, words


def spoken(pattern: str, text: str) -> set[str]:
    """What a document writes as code, as far as it begins like this."""
    return set(re.findall(f"`({pattern})", text))


SETTINGS = {row.path.replace("[]", "") for row in config.rows()}
SECTIONS = {path.partition(".")[0] for path in SETTINGS}


def is_setting(name: str) -> bool:
    """Whether it is the path of a setting, or of a table of them, or the end of one."""
    said = re.sub(r"^(upstreams|models|teams)\.\w+", r"\1.NAME", name)
    every = SETTINGS | {path.rpartition(".")[0] for path in SETTINGS}
    return any(path == said or path.endswith(f".{said}") for path in every)


def test_every_setting_is_on_the_page() -> None:
    """By walking the dataclasses themselves, whatever the generator does."""
    page = PAGES["config.md"]()

    def walk(value: object, path: str) -> None:
        assert is_dataclass(value)
        for each in fields(value):
            below = getattr(value, each.name)
            if is_dataclass(below) and each.name != "cache":
                walk(below, f"{path}.{each.name}")
            elif "reader" in each.metadata:
                assert f"| `{path}.{each.name}`" in page, f"{path}.{each.name}"

    settings = load(ROOT / "config" / "gateway.yaml", {})
    for section in ("server", "storage", "ledger", "prices", "results", "notify", "relay", "log"):
        walk(getattr(settings, section), section)
    walk(settings.upstreams["openai"], "upstreams.NAME")


def test_every_comment_of_the_shipped_file_is_of_a_setting() -> None:
    paths = {row.path for row in config.rows()}
    inside = {path.rpartition(".")[0] for path in paths}
    assert set(config.meanings()) <= paths | inside
    assert set(config.MORE) <= paths


def test_a_default_on_the_page_is_the_one_of_the_shipped_file() -> None:
    """As it is written there, so that both can be read side by side."""
    text = (ROOT / "config" / "gateway.yaml").read_text()
    for row in config.rows():
        section, _, name = row.path.partition(".")
        if row.default and "." not in name and section != "admin":
            below = text.partition(f"\n{section}:")[2]
            assert re.search(rf"^  {name}: {re.escape(row.default)}( |$)", below, re.M), row.path


def test_a_setting_that_a_running_gateway_takes_over_is_shown_so() -> None:
    live = {row.path for row in config.rows() if row.at_once}
    assert {"relay.attempts", "storage.pepper", "cache.ttl", "teams.NAME.budget.day"} <= live
    assert not {"server.port", "storage.database", "cache.max_bytes", "log.level"} & live


def test_every_example_of_a_command_is_understood() -> None:
    for words, command in cli.commands():
        for example in cli.EXAMPLES.get(words, ()):
            program, *given = shlex.split(example)
            assert program == "gateway"
            assert given[: len(words.split())] == words.split()
            asked = given[len(words.split()) :]
            # With the settings of the whole: a command remembers its option for help.
            with command.make_context(words, asked, **main.context_settings):
                pass


def test_every_error_says_what_to_do() -> None:
    made = {(case.kind, case.code) for case in errors.cases()}
    assert {(kind.__name__, code) for kind, code in made} == set(errors.SAID)
    ends = {kind for kind in every_error(GatewayError) if not kind.__subclasses__()}
    assert ends - {kind for kind, _ in made} == {UpstreamRefused}  # whose code is the provider's


def every_error(kind: type[GatewayError]) -> set[type[GatewayError]]:
    return {kind}.union(*(every_error(below) for below in kind.__subclasses__()))


def test_every_header_of_the_code_is_on_the_page() -> None:
    ours = {
        name for name in (*errors.ANSWER_HEADERS, *errors.REQUEST_HEADERS) if name.startswith("x-")
    }
    assert ours == errors.headers()


def test_the_changelog_has_its_form() -> None:
    """That of keepachangelog.com 1.1.0: versions, newest first, each with known kinds of news."""
    text = (ROOT / "CHANGELOG.md").read_text()
    title, *versions = re.split(r"^## ", text, flags=re.M)
    assert title.startswith("# Changelog\n")
    assert "https://keepachangelog.com/en/1.1.0/" in title
    heads = [version.partition("\n")[0] for version in versions]
    assert heads[0] == "[Unreleased]"
    numbers = [
        re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", head) for head in heads[1:]
    ]
    assert all(numbers)
    found = [tuple(map(int, number.groups())) for number in numbers if number]
    assert found == sorted(set(found), reverse=True)
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for version in versions:
        used = re.findall(r"^### (.+)$", version, re.M)
        assert used == [kind for kind in kinds if kind in used]
        assert used
        for part in re.split(r"^### .+$", version, flags=re.M)[1:]:
            assert part.strip().startswith("- ")


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
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(whole))
        settings = load(path, secrets)
        assert settings.catalogue.models
        assert unpriced_models(settings, price_book(settings), date(2026, 11, 22)) == []
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
