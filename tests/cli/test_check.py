"""`gateway check`: one answer for a script, every mistake for a person."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Say

UPSTREAM = "upstreams: {o: {kind: openai, base_url: 'https://one.example/v1', api_keys: [sk-x]}}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "its.yaml"
    path.write_text(text)
    return path


def test_a_good_file(say: Say, config: Path) -> None:
    said = say("check", "--config", config)
    assert said.exit_code == 0
    assert said.stdout == f"{config}: ok (2 models, 1 team)\n"
    assert said.stderr == ""


def test_nothing_is_opened(say: Say, config: Path) -> None:
    say("check", "--config", config)
    assert sorted(path.name for path in config.parent.iterdir()) == ["gateway.yaml"]


def test_the_file_that_ships_is_found(say: Say) -> None:
    said = say("check")
    assert said.exit_code == 0
    assert "ok (5 models and any other behind '*', 0 teams)" in said.stdout
    assert "warning: " in said.stderr
    assert "upstreams.openai: has no key and is off: set OPENAI_API_KEY" in said.stderr


def test_every_mistake_is_printed_with_its_place(say: Say, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "server: {port: eighty, hots: 127.0.0.1}\n"
        "upstreams: {o: {kind: openai, base_url: 'ftp://one.example'}}\n"
        "models: {m: {upstream: p}}\n",
    )
    said = say("check", "--config", path)
    assert said.exit_code == 2
    assert said.stdout == ""
    lines = said.stderr.splitlines()
    assert len(lines) == 4
    for line, number, where in zip(
        lines, (1, 1, 2, 3), ("server.port", "server", "upstreams.o", "models.m"), strict=True
    ):
        assert line.startswith(f"{path}:{number}:"), line
        assert where in line


def test_no_such_file(say: Say, tmp_path: Path) -> None:
    said = say("check", "--config", tmp_path / "none.yaml")
    assert said.exit_code == 2
    assert "No such file" in said.stderr
    assert "--config FILE or GATEWAY_CONFIG" in said.stderr


def test_every_upstream_of_a_model_needs_a_price(say: Say, tmp_path: Path) -> None:
    two = UPSTREAM.replace("upstreams: {", "upstreams: {p: {kind: sandbox}, ")
    path = written(
        tmp_path,
        two + "models: {gpt-image-2: {upstreams: [o, {upstream: p, model: dep-1}]},\n"
        "  '*': {upstreams: [o, p], auto: pin, pin: {size: 17x17}}}\n",
    )
    said = say("check", "--config", path)
    assert said.exit_code == 2
    lines = [line.removeprefix(f"{path}: ") for line in said.stderr.splitlines()]
    lines = [line for line in lines if "warning" not in line]
    assert lines[0].startswith("models.gpt-image-2: dep-1 has no price at p. Add a row")
    assert [line.split(" knows")[0] for line in lines[1:]] == [
        f"models.*.pin: no price at {upstream}" for upstream in ("o", "p")
    ]


def test_a_model_without_a_price_is_refused(say: Say, tmp_path: Path) -> None:
    path = written(tmp_path, UPSTREAM + "models: {a: {upstream: o, model: b}, c: {upstream: o}}\n")
    said = say("check", "--config", path)
    assert said.exit_code == 2
    assert said.stderr.splitlines() == [
        f"{path}: models.{model}: {there} has no price at o. Add a row under prices.rows, or set "
        "unpriced: allow"
        for model, there in (("a", "b"), ("c", "c"))
    ]


def test_unless_it_is_allowed(say: Say, tmp_path: Path) -> None:
    path = written(tmp_path, UPSTREAM + "models: {c: {upstream: o, unpriced: allow}}\n")
    assert say("check", "--config", path).exit_code == 0


def test_prices_are_checked_too(say: Say, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("- {model: m}\n")
    path = written(tmp_path, UPSTREAM + "prices: {file: prices.yaml}\n")
    said = say("check", "--config", path)
    assert said.exit_code == 2
    assert "prices.yaml" in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize(
    ("model", "size", "quality"),
    [
        ("gpt-image-2", "1024x1024", "xhigh"),
        ("gpt-image-2", "512x512", "low"),
        ("gpt-image-2", "1000x1024", "low"),
        ("gpt-image-1.5", "2048x2048", "low"),
    ],
)
def test_a_pin_that_the_price_does_not_know_is_refused(
    say: Say, tmp_path: Path, model: str, size: str, quality: str
) -> None:
    pin = f"auto: pin, pin: {{size: {size}, quality: {quality}}}"
    models = f"models: {{art: {{upstream: o, model: {model}, {pin}}}}}\n"
    path = written(tmp_path, UPSTREAM + models)
    said = say("check", "--config", path)
    assert said.exit_code == 2
    assert said.stderr.splitlines() == [
        f"{path}: models.art.pin: the price of {model} does not know size {size} with quality "
        f"{quality}. Pin what it draws, or set auto: bound"
    ]
    path = written(tmp_path, UPSTREAM + models.replace("auto: pin", "auto: bound"))
    assert say("check", "--config", path).exit_code == 0


def test_a_pin_of_any_other_model_is_what_one_of_them_draws(say: Say, tmp_path: Path) -> None:
    def said(size: str, quality: str) -> tuple[int, str]:
        pin = f"{{size: {size}, quality: {quality}}}"
        models = f"models: {{'*': {{upstream: o, auto: pin, pin: {pin}}}}}\n"
        path = written(tmp_path, UPSTREAM + models)
        ended = say("check", "--config", path)
        return ended.exit_code, ended.stderr.removeprefix(f"{path}: ")

    assert said("1024x1024", "low")[0] == 0
    # One that only a single model draws will do.
    assert said("512x512", "standard")[0] == 0
    assert said("640x64", "low") == (
        2,
        "models.*.pin: no price at o knows size 640x64 with quality low. Pin what its models draw, "
        "or set auto: bound\n",
    )


def test_a_pin_that_it_knows_is_taken(say: Say, tmp_path: Path) -> None:
    model = "{upstream: o, model: gpt-image-2, auto: pin}"
    path = written(tmp_path, UPSTREAM + f"models: {{art: {model}}}\n")
    assert say("check", "--config", path).exit_code == 0


RETIRED = """\
compat: {default_model: old, aliases: {dall-e-2: old, dall-e-3: stood-in-for}}
models:
  gpt-image-2: {upstream: o}
  old: {upstream: o, model: gpt-image-1}
  stood-in-for: {upstream: o, model: gpt-image-1, fallback: [old, gpt-image-2]}
