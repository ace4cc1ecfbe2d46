"""Installs the peers into ``.tools/bench``, each apart; does nothing for what is there already.

LiteLLM's lock is ``uv pip compile --generate-hashes`` of ``litellm[proxy]==1.109.1``; two of its
own pins were newer than the index that it was made from, and were set by hand: certifi, and
litellm-proxy-extras, which holds migrations of a database that is not used here. So it is installed
with ``--no-deps``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

LOCKS: Final = Path(__file__).parent / "peers"
TOOLS: Final = Path(__file__).parents[2] / ".tools" / "bench"


class MissingTool(Exception):
    """What is not on this machine, and how to get it."""


def litellm() -> Path:
    """The command, installed. Raises ``MissingTool``."""
    folder, lock = TOOLS / "litellm", LOCKS / "litellm" / "requirements.txt"
    if not _is_current(folder, lock):
        shutil.rmtree(folder, ignore_errors=True)
        # Debian's own Python has no ensurepip.
        _run(sys.executable, "-m", "venv", "--without-pip", folder)
        _run(
            *(_pip_python(), "-m", "pip", "--python", folder / "bin" / "python"),
            *("--disable-pip-version-check", "--no-input", "install", "--quiet", "--no-deps"),
            *("--require-hashes", "--requirement", lock),
        )
        _stamp(folder, lock)
    return folder / "bin" / "litellm"


def portkey() -> Path:
    """The folder with Portkey's ``node_modules``, installed. Raises ``MissingTool``."""
    folder, lock = TOOLS / "portkey", LOCKS / "portkey" / "package-lock.json"
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise MissingTool("no node and npm, for Portkey: apt-get install nodejs npm")
    if not _is_current(folder, lock):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(lock.parent / name, folder / name)
        _run(
            *(npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"),
            folder=folder,
        )
        _stamp(folder, lock)
    return folder


def nginx() -> str:
    """The command. Raises ``MissingTool``."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        raise MissingTool("no nginx: apt-get install --no-install-recommends nginx-light")
    return found


def _pip_python() -> str:
    """The Python that has pip: a venv that was made without it knows the one it came from."""
    return str(Path(sys.base_prefix) / "bin" / "python3")


def _is_current(folder: Path, lock: Path) -> bool:
    stamp = folder / "installed"
    return stamp.is_file() and stamp.read_bytes() == lock.read_bytes()


def _stamp(folder: Path, lock: Path) -> None:
    shutil.copyfile(lock, folder / "installed")


def _run(*command: str | Path, folder: Path | None = None) -> None:
    words = [str(word) for word in command]
    print("bench: " + " ".join(words), file=sys.stderr)
    try:
        subprocess.run(words, cwd=folder, check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise MissingTool(f"could not be installed: {error}") from error
