"""The image, built from the Dockerfile as it stands and run by podman, all in a store of their own.

Docker's registry is not asked: the base that the Dockerfile names is made here, of Debian's own
packages, and given its name. The store is in ``.tools``, so that no image of the user's is touched,
and so that a second run takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError, URLError

import pytest

from tests.processes import wait_until

ROOT = Path(__file__).parents[2]
PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap")
BASE = "docker.io/library/python:3.13-slim-trixie"
BASE_RECIPE = (
    "mmdebstrap",
    "--quiet",
    "--variant=essential",
    "--include=apt,python3-minimal,python3-venv,ca-certificates",
    '--aptopt=Acquire::Languages "none"',
    "--dpkgopt=force-unsafe-io",
    *(f"--dpkgopt=path-exclude=/usr/share/{one}/*" for one in ("doc", "man", "locale")),
    # As in the official image there is apt, and `python` is the Python.
    '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python"',
    "trixie",
)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
STATE = "/var/lib/gateway"


def absent(what: str) -> NoReturn:
    """Skips, saying what is missing; where CI has installed everything, that is a failure."""
    if os.environ.get("CI_TOOLS"):
        pytest.fail(what)
    pytest.skip(what)


def need_programs() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        absent(f"no {', '.join(missing)}: apt-get install {' '.join(PROGRAMS)}")
    if os.geteuid() != 0:
        absent("the image is built and run by root: sudo make image")


def run(*command: str | Path, seconds: float = 300, check: bool = True) -> str:
    """What a program prints; what it complains of is in the failure of the test."""
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT
    )
    if check and ended.returncode:
        raise AssertionError(f"{command[0]} ended with {ended.returncode}:\n{ended.stderr}")
    return ended.stdout


@dataclass(frozen=True, slots=True)
class Store:
    """Images and containers in a folder."""

    folder: Path

    def _at(self) -> tuple[str, ...]:
        return ("--root", str(self.folder / "root"), "--runroot", str(self.folder / "run"))

    def buildah(self, *arguments: str | Path) -> str:
        return run("buildah", *self._at(), *arguments)

    def podman(self, *arguments: str | Path, seconds: float = 120) -> str:
        return run("podman", *self._at(), *arguments, seconds=seconds)

    def start_podman(self, *arguments: str) -> subprocess.Popen[bytes]:
        """One that goes on while the test does something else."""
        return subprocess.Popen(
            ["podman", *self._at(), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def image_bytes(self, image: str) -> int:
        return int(self.podman("image", "inspect", "--format", "{{.Size}}", image))

    def make_base(self) -> None:
        """The base, by the name that the Dockerfile gives to it; the machine's trust and its apt
        sources are those of Debian."""
        recipe = hashlib.sha256(repr(BASE_RECIPE).encode()).hexdigest()[:12]
        archive = self.folder / f"base-{recipe}.tar"
        if not archive.exists():
            half = archive.with_suffix(".half.tar")
            run(*BASE_RECIPE, half, "http://deb.debian.org/debian", seconds=400)
            half.rename(archive)
        names = self.podman(
            "images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", "dangling=false"
        )
        if f"localhost/base:{recipe}" not in names.split() or BASE not in names.split():
            self.podman("import", archive, f"localhost/base:{recipe}")
            self.podman("tag", f"localhost/base:{recipe}", BASE)

    def build(self, scratch: Path) -> str:
        """The id of the image that the Dockerfile makes. What pip needs to reach the package index
        from here is mounted while it is built, and is in no layer."""
        mounts: list[str | Path] = []
        if CERTIFICATES.exists():
            mounts += ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        if settings := pip_settings():
            conf = scratch / "pip.conf"
            lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
            conf.write_text(f"[global]\n{lines}")
            mounts += ["--volume", f"{conf}:/etc/pip.conf:ro"]
        made = scratch / "image-id"
        self.buildah(
            *("bud", "--isolation", "chroot", "--layers", "--format", "docker"),
            *("--pull=never", "--network", "host", "--iidfile", made, *mounts, ROOT),
        )
        return made.read_text().strip().removeprefix("sha256:")


def pip_settings() -> dict[str, str]:
    """How pip reaches the index on this machine, where that is not its default."""
    said = run("python3", "-m", "pip", "config", "list", check=False)
    found = re.findall(
        r"^(?:global|install|:env:)\.(index-url|extra-index-url|proxy|trusted-host)='(.*)'$",
        said,
        re.M,
    )
    return {name: value for name, value in found if "file:" not in value}


class Container:
    """A gateway in a container, as an operator would run it who gives it as little as it takes: a
    read-only root file system, no capabilities, and no shell."""

    def __init__(
        self,
        store: Store,
        image: str,
        *arguments: str,
        port: int,
        volume: str,
        config: Path | None = None,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._store = store
        self.port = port
        self.name = f"gateway-test-{secrets.token_hex(4)}"
        set_to = {"GATEWAY_SERVER__HOST": "127.0.0.1", "GATEWAY_SERVER__PORT": str(port)}
        mounted = ["--volume", f"{volume}:{STATE}"]
        if config is not None:
            mounted += ["--volume", f"{config}:/etc/gateway/gateway.yaml:ro"]
        for shell in ("bash", "dash"):
            mounted += ["--volume", f"/dev/null:/usr/bin/{shell}:ro"]
        store.podman(
            *("run", "--detach", "--name", self.name, "--runtime", "runc", "--network", "host"),
            *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"),
            *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp"),
            *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
            # Its timer would be one of systemd, which a container on a CI machine has not.
            *("--health-interval", "disable"),
            *(f"--env={name}={value}" for name, value in {**set_to, **(environment or {})}.items()),
            *mounted,
            *options,
            image,
            *arguments,
        )

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has written, on both of its outputs."""
        ended = subprocess.run(
            ["podman", *self._store._at(), "logs", self.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=True,
        )
        return ended.stdout

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 where nobody answers."""
        try:
            with urllib.request.urlopen(self.origin + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()
        except (URLError, ConnectionError, TimeoutError):
            return 0, ""

    def wait_ready(self) -> None:
        def ready_or_over() -> bool:
            return self.get("/readyz")[0] == 200 or not self.runs

        wait_until(ready_or_over, "the container is ready", 60)
        assert self.runs, self.log

    @property
    def runs(self) -> bool:
        return str(self._state()["Status"]) == "running"

    @property
    def exit_code(self) -> int:
        return int(self._state()["ExitCode"])

    def _state(self) -> Any:
        return json.loads(self._store.podman("inspect", "--format", "{{json .State}}", self.name))

    def say(self, *command: str) -> str:
        """A command inside, as `docker exec` runs it."""
        return self._store.podman("exec", self.name, *command)

    def healthy(self) -> bool:
        """As the HEALTHCHECK of the image says."""
        return self._store.start_podman("healthcheck", "run", self.name).wait(60) == 0

    def stopping(self) -> subprocess.Popen[bytes]:
        """`docker stop`, with the time that a drain may take."""
        return self._store.start_podman("stop", "--time", "60", self.name)

    def stop(self) -> None:
        assert self.stopping().wait(90) == 0

    def start(self) -> None:
        self._store.podman("start", self.name)

    def remove(self) -> None:
        self._store.podman("rm", "--force", "--time", "0", self.name)


@contextmanager
def volume(store: Store) -> Iterator[str]:
    name = f"gateway-test-{secrets.token_hex(4)}"
    store.podman("volume", "create", name)
    try:
        yield name
    finally:
        store.podman("volume", "rm", "--force", name)
