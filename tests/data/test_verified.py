"""Prepared data that were damaged are named before anything is trained, and hashed no more often than they change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from mhe_lightning.data import verified
from mhe_lightning.data.verified import STAMP, damaged_file
from mhe_lightning.files import sha256


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [cut_short, flip_a_bit])
@pytest.mark.parametrize("form", ["packed", "examples", "translation"])
def test_damaged_data_stop_fit_before_the_earlier_run_is_touched(
    form, harm, tiny_config, tiny_classifier, tiny_translation, tmp_path, command
):
    settings = {"data": {"cache_dir": str(tmp_path / "cache")}, "trainer": {"max_steps": 2, "val_check_interval": 2}}
    path = {
        "packed": lambda: tiny_config(**settings),
        "examples": lambda: tiny_classifier("glue", "rte", **settings),
        "translation": lambda: tiny_translation(**settings),
    }[form]()
    name = yaml.safe_load(path.read_text())["name"]
    assert command("fit", "--config", str(path))[0] == 0
    damaged = next((tmp_path / "cache").rglob("train-00000.bin" if form == "packed" else "train.arrow"))
    harm(damaged)

    code, _, err = command("fit", "--config", str(path))

    assert code == 2
    assert damaged.name in err
    assert damaged.parent.name in err
    assert "run prepare again" in err
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [name]


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """Two files, their checksums, and a list of those that are read."""
    checksums = {}
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(name.encode() * 100)
        checksums[name] = sha256(tmp_path / name)
    read: list[str] = []
    monkeypatch.setattr(verified, "sha256", lambda file: read.append(file.name) or sha256(file))
    return tmp_path, checksums, read


def test_what_was_found_whole_is_not_read_again(hashed):
    folder, checksums, read = hashed
    for _ in range(2):
        assert damaged_file(folder, checksums) is None
    assert read == ["a.bin", "b.bin"]
    assert damaged_file(folder, checksums, again=True) is None
    assert read == ["a.bin", "b.bin"] * 2


def test_what_was_touched_is_read_again_also_where_its_time_was_set_back(hashed):
    folder, checksums, read = hashed
    damaged_file(folder, checksums)
    read.clear()
    before = (folder / "b.bin").stat()
    flip_a_bit(folder / "b.bin")
    os.utime(folder / "b.bin", ns=(before.st_atime_ns, before.st_mtime_ns))

    for _ in range(2):  # and is not taken for whole the second time
        assert damaged_file(folder, checksums) == "b.bin"
    assert read == ["b.bin"] * 2


def test_a_copy_is_read_anew(hashed, tmp_path):
    folder, checksums, read = hashed
    damaged_file(folder, checksums)
    read.clear()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (*checksums, STAMP):
        shutil.copy2(folder / name, copy)

    assert damaged_file(copy, checksums) is None
    assert read == ["a.bin", "b.bin"]


@pytest.mark.parametrize("stamp", ["", "[]", "{]"])
def test_a_damaged_stamp_is_none(hashed, stamp):
    folder, checksums, read = hashed
    (folder / STAMP).write_text(stamp)
    assert damaged_file(folder, checksums) is None
    assert read == ["a.bin", "b.bin"]


def test_a_folder_that_cannot_be_written_is_read_every_time(hashed, monkeypatch):
    folder, checksums, read = hashed

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(verified, "write_text", refuse)
    for _ in range(2):
        assert damaged_file(folder, checksums) is None
    assert read == ["a.bin", "b.bin"] * 2