teams:
  growth: {keys: [{key: growth-key-0123456789abcdef, name: ci, compat: {default_model: old}}]}
"""


def test_what_leads_to_a_retired_model_is_warned_of(say: Say, tmp_path: Path) -> None:
    path = written(tmp_path, UPSTREAM + RETIRED)
    said = say("check", "--config", path)
    assert said.exit_code == 0, said.stderr
    over = "openai shut gpt-image-1 down on 2026-10-23"
    instead = "Its replacement is gpt-image-2.5-flare"
    refused = f"{over}, so such calls are refused. {instead}"
    assert said.stderr.splitlines() == [
        f"warning: {path}: {line}"
        for line in (
            f"models.old: {refused}",
            f"models.stood-in-for: {over}; gpt-image-2 answers for it. {instead}",
            f"compat.aliases.dall-e-2 leads to old: {refused}",
            f"compat.default_model leads to old: {refused}",
            f"teams.growth.keys: the key ci: compat.default_model leads to old: {refused}",
        )
    ]


def test_an_empty_file_is_asked_about(say: Say, tmp_path: Path) -> None:
    """Half of a copy, or the wrong name: it loads, and routes nothing."""
    (tmp_path / "empty.yaml").write_text("")
    said = say("check", "--config", "empty.yaml")
    assert said.exit_code == 0
    assert "or is this empty file the one you meant?" in said.stderr
