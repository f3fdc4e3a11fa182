"""Checkpoints that are whole or refused, metrics that a resumed run continues, and the run directory."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from mhe_lightning import run
from mhe_lightning.callbacks import Checkpoints
from mhe_lightning.callbacks.metrics_csv import MetricsCSV
from mhe_lightning.checkpoint import (
    CHECKSUM,
    FORMAT_VERSION,
    RECORD,
    AtomicCheckpointIO,
    CheckpointError,
    checkpoints_in,
    config_of,
    damage,
    newest_checkpoint,
    read_checkpoint,
    run_of,
    set_aside,
    step_of,
)
from mhe_lightning.files import sha256, write_text


def content(step: int = 0, version: object = FORMAT_VERSION) -> dict:
    return {
        "state_dict": {"w": torch.arange(5000.0) + step},
        "global_step": step,
        RECORD: {"format_version": version, "config": "name: tiny\nmodel: {lr: 0.1}\n"},
    }


def save(folder: Path, step: int, **kwargs) -> Path:
    path = folder / f"step={step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(step, **kwargs), path)
    return path


def checksum(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_the_checksum(path: Path) -> None:
    checksum(path).unlink()


DAMAGES = {
    "cut short": (cut_short, "truncated or damaged"),
    "flipped byte": (flip_a_byte, "truncated or damaged"),
    "empty": (empty, "truncated or damaged"),
    "no checksum": (lose_the_checksum, "not written completely"),
}
every_damage = pytest.mark.parametrize(("harm", "named"), DAMAGES.values(), ids=DAMAGES)


# Whole files


def test_what_was_saved_is_read(tmp_path):
    path = save(tmp_path / "new" / "folder", 3)
    assert names(path.parent) == [path.name, path.name + CHECKSUM]
    assert checksum(path).read_text().strip() == sha256(path)
    assert damage(path) is None
    for checkpoint in (read_checkpoint(path), AtomicCheckpointIO().load_checkpoint(str(path))):
        assert torch.equal(checkpoint["state_dict"]["w"], torch.arange(5000.0) + 3)
        assert config_of(checkpoint) == {"name": "tiny", "model": {"lr": 0.1}}


def test_saving_again_replaces_the_file(tmp_path):
    path = save(tmp_path, 3)
    AtomicCheckpointIO().save_checkpoint(content(4), path)
    assert read_checkpoint(path)["global_step"] == 4
    assert len(names(tmp_path)) == 2


def test_removing_takes_the_checksum_along(tmp_path):
    path = save(tmp_path, 3)
    AtomicCheckpointIO().remove_checkpoint(path)
    assert names(tmp_path) == []
    AtomicCheckpointIO().remove_checkpoint(path)  # is not there: nothing to do


@every_damage
def test_a_damaged_checkpoint_is_refused_and_skipped(tmp_path, harm, named):
    older, newer = save(tmp_path, 2), save(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newer
    harm(newer)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(newer)
    with pytest.warns(UserWarning, match=f"skipping checkpoint .*{newer.name}.*{named}"):
        assert newest_checkpoint(tmp_path) == older
    harm(older)
    with pytest.warns(UserWarning, match=older.name):
        assert newest_checkpoint(tmp_path) is None


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    (tmp_path / "step=9.ckpt").write_bytes(b"")
    for step in (100, 20, 3):
        save(tmp_path, step)
    AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "best-step=00000200.ckpt")  # not to resume from
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [3, 9, 20, 100]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the damaged one is older: nobody asks for it
        assert newest_checkpoint(tmp_path) == tmp_path / "step=00000100.ckpt"
    assert newest_checkpoint(tmp_path / "absent") is None
    assert step_of(tmp_path / "last.ckpt") == -1


@pytest.mark.parametrize("raised", [RuntimeError("no space left"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, raised):
    path = save(tmp_path, 3)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def fail(checkpoint, file):
        file.write(b"half of it")
        raise raised

    monkeypatch.setattr(torch, "save", fail)
    for step in (3, 4):  # in the place of an old one, and as a new one
        with pytest.raises(type(raised)):
            save(tmp_path, step)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert newest_checkpoint(tmp_path) == path


def test_a_crash_between_checkpoint_and_checksum_leaves_one_that_counts_as_unfinished(tmp_path, monkeypatch):
    older = save(tmp_path, 2)

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("mhe_lightning.checkpoint.write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 4)
    with pytest.warns(UserWarning, match="step=00000004.ckpt"):
        assert newest_checkpoint(tmp_path) == older


# What is never loaded


@pytest.mark.parametrize("version", [None, 0, FORMAT_VERSION + 1, "1"])
def test_an_unknown_format_is_refused_with_both_versions(tmp_path, version):
    path = save(tmp_path, 1, version=version)
    with pytest.raises(CheckpointError, match=rf"format version {version}; .* reads {FORMAT_VERSION}"):
        read_checkpoint(path)


@pytest.mark.parametrize("foreign", [{"state_dict": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"])
def test_a_file_of_another_origin_is_refused(tmp_path, foreign):
    path = tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint(foreign, path)
    with pytest.raises(CheckpointError, match="format version None"):
        read_checkpoint(path)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "step=1.ckpt")
    (tmp_path / "step=1.ckpt").write_text("not a checkpoint")
    write_text(tmp_path / f"step=1.ckpt{CHECKSUM}", sha256(tmp_path / "step=1.ckpt"))
    with pytest.raises(CheckpointError, match="cannot be read as tensors and plain data"):
        read_checkpoint(tmp_path / "step=1.ckpt")


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path, plain_pickle):
    trap, path = tmp_path / "owned", tmp_path / "step=1.ckpt"
    checkpoint = {**content(), "callbacks": Malicious(trap)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(checkpoint))
        write_text(checksum(path), sha256(path))
    else:
        AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    for read in (read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointError, match="cannot be read as tensors and plain data"):
            read(path)
    with pytest.raises(CheckpointError):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)  # not even where Lightning asks for it
    assert not trap.exists()
    trusting = pickle.loads(path.read_bytes()) if plain_pickle else torch.load(path, weights_only=False)
    trusting["callbacks"].close()
    assert trap.exists()  # the trap does work


# metrics.csv


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def log(folder: Path, *entries: tuple[int, dict[str, float]], finish: bool = True) -> MetricsCSV:
    table = MetricsCSV(folder)
    for step, metrics in entries:
        table.write(metrics, step)
    if finish:
        table.close()
    return table


def test_metrics_of_a_step_share_a_row(tmp_path):
    log(tmp_path, (1, {"a": 0.5}), (1, {"b": 2.0}), (2, {"a": 0.25}), (4, {"b": 3.0}), (4, {"b": 4.0}))
    assert rows(tmp_path) == [
        {"step": "1", "a": "0.5", "b": "2.0"},
        {"step": "2", "a": "0.25", "b": ""},
        {"step": "4", "a": "", "b": "4.0"},
    ]


def test_new_metrics_add_columns_to_the_rows_before(tmp_path):
    log(tmp_path, (1, {"a": 0.5}), (2, {"a": 0.25, "z": 1.0}), (3, {"c": 7.0}))
    assert rows(tmp_path) == [
        {"step": "1", "a": "0.5", "z": "", "c": ""},
        {"step": "2", "a": "0.25", "z": "1.0", "c": ""},
        {"step": "3", "a": "", "z": "", "c": "7.0"},
    ]
    assert names(tmp_path) == ["metrics.csv"]


def test_numbers_are_written_in_full(tmp_path):
    value = 0.1 + 0.2
    log(tmp_path, (1, {"a": value}), (2, {"a": float("nan")}))
    assert [row["a"] for row in rows(tmp_path)] == [repr(value), "nan"]


def test_a_resumed_run_drops_what_it_computes_again(tmp_path):
    log(tmp_path, *((step, {"a": float(step)}) for step in range(1, 7)))
    log(tmp_path, (4, {"a": 40.0}), (5, {"a": 50.0, "b": 1.0}))
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", ""),
        ("4", "40.0", ""),
        ("5", "50.0", "1.0"),
    ]


def test_a_step_that_is_logged_again_after_a_restart_keeps_its_other_columns(tmp_path):
    log(tmp_path, (1, {"a": 1.0, "b": 2.0}), (2, {"a": 3.0, "b": 4.0}))
    log(tmp_path, (2, {"a": 9.0, "c": 5.0}))  # as a validation after the last step does
    assert rows(tmp_path) == [
        {"step": "1", "a": "1.0", "b": "2.0", "c": ""},
        {"step": "2", "a": "9.0", "b": "4.0", "c": "5.0"},
    ]


@pytest.mark.parametrize(
    "cut",
    [
        len(",4.125\n"),  # the last column is missing
        pytest.param(
            len("25\n"),  # its number is
        ),
    ],
)
def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path, cut):
    log(tmp_path, (1, {"a": 1.0, "b": 2.0}), (2, {"a": 3.0, "b": 4.125}))
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text()[:-cut])
    log(tmp_path, (5, {"a": 9.0, "b": 9.0}))
    assert [row["step"] for row in rows(tmp_path)] == ["1", "5"]


def test_rows_are_on_disk_while_the_run_goes_on(tmp_path):
    table = log(tmp_path, (1, {"a": 1.0}), (2, {"a": 2.0}), (2, {"b": 3.0}), (3, {"a": 4.0}), finish=False)
    expected = [
        {"step": "1", "a": "1.0", "b": ""},
        {"step": "2", "a": "2.0", "b": "3.0"},
        {"step": "3", "a": "4.0", "b": ""},
    ]
    assert rows(tmp_path) == expected  # a checkpoint must never be ahead of its metrics
    table.write({"a": 4.0, "b": 5.0}, 3)
    assert rows(tmp_path) == [*expected[:2], {"step": "3", "a": "4.0", "b": "5.0"}]
    table.close()
    assert len(rows(tmp_path)) == 3


def test_a_run_that_logs_nothing_leaves_the_file_alone(tmp_path):
    log(tmp_path)
    assert names(tmp_path) == []
    log(tmp_path, (1, {"a": 1.0}))
    before = (tmp_path / "metrics.csv").read_bytes()
    log(tmp_path)
    assert (tmp_path / "metrics.csv").read_bytes() == before


# Which checkpoints are kept


class Scored(BoringModel):
    """Its validation losses are given beforehand."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = iter(losses)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", next(self.losses))


