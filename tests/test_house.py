"""The rules of the house, as tables: who may import whom, and what is not done here, and why."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gateway"

ROOMS = {
    "domain": set[str](),
    "ports": {"domain"},
    "clock": set[str](),
    "filewatch": set[str](),
    "descriptors": set[str](),
    "machine": set[str](),
    "watchdog": {"ports"},
    "yamlfile": {"filewatch"},
    "reading": {"filewatch", "yamlfile", "domain"},
    "secret": set(),
    "settingvalues": {"filewatch", "reading", "secret", "yamlfile", "domain"},
    "settings": {"filewatch", "reading", "secret", "settingvalues", "yamlfile", "domain"},
    "healthcheck": {"settings"},
    "pricefile": {"domain"},
    "notify": {"ports", "domain"},
    "upstream": {"ports", "domain"},
    "threads": set[str](),
    "stores": {"ports", "domain", "threads"},
    "telemetry": {"ports", "domain"},
    "reports": {"ports", "domain"},
    "sandbox": {"ports", "domain"},
    "relay": {"ports", "domain"},
    "api": {"relay", "ports", "domain"},
    "loop": {"threads"},
    "protocol": {"api", "ports", "relay"},
    "server": {"api", "protocol"},
    "housekeeping": {"ports", "domain"},
    "supervisor": {"ports"},
    "reload": {"domain", "filewatch", "settings", "yamlfile"},
    "assembly_stores": {
        "descriptors", "domain", "ports", "relay", "settings", "stores", "telemetry",
    },
    "assembly": {
        "domain", "notify", "ports", "pricefile", "relay", "secret", "settings", "stores",
        "telemetry", "upstream", "yamlfile",
    },
    # It looks at what the parts need, each by itself: so it sits beside them, above the stores.
    "doctor": {
        "assembly", "descriptors", "domain", "ports", "pricefile", "relay", "secret", "settings",
        "stores", "upstream", "yamlfile",
    },
    "swap": {
        "assembly", "domain", "filewatch", "ports", "pricefile", "relay", "reload", "reports",
        "sandbox", "settings", "telemetry", "upstream",
    },
    "doors": {"api", "ports", "relay", "settings", "telemetry"},
    "vitals": {"api", "domain", "machine", "ports", "relay", "stores", "telemetry"},
    "app": {
        "api", "assembly", "assembly_stores", "clock", "descriptors", "domain", "doors",
        "housekeeping", "machine", "ports", "relay", "reload", "reports", "settings", "stores",
        "swap", "telemetry", "upstream", "vitals", "watchdog",
    },
    "cli": {
        "app", "assembly", "assembly_stores", "clock", "doctor", "domain", "filewatch",
        "healthcheck", "loop", "ports", "pricefile", "reload", "reports", "sandbox", "server",
        "settings", "stores", "supervisor", "telemetry",
    },
    "__main__": {"cli"},
}  # fmt: skip
"""Each room of the house, and the rooms it may import from besides itself. One way: no cycle."""

STANDARD_LIBRARY_ONLY = {"domain"}

BANNED_CALLS = {
    "datetime.now": "time comes from the one clock",
    "datetime.utcnow": "time comes from the one clock",
    "datetime.today": "time comes from the one clock",
    "date.today": "time comes from the one clock",
    "time.time": "time comes from the one clock",
    "time.monotonic": "time comes from the one clock",
    "time.sleep": "nothing here may block",
    "asyncio.get_event_loop": "the loop is the running one",
    "print": "the log speaks, or click.echo in a command",
    "breakpoint": "it stops the world",
    "eval": "nothing from outside is code",
    "exec": "nothing from outside is code",
}
EXEMPT_FROM_CALLS = {
    ("clock.py", "datetime.now"),
    ("clock.py", "time.monotonic"),
}
BANNED_NAMES = {
    "BaseHTTPMiddleware": "one of them costs 17 ms on a 10 MB body, against 0.8 ms of pure ASGI",
    "StreamingResponse": "it loses an awaiting `finally` when the client leaves",
    "BackgroundTasks": "what must happen, happens in the flight",
}
HTTPX_HOME = "upstream/transport.py"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, by its full dotted name."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: relative import"
            base = node.module or ""
            yield base
            for alias in node.names:
                if (ROOT / base.replace(".", "/") / f"{alias.name}.py").exists():
                    yield f"{base}.{alias.name}"


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def each_module(check: Callable[[Path], None]) -> Callable[[], None]:
    """One test that makes a check of every module, and tells of all that fail it: a test each
    would cost more than its check, some thousand times."""

    def of_every_module() -> None:
        wrong = []
        for path in modules():
            try:
                check(path)
            except AssertionError as error:
                wrong.append(f"{name_of(path)}: {error}")
        assert not wrong, "\n".join(wrong)

    of_every_module.__name__, of_every_module.__doc__ = check.__name__, check.__doc__
    return of_every_module


@each_module
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "gateway" and len(parts) > 1:
            assert parts[1] in ROOMS[room] | {room}, f"{room} must not import {name}"


@each_module
def test_the_domain_needs_nothing_but_the_standard_library(path: Path) -> None:
    if room_of(path) in STANDARD_LIBRARY_ONLY:
        roots = {name.split(".")[0] for name in imported(path)} - {"gateway"}
        assert roots <= STANDARD_LIBRARY, roots - STANDARD_LIBRARY
        awaits = [
            node for node in ast.walk(tree_of(path)) if isinstance(node, ast.AsyncFunctionDef)
        ]
        assert not awaits, "nothing in the domain is async"


STANDARD_LIBRARY = {
    "__future__", "collections", "contextlib", "dataclasses", "datetime", "decimal", "difflib",
    "enum", "fractions", "functools", "hashlib", "hmac", "ipaddress", "itertools", "json", "math",
    "operator", "re", "secrets", "types", "typing", "zlib", "zoneinfo",
}  # fmt: skip


def test_no_module_is_in_a_cycle() -> None:
    graph = {}
    for path in modules():
        name = ".".join(("gateway", *path.relative_to(PACKAGE).with_suffix("").parts))
        graph[name.removesuffix(".__init__")] = {
            one for one in imported(path) if one.startswith("gateway.")
        }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in graph.get(name, set()) - {name}:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@each_module
def test_no_import_is_inside_a_function(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = [one for one in ast.walk(node) if isinstance(one, (ast.Import, ast.ImportFrom))]
            assert not inner, f"line {node.lineno}: {node.name} imports inside"


@each_module
def test_nothing_banned_is_called_or_named(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if (name_of(path), called) not in EXEMPT_FROM_CALLS:
                assert called not in BANNED_CALLS, f"line {node.lineno}: {BANNED_CALLS[called]}"
        if isinstance(node, (ast.Name, ast.Attribute)):
            named = dotted(node).rpartition(".")[2]
            assert named not in BANNED_NAMES, f"line {node.lineno}: {BANNED_NAMES[named]}"


@each_module
def test_only_the_transport_knows_httpx(path: Path) -> None:
    if name_of(path) != HTTPX_HOME:
        assert not {name for name in imported(path) if name.split(".")[0] == "httpx"}


@each_module
def test_no_relayed_body_is_parsed_whole(path: Path) -> None:
    """`.json()` reads and decodes a whole body: 81-97 ms for 10.7 MB, against 1 ms of skimming."""
    if room_of(path) in ("relay", "api", "upstream"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "json", f"line {node.lineno}"


@each_module
def test_no_exception_is_swallowed_unseen(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
            quiet = all(isinstance(one, (ast.Pass, ast.Continue)) for one in node.body)
            assert not (broad and quiet), f"line {node.lineno}"


@each_module
def test_no_state_lives_in_a_module(path: Path) -> None:
    """A list, dict or set at the top of a module is shared by everything that imports it."""
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in tree_of(path).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [dotted(target) for target in targets]
            constant = all(name.strip("_").isupper() for name in names)
            assert constant or not isinstance(node.value, mutable), f"line {node.lineno}: {names}"
        assert not isinstance(node, ast.Global)
    globals_ = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Global)]
    assert not globals_


@each_module
def test_no_note_is_left_for_later(path: Path) -> None:
    text = path.read_text()
    for word in ("TODO", "FIXME", "XXX", "NotImplementedError"):
        assert word not in text
    for line in text.splitlines():
        bare = line.strip()
        assert not (
            bare.startswith("#") and set(bare[1:].strip()) <= set("=-#*~") and len(bare) > 4
        )


@each_module
def test_every_module_says_what_it_is_for(path: Path) -> None:
    if path.read_text().strip():
        assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"


def test_the_top_level_is_the_design_card() -> None:
    """Packages and places that the design card names; beside them only what it allows."""
    allowed = {
        "pyproject.toml", "gateway", "config", "tests", "helm", "Dockerfile", "README.md",
        "CHANGELOG.md", "Makefile", "LICENSE", "requirements.txt", "requirements-build.txt",
    }  # fmt: skip
    ignored = {"dist", "build", "node_modules"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - ignored <= allowed
