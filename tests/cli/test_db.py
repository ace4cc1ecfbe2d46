"""`gateway db`: what a database has, what this program needs, and the way from one to the other."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import yaml

from gateway.stores.schema import migrations
from tests.cli.conftest import Say
from tests.postgres import PASSWORD, Postgres, run_postgres

NEWEST = len(migrations("postgres"))


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with run_postgres() as running:
        yield running


def on(url: str, config: Path) -> Path:
    """The configuration, with this database."""
    document = yaml.safe_load(config.read_text())
    document["storage"] |= {"database": url, "pepper": "pepper-0123456789abcdef-0123456789"}
    config.write_text(yaml.safe_dump(document))
    return config


def test_an_empty_database_is_upgraded_once(say: Say, config: Path, server: Postgres) -> None:
    url = server.empty_database()
    on(url, config)
    place = f"PostgreSQL database {url.rpartition('/')[2]} at 127.0.0.1:{server.port}"
    before = say("db", "status", "--config", config)
    assert before.exit_code == 1
    assert before.stdout == (
        f"{place}: schema 0; this program needs {NEWEST}\nrun: gateway db upgrade\n"
    )
    refused = say("serve", "--config", config)
    assert refused.exit_code == 1
    assert "run `gateway db upgrade`" in refused.stderr

    upgraded = say("db", "upgrade", "--config", config)
    assert upgraded.exit_code == 0
    assert upgraded.stdout == f"{place}: schema 0 is now {NEWEST}\n"
    again = say("db", "upgrade", "--config", config)
    assert again.stdout == f"{place}: schema {NEWEST} is up to date\n"
    after = say("db", "status", "--json", "--config", config)
    assert after.exit_code == 0
    assert json.loads(after.stdout) == {
        "database": place,
        "schema": NEWEST,
        "program": NEWEST,
        "upgrade_needed": False,
        "too_new": False,
    }
    made = say("team", "create", "design", "--config", config)
    assert made.exit_code == 0, made.output
    assert made.stdout.splitlines()[0] == f"team design created in {place}"
    key = say("key", "create", "--team", "design", "--config", config)
    assert key.exit_code == 0, key.output
    assert "design" in say("key", "list", "--config", config).stdout


def test_a_database_of_a_newer_release_is_left_alone(
    say: Say, config: Path, server: Postgres
) -> None:
    url = server.fresh_database()
    on(url, config)
    with psycopg.connect(url) as database:
        database.execute("INSERT INTO schema_version SELECT max(version) + 1 FROM schema_version")
    status = say("db", "status", "--config", config)
    assert status.exit_code == 1
    assert "a newer release has upgraded it" in status.stdout
    for command in (("db", "upgrade"), ("serve",), ("team", "list")):
        said = say(*command, "--config", config)
        assert said.exit_code == 1
        assert f"has schema {NEWEST + 1}, this program knows {NEWEST}" in said.stderr


def test_nothing_is_upgraded_for_what_could_not_start(
    say: Say, config: Path, server: Postgres
) -> None:
    """The old gateways could not be started on the new schema, and the new ones not at all."""
    url = server.empty_database()
    sound = on(url, config).read_text()
    document = yaml.safe_load(sound)
    upstream = next(iter(document["upstreams"]))
    document["models"]["dall-e-9"] = {"upstream": upstream}
    config.write_text(yaml.safe_dump(document))
    checked = say("check", "--config", config)
    refused = say("db", "upgrade", "--config", config)
    assert refused.exit_code == checked.exit_code == 2
    assert "dall-e-9 has no price" in refused.stderr
    assert refused.stderr == checked.stderr
    document = yaml.safe_load(sound)
    document["prices"] = {"file": "nowhere.yaml"}
    config.write_text(yaml.safe_dump(document))
    refused = say("db", "upgrade", "--config", config)
    assert refused.exit_code == 2
    assert "nowhere.yaml" in refused.stderr
    config.write_text(sound)
    assert "schema 0;" in say("db", "status", "--config", config).stdout


@pytest.mark.parametrize(
    "command",
    [
        ("db", "status"),
        ("db", "upgrade"),
        ("db", "backup", "books"),
        ("serve",),
        ("team", "list"),
        ("team", "create", "design"),
        ("key", "list"),
        ("usage",),
        ("ledger", "unresolved"),
        ("export", "focus"),
    ],
    ids=" ".join,
)
def test_a_server_that_is_not_there(
    say: Say, config: Path, server: Postgres, command: tuple[str, ...]
) -> None:
    on(server.url("gateway", port=1), config)
    said = say(*command, "--config", config)
    assert said.exit_code == 1
    assert "PostgreSQL database gateway at 127.0.0.1:1 cannot be used" in said.stderr
    assert said.stderr.endswith(
        "Connection refused; mend storage.database, or the server: psql with the same url must "
        "work from here\n"
    )
    assert len(said.stderr.splitlines()) == 1
    assert PASSWORD not in said.output


def test_a_url_that_cannot_be_read(say: Say, config: Path, server: Postgres) -> None:
    on(server.url("gateway", sslmod="verify-full"), config)
    said = say("db", "status", "--config", config)
    assert said.exit_code == 1
    assert "a parameter has an unknown name" in said.stderr
    assert PASSWORD not in said.output


def test_sqlite_brings_itself_up_to_date(say: Say, config: Path) -> None:
    path = config.parent / "data" / "gateway.db"
    newest = len(migrations("sqlite"))
    before = say("db", "status", "--config", config)
    assert before.exit_code == 0
    assert before.stdout.splitlines() == [
        f"{path}: schema 0; this program needs {newest}",
        "it is brought up to date when a gateway starts",
    ]
    assert not path.exists()
    assert say("db", "upgrade", "--config", config).stdout == f"{path}: schema 0 is now {newest}\n"
    # Nothing is left that another user, who only looked, would own.
    files = {one.name for one in path.parent.iterdir()}
    assert "gateway.db-wal" not in files
    assert say("db", "status", "--config", config).stdout.splitlines()[1] == "nothing to do"
    assert {one.name for one in path.parent.iterdir()} == files
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {newest + 1}")
    for command in ("status", "upgrade"):
        said = say("db", command, "--config", config)
        assert said.exit_code == 1
        assert "newer release" in said.output


def test_a_backup_into_a_folder_that_is_not_there(say: Say, config: Path, tmp_path: Path) -> None:
    say("db", "upgrade", "--config", config)
    folder = tmp_path / "not there"
    said = say("db", "backup", folder / "books", "--config", config)
    assert said.exit_code == 1
    assert said.stderr == (
        f"{folder}/books cannot be written: there is no folder {folder}; make it (mkdir -p "
        f"'{folder}'), or name another file\n"
    )
    folder.write_text("a file")
    said = say("db", "backup", folder / "books", "--config", config)
    assert said.exit_code == 1
    assert said.stderr == (
        f"{folder}/books cannot be written: {folder} is no folder; name another file\n"
    )
    # Nobody may write there, whoever asks.
    said = say("db", "backup", "/proc/books", "--config", config)
    assert said.exit_code == 1
    assert said.stderr == (
        "/proc/books cannot be written (No such file or directory): let this user write to /proc, "
        "or name another file\n"
    )


def test_a_backup_of_books_that_do_not_add_up_is_kept(say: Say, config: Path) -> None:
    database, file = config.parent / "data" / "gateway.db", config.parent / "books"
    missing = say("db", "backup", file, "--config", config)
    assert missing.exit_code == 1
    assert f"there is no database {database}" in missing.stderr
    assert not file.exists()
    say("db", "upgrade", "--config", config)
    with closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("INSERT INTO balance (account, posted) VALUES ('team:growth|total', 5)")
        db.execute(
            "INSERT INTO hold (rid, state, bound, accounts, team, key_id, model, operation,"
            " upstream, images, price_id, fingerprint, worker, at, day, lease_ends) VALUES"
            " ('r', 'H', 7, '[]', 'growth', 'k', 'm', 'edit', 'u', 1, 'p', 'f', 'w', 0, 'd', 0)"
        )
        db.execute("INSERT INTO journal (rid, kind, pending, posted) VALUES ('r', 'H', 7, 0)")
    said = say("db", "backup", file, "--config", config)
    assert said.exit_code == 1
    assert "1 calls (1 running), 1 lines of the journal, 0 teams, 0 keys" in said.stdout
    assert "its books do not add up: 1 sums differ" in said.stderr
    assert file.exists()
    assert say("db", "backup", file, "--config", config).exit_code == 1
    assert "use --force" in say("db", "backup", file, "--config", config).stderr
    assert "do not add up" in say("db", "backup", file, "--force", "--config", config).stderr
    pepper = database.parent / "gateway.pepper"
    pepper.write_text("a pepper")
    log = database.parent / "gateway.db-wal"
    log.write_bytes(b"what is not in the database yet")
    for precious in (pepper, log):
        before = precious.read_bytes()
        said = say("db", "backup", precious, "--force", "--config", config)
        assert said.exit_code == 1
        assert f"{precious} is there and is no backup: it is not replaced" in said.stderr
        assert precious.read_bytes() == before
    log.unlink()
    # What mktemp has made has nothing in it.
    (config.parent / "empty").touch()
    said = say("db", "backup", config.parent / "empty", "--force", "--config", config)
    assert "1 calls (1 running)" in said.stdout
    assert "itself" in say("db", "backup", database, "--force", "--config", config).stderr

    text = config.read_text().replace("data/gateway.db", "elsewhere/gateway.db")
    other = config.with_name("other.yaml")
    other.write_text(text)
    restored = say("db", "restore", file, "--config", other)
    assert restored.exit_code == 1
    assert "Calls that ran then are still held" in restored.stdout
    assert str(config.parent / "elsewhere" / "gateway.pepper") in restored.stdout
    assert "the restored books do not add up: 1 sums differ" in restored.stderr
    again = say("db", "restore", file, "--config", other)
    assert "is in use" in again.stderr
