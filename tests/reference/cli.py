"""The page of every command, from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from inspect import cleandoc
from types import MappingProxyType

import click

from gateway.cli import main
from gateway.cli.common import OrNone
from tests.reference.markdown import table

EXAMPLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "serve": ("gateway serve --config gateway.yaml --workers 4",),
        "check": ("gateway check --config gateway.yaml",),
        "doctor": ("gateway doctor --json",),
        "health": ("gateway health --ready",),
        "demo": ("gateway demo --upstream openai --port 9000",),
        "sandbox": ("gateway sandbox --port 8090 --control",),
        "team create": (
            "gateway team create design --budget-month 100 --images-per-minute 10",
            "gateway team create art --time-zone Europe/Berlin --models gpt-image-2.5-flare",
        ),
        "team update": ("gateway team update design --budget-month 150 --soft-budget-week none",),
        "team list": ("gateway team list --json",),
        "team revoke": ("gateway team revoke design",),
        "key create": ("gateway key create --team design --name ci --expires 2027-01-01",),
        "key list": ("gateway key list --team design",),
        "key revoke": ("gateway key revoke ort1fjqnr8",),
        "usage": ("gateway usage --since 2026-11-01 --until 2026-11-30 --team growth",),
        "ledger unresolved": ("gateway ledger unresolved --json",),
        "ledger show": ("gateway ledger show req_ac0f465690a4ee972906d128",),
        "ledger adjust": (
            'gateway ledger adjust req_ac0f465690a4ee972906d128 --cost 0.042 --reason "their bill"',
        ),
        "ledger verify": ("gateway ledger verify",),
        "ledger factors": ("gateway ledger factors",),
        "reconcile": (
            "gateway reconcile --day 2026-11-20",
            "gateway reconcile --day 2026-11-20 --csv costs.csv --upstream openai",
        ),
        "export focus": (
            "gateway export focus --from 2026-11-01 --to 2026-11-30 --out november.csv",
        ),
        "db upgrade": ("gateway db upgrade",),
        "db status": ("gateway db status --json",),
        "db backup": ("gateway db backup books.backup",),
        "db restore": ("gateway db restore books.backup",),
    }
)
"""Command -> how it is called; every command has one."""


def commands(
    command: click.Command = main, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, click.Command]]:
    """Every command and group below ``gateway``, by its words."""
    if path:
        yield " ".join(path), command
    if isinstance(command, click.Group):
        for name, inside in command.commands.items():
            yield from commands(inside, (*path, name))


def page() -> str:
    return _HEAD + "".join(_section(words, command) for words, command in commands())


_HEAD = """\
# Every command

<!-- Written by `make docs` from gateway/cli. -->

`gateway` is in `.venv/bin` after `make run`, and wherever `pip install .` puts it; `python -m
gateway` is the same. `-h` or `--help` explains each command, `--version` says which release it is.

Commands read the same configuration as the gateway: `--config FILE`, else `$GATEWAY_CONFIG`, else
`config/gateway.yaml` here. `serve`, `check`, `doctor` and `health` go on to the file that ships;
the others refuse it, because its books are nobody's. They work beside a running gateway, on its
machine or wherever its database can be reached.

| exit code | |
|---|---|
| 0 | done |
| 1 | it could not be done, or it found what somebody has to look at; standard error says what |
| 2 | the configuration is wrong, or the command was not understood |
| 3 | `reconcile`: the bill and the books differ |
| 128 + n | `serve`: told to end twice; running calls were given up |
"""


def _section(words: str, command: click.Command) -> str:
    parts = [f"\n## `gateway {words}`\n\n{_help(command)}\n"]
    if isinstance(command, click.Group):
        inside = (
            f"[`{one}`](#gateway-{words.replace(' ', '-')}-{one})" for one in command.commands
        )
        return f"{parts[0]}\n{', '.join(inside)}\n"
    assert words in EXAMPLES, f"give an example of `gateway {words}` in {__name__}"
    shown = "".join(f"$ {example}\n" for example in EXAMPLES[words])
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    usage = " ".join(("gateway", words, "[options]", *map(_metavar, arguments)))
    parts.append(f"\n```console\n{shown}```\n\nUsage: `{usage}`\n\n")
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    parts.append(table(("option", "value", "default", ""), map(_option, options)))
    return "".join(parts)


def _help(command: click.Command) -> str:
    """The paragraphs of its help; those that are set line by line stay so."""
    paragraphs = cleandoc(command.help or "").split("\n\n")
    said = []
    for paragraph in paragraphs:
        if paragraph.startswith("\b"):
            said.append(f"```text\n{paragraph.removeprefix(chr(8)).strip()}\n```")
        else:
            said.append(" ".join(paragraph.split()))
    return "\n\n".join(said)


def _option(option: click.Option) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = "" if option.is_flag else f"`{_metavar(option)}`"
    default = "needed" if option.required else _default(option)
    many = " May be given several times." if option.multiple else ""
    return names, value, default, f"{_said(option.help or '')}{many}"


def _metavar(parameter: click.Parameter) -> str:
    """What stands for its value."""
    kind = parameter.type
    if isinstance(kind, click.DateTime):
        # As a day of the calendar, and as a moment of it.
        day = datetime(2026, 11, 20, tzinfo=UTC)
        return "|".join(day.strftime(form) for form in kind.formats)
    if isinstance(kind, OrNone):
        return "NUMBER|none" if kind.name.startswith("integer") else "DOLLARS|none"
    if isinstance(kind, click.IntRange | click.FloatRange):
        return f"{kind.min} or more" if kind.max is None else f"{kind.min} to {kind.max}"
    return parameter.make_metavar(click.Context(main))


def _default(option: click.Option) -> str:
    value = option.to_info_dict()["default"]
    if option.is_flag or value is None or callable(value) or value in ("", (), []):
        return ""
    return f"`{value}`"


def _said(text: str) -> str:
    """As prose: what stands for something else is not taken for HTML."""
    return re.sub(r"<([a-z]+)>", r"\\<\1>", " ".join(text.split()))