def fit(folder: Path, losses: list[float], *, steps: int = 8, resume: Path | None = None, **settings) -> Checkpoints:
    """A validation every 2 steps, with ``losses``."""
    callback = Checkpoints(**{"every_n_steps": 2, **settings})

    class Record:
        def on_save_checkpoint(self, checkpoint):
            checkpoint[RECORD] = {"format_version": FORMAT_VERSION, "config": ""}

    model = Scored(losses)
    model.on_save_checkpoint = Record().on_save_checkpoint
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=steps,
        val_check_interval=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[callback],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path=resume, weights_only=True)
    return callback


def kept(folder: Path) -> list[str]:
    found = names(folder / "checkpoints")
    whole = [name for name in found if name.endswith(".ckpt")]
    assert found == sorted([*whole, *(name + CHECKSUM for name in whole)])
    for name in whole:
        assert read_checkpoint(folder / "checkpoints" / name)["global_step"] == step_of(Path(name))
    return [name.replace("step=0000000", "").removesuffix(".ckpt") for name in whole]


@pytest.mark.parametrize(
    ("losses", "keep", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], 2, ["best-8", "6", "8"]),
        ([1.0, 2.0, 3.0, 4.0], 2, ["best-2", "6", "8"]),
        ([3.0, 1.0, 2.0, 1.0], 1, ["best-4", "8"]),  # of equals the first
        ([3.0, 1.0, 2.0, 4.0], 9, ["best-4", "2", "4", "6", "8"]),
        ([3.0, float("nan"), 2.0, float("nan")], 1, ["best-6", "8"]),
        pytest.param(
            [float("nan"), 3.0, 2.0, 4.0],
            1,
            ["best-6", "8"],
        ),
    ],
    ids=str,
)
def test_the_newest_and_the_best_are_kept(tmp_path, losses, keep, expected):
    fit(tmp_path, losses, keep=keep)
    assert kept(tmp_path) == expected


