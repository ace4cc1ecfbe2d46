"""Files that change in every way that operators and Kubernetes change them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.filewatch import FileWatch, look, source
from gateway.settings import ConfigError, load


def watched(*paths: Path) -> FileWatch:
    return FileWatch(source(path) for path in paths)


def changed(watch: FileWatch) -> bool:
    return watch.changed(look(watch.paths))


def mounted(folder: Path, text: str) -> Path:
    """A folder as Kubernetes mounts a ConfigMap: name -> ..data/name, ..data -> a dated folder."""
    first = folder / "..2026_01"
    first.mkdir()
    (first / "file").write_text(text)
    (folder / "..data").symlink_to("..2026_01")
    (folder / "file").symlink_to("..data/file")
    return folder / "file"


def swap(folder: Path, text: str) -> None:
    second = folder / "..2026_02"
    second.mkdir()
    (second / "file").write_text(text)
    (folder / "..data_tmp").symlink_to("..2026_02")
    os.rename(folder / "..data_tmp", folder / "..data")
    (folder / "..2026_01" / "file").unlink()


def rename(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("same")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    other.rename(path)


def link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


CHANGES: dict[str, Callable[[Path], object]] = {
    "written in place": lambda path: path.write_text("other text"),
    "as long as before": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
    "renamed over, as old and as long": rename,
    "a link in its place": link,
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_is_seen_once(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file"
    path.write_text("same")
    watch = watched(path)
    assert not changed(watch)
    CHANGES[how](path)
    assert changed(watch)
    assert not changed(watch)


def test_kubernetes_swaps_a_folder(tmp_path: Path) -> None:
    path = mounted(tmp_path, "one")
    watch = watched(path)
    assert not changed(watch)
    swap(tmp_path, "two")
    assert changed(watch)
    assert not changed(watch)
    assert path.read_text() == "two"


def test_a_file_that_is_away_for_one_look_is_on_its_way(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("same")
    watch = watched(path)
    path.rename(tmp_path / "aside")
    assert not changed(watch)
    (tmp_path / "aside").rename(path)
    assert not changed(watch), "it is the very same file"
    path.unlink()
    assert not changed(watch)
    path.write_text("other text")
    assert changed(watch)


def test_a_file_that_stays_away_is_told_once_and_again_when_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("same")
    watch = watched(path)
    path.rename(tmp_path / "aside")
    assert [changed(watch) for _ in range(4)] == [False, True, False, False]
    (tmp_path / "aside").rename(path)
    assert changed(watch)


def test_a_reading_that_failed_adds_what_it_saw(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    watch = watched(one)
    watch.read([source(two)])
    assert not changed(watch)
    two.write_text("2")
    assert changed(watch)
    watch.only([source(one)])
    two.write_text("22")
    assert not changed(watch)


def test_what_changes_while_it_is_read_is_seen_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("half")
    before = source(path)
    path.write_text("whole")
    watch = FileWatch([before])
    assert changed(watch)


CONFIG = """\
upstreams: {openai: {kind: openai, base_url: "https://h/v1", api_keys: ["${file:key}"],
  verify: ca.pem}}
models: {art: {upstream: openai}}
prices: {file: prices.yaml}
"""


def test_the_settings_say_what_they_were_read_from(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(CONFIG)
    (tmp_path / "key").write_text("sk-1\n")
    (tmp_path / "prices.yaml").write_text("[]")
    (tmp_path / "ca.pem").write_text("a bundle")
    found = load(path, {})
    assert [one.path for one in found.sources] == [
        tmp_path / name for name in ("gateway.yaml", "key", "ca.pem", "prices.yaml")
    ]
    assert all(one.stamp is not None for one in found.sources)
    (tmp_path / "key").unlink()
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert {one.path.name: one.stamp is None for one in caught.value.sources}["key"]
    (tmp_path / "key").write_text("sk-1\n")
    (tmp_path / "ca.pem").unlink()
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert {one.path.name: one.stamp is None for one in caught.value.sources}["ca.pem"]
    path.unlink()
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert [one.path for one in caught.value.sources] == [path]
