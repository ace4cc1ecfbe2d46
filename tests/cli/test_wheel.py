"""What is published: the source archive, the wheel built from it, and the wheel installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.processes import wait_until

ROOT = Path(__file__).parents[2]
BASE_PYTHON = os.path.realpath(sys.executable)


def build(source: Path, target: str, folder: Path) -> Path:
    """Builds with the backend of pyproject.toml, without asking any registry."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=60,
    )
    [made] = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, as an installer that finds no wheel does."""
    folder = tmp_path_factory.mktemp("source")
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True, timeout=60)
    [source] = folder.iterdir()
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of a new environment that has this wheel. What it needs is
    taken from the environment of the tests."""
    if subprocess.run([BASE_PYTHON, "-m", "pip", "--version"], check=False).returncode:
        pytest.skip(f"{BASE_PYTHON} has no pip")
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    python = folder / "bin" / "python"
    installer = [BASE_PYTHON, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run(
        [*installer, "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
        timeout=60,
    )
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(packages, "from-the-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def gateway(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [installed / "gateway", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_archive_has_the_project_and_nothing_else(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    tops = {path.parts[0] for path in names}
    assert tops == {
        ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "PKG-INFO", "README.md", "config",
        "gateway", "pyproject.toml", "tests",
    }  # fmt: skip
    assert not any("node_modules" in path.parts or path.suffix == ".pyc" for path in names)
    assert archive.stat().st_size < 3_000_000


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "gateway",
        "image_gateway",
    }
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gateway").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    read = {name for name in source if name.startswith(("gateway/docs/", "gateway/README"))}
    shipped = {"gateway/_config/gateway.yaml", "gateway/_config/prices.yaml"}
    assert {name for name in names if name.startswith("gateway/")} == source - read | shipped


def test_the_commands_work_far_from_the_repository(installed: Path, tmp_path: Path) -> None:
    assert gateway(installed, tmp_path, "--version").stdout.startswith("gateway, version ")
    checked = gateway(installed, tmp_path, "check")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith(f"{installed.parent}/lib/")
    assert "gateway/_config/gateway.yaml: ok" in checked.stdout
    # The books of the file that ships are nobody's: a key made there would work nowhere.
    listed = gateway(installed, tmp_path, "team", "list")
    assert listed.returncode == 2
    assert "no configuration is named: use --config FILE" in listed.stderr
    assert "gateway/_config/gateway.yaml will do to begin with" in listed.stderr
    own = tmp_path / "gateway.yaml"
    own.write_text("server: {port: 0}\n")
    listed = gateway(installed, tmp_path, "team", "list", "--config", str(own))
    assert listed.returncode == 0, listed.stderr
    assert (tmp_path / "data" / "gateway.db").exists()


def test_the_demo_works_far_from_the_repository(installed: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("w") as file:
        demo = subprocess.Popen(
            [installed / "gateway", "demo", "--port", "0"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"]},
        )
    try:
        wait_until(
            lambda: "Ctrl-C ends it." in output.read_text() or demo.poll() is not None,
            "the demo is ready",
        )
        assert demo.poll() is None, output.read_text()
        assert (tmp_path / ".demo" / "lighthouse.png").exists()
    finally:
        demo.kill()
        demo.wait()
