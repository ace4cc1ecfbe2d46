"""Every client through the gateway, one test each; what `make clients` runs, by pytest.

The two tests that need no package see to it that the page says what is pinned today.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.e2e.clients.install import is_installed
from tests.e2e.clients.matrix import (
    CLIENTS,
    ERRORS,
    FEATURES,
    SCRIPTS,
    Client,
    pins,
)
from tests.e2e.clients.page import PAGE
from tests.e2e.clients.run import run

ROOT = Path(__file__).parents[3]
TELLING = r'^(?:async )?def (\w+)\(\):|^  async (\w+)\(|\bsay (\w+)|"feature": "(\w+)"'
"""How a script begins a feature, in Python, JavaScript and sh."""


@pytest.mark.clients
@pytest.mark.timeout(180)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_works(client: Client, tmp_path: Path) -> None:
    missing = [package for package in client.needs if not is_installed(package)]
    if missing and (os.environ.get("CI_TOOLS") is None or not client.half):
        pytest.skip(f"{missing} not installed: python -m tests.e2e.clients.install")
    assert not missing
    outcome = run(client, tmp_path / "run")
    assert [result for result in outcome.results if not result.ok] == [], outcome.complaints


def rows() -> list[list[str]]:
    """Those of the page's table, without its head."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_page_is_of_the_clients_that_are_pinned_today() -> None:
    """Else it tells of versions that nobody tried: run make clients."""
    assert [(row[0], row[1]) for row in rows()] == [
        (client.name, client.version) for client in CLIENTS
    ]


def test_the_readme_says_the_same_versions() -> None:
    """Of all that it says was run here, and of every client that was, the major and the minor."""
    cells = re.findall(r"\| run: (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    said = {version for cell in cells for version in re.findall(r"\d+\.\d+", cell)}
    tried = [version for client in CLIENTS if client.package for _, version in pins(client.package)]
    tried += [row[2].split()[1] for row in rows() if row[0] == "curl"]
    short = {".".join(version.split(".")[:2]) for version in tried}
    assert said <= short
    for client in CLIENTS:
        if client.package and (versions := pins(client.package)):
            found = [".".join(version.split(".")[:2]) in said for _, version in versions]
            assert any(found), client.name


def test_the_page_tells_of_what_each_client_can_do() -> None:
    told = {
        row[0]: [feature for feature, mark in zip(FEATURES, row[3:], strict=False) if mark != "–"]
        for row in rows()
    }
    assert told == {client.name: list(client.says) for client in CLIENTS}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_is_of_known_features_and_packages(client: Client) -> None:
    assert list(client.says) == [feature for feature in FEATURES if feature in client.says]
    script = (SCRIPTS / client.script).read_text()
    told = re.findall(TELLING, script, re.M)
    assert set(client.says) <= {name for names in told for name in names}
    assert (client.package is None) == (client.version == "")
    assert len(client.errors) == len(ERRORS)


def test_the_half_has_each_kind_of_client() -> None:
    half = [client for client in CLIENTS if client.half]
    assert len(CLIENTS) // 2 <= len(half) < len(CLIENTS)
    assert {feature for client in half for feature in client.says} == set(FEATURES)
    assert {Path(client.script).suffix for client in half} == {".py", ".mjs", ".sh"}