def test_without_a_monitor_there_is_no_best(tmp_path):
    fit(tmp_path, [4.0, 3.0, 2.0, 1.0], monitor=None)
    assert kept(tmp_path) == ["6", "8"]


def test_the_last_step_is_always_saved(tmp_path):
    fit(tmp_path, [4.0, 3.0, 2.0], steps=7, every_n_steps=5)
    assert kept(tmp_path) == ["best-6", "5", "7"]


def test_a_resumed_run_prunes_the_files_of_the_one_before(tmp_path):
    fit(tmp_path, [4.0, 1.0], steps=4)
    assert kept(tmp_path) == ["best-4", "2", "4"]
    fit(tmp_path, [3.0, 0.5], resume=tmp_path / "checkpoints" / "best-step=00000004.ckpt")
    assert kept(tmp_path) == ["best-8", "6", "8"]


def test_a_resumed_run_knows_the_best_validation_of_the_step_it_goes_on_from(tmp_path):
    fit(tmp_path, [4.0, 1.0], steps=4)
    fit(tmp_path, [3.0, 5.0], resume=tmp_path / "checkpoints" / "step=00000004.ckpt")
    assert kept(tmp_path) == ["best-4", "6", "8"]


@pytest.mark.parametrize("setting", ["every_n_steps", "keep"])
def test_settings_of_checkpoints_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=rf"{setting} \(0\)"):
        Checkpoints(**{setting: 0})


# The run directory


def test_a_run_or_a_checkpoint_is_found(tmp_path):
    folder = tmp_path / "tiny"
    older, newer = save(folder / "checkpoints", 2), save(folder / "checkpoints", 4)
    assert run_of(folder) == (folder, newer)
    assert run_of(older) == (folder, older)


def test_what_is_neither_run_nor_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run_of(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        run_of(tmp_path / "absent")
    flip_a_byte(save(tmp_path / "checkpoints", 1))
    with pytest.warns(UserWarning, match="skipping"), pytest.raises(CheckpointError, match="no complete checkpoint"):
        run_of(tmp_path)


def test_auto_is_the_newest_checkpoint_or_none(tmp_path):
    assert run.resolve_checkpoint("auto", tmp_path) is None
    assert run.last_step(tmp_path) == -1
    newest = save(tmp_path / "checkpoints", 4)
    assert run.resolve_checkpoint("auto", tmp_path) == str(newest)
    assert run.last_step(tmp_path) == 4
    assert run.resolve_checkpoint("some.ckpt", tmp_path) == "some.ckpt"
    assert run.resolve_checkpoint(None, tmp_path) is None


def test_an_earlier_run_of_the_same_name_is_set_aside(tmp_path):
    folder = tmp_path / "tiny"
    assert run.set_aside(folder) is None
    folder.mkdir()
    (folder / run.LOCK).touch()
    assert run.set_aside(folder) is None  # a lock alone is no run
    for number in (1, 2):
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(str(number))
        assert run.set_aside(folder) == tmp_path / f"tiny.{number}"
        assert not folder.exists()
    assert [(tmp_path / f"tiny.{number}" / "config.yaml").read_text() for number in (1, 2)] == ["1", "2"]


def test_a_run_is_written_by_one_process_at_a_time(tmp_path):
    folder = tmp_path / "tiny"

    def refused() -> None:
        with pytest.raises(ValueError, match=rf"{folder} is being written by process \d+"):
            run.lock(folder)

    with run.lock(folder):
        assert in_a_fork(refused)
        assert in_a_fork(lambda: run.lock(tmp_path / "other"))
    assert in_a_fork(lambda: run.lock(folder))


def test_a_process_that_a_killed_run_leaves_behind_does_not_hold_its_lock(tmp_path):
    def killed_with_a_worker() -> None:
        run.lock(tmp_path)
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert not in_a_fork(killed_with_a_worker)
    run.lock(tmp_path).close()


def in_a_fork(action: Callable[[], object]) -> bool:
    """Whether ``action`` succeeds in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("kinds", ["file file", "folder folder", "file folder", "folder file"])
def test_a_checkpoint_is_set_aside_over_one_of_its_step(kinds, tmp_path):
    path = tmp_path / "step=00000002.ckpt"
    for number, kind in enumerate(kinds.split()):
        if kind == "folder":
            path.mkdir()
            (path / "part").write_text(str(number), encoding="utf-8")
        else:
            path.write_text(str(number), encoding="utf-8")
            path.with_name(path.name + ".sha256").write_text("sum", encoding="utf-8")
        set_aside(path)
        assert not path.exists()

    aside = tmp_path / "superseded" / path.name
    assert (aside / "part" if aside.is_dir() else aside).read_text(encoding="utf-8") == "1"
    assert aside.with_name(aside.name + ".sha256").exists() == aside.is_file()


def test_differences_of_configs_are_named_by_their_keys():
    old = {"model": {"lr": 0.1, "net": {"width": 8}}, "seed": 1, "gone": [1, 2]}
    new = {"model": {"lr": 0.2, "net": {"width": 8}}, "seed": 1, "new": {"a": None}}
    assert run.differences(old, new) == [
        ("gone", [1, 2], None),
        ("model.lr", 0.1, 0.2),
        ("new", None, {"a": None}),
    ]
    assert run.differences(old, old) == []
    assert run.differences({"a": {"b": 1}}, {"a": 2}) == [("a", {"b": 1}, 2)]
