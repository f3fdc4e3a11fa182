"""What ends a run from outside leaves its newest checkpoint, says what to do, and leaves nothing running."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from conftest import logged, prepare
from mhe_lightning import run as run_folder
from mhe_lightning.checkpoint import AtomicCheckpointIO, damage, newest_checkpoint
from mhe_lightning.errors import RunError
from mhe_lightning.files import lacks_space, write_text
from processes import run

ENDS = 12


class WithWorkers(Callback):
    """Does something to this process's data workers before a micro-batch.

    Args:
        micro_batch: the micro-batch, counted in this process.
        deed: "kill" one of them, or "terminate the group" of this process and them.
    """

    def __init__(self, micro_batch: int, deed: str) -> None:
        self.micro_batch = micro_batch
        self.deed = deed

    def on_train_start(self, trainer, pl_module) -> None:
        os.setpgid(0, 0)  # the workers have begun, so they are left out: they are signalled one by one
        own = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        self.workers = [int(pid) for pid in own]
        (Path(trainer.default_root_dir) / "workers").write_text(" ".join(own))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx != self.micro_batch:
            return
        if self.deed == "kill":
            os.kill(self.workers[0], signal.SIGKILL)
            time.sleep(0.1)
            return
        sender = os.fork()
        if sender == 0:
            for pid in [*self.workers, os.getppid()]:
                os.kill(pid, signal.SIGTERM)
            os._exit(0)
        os.waitpid(sender, 0)


@pytest.fixture
def with_workers(tiny_config, tmp_path, capfd):
    """Runs `fit` with two data workers to whom something is done; gives exit codes, what was printed, and them."""

    def run_fit(deed: str) -> tuple[list[int], str, list[int]]:
        path = tiny_config(data={"num_workers": 2}, trainer={"max_steps": ENDS})
        prepare(yaml.safe_load(path.read_text()))
        options = ["--trainer.callbacks+=test_faults.WithWorkers", "--trainer.callbacks.micro_batch=6"]
        codes = run(["fit", "--config", str(path), *options, f"--trainer.callbacks.deed={deed}"])
        workers = (tmp_path / "runs/tiny/workers").read_text().split()
        return codes, "".join(capfd.readouterr()), [int(pid) for pid in workers]

    return run_fit


def test_a_dead_data_worker_is_one_line_and_the_newest_checkpoint_stays(with_workers, tmp_path):
    codes, printed, workers = with_workers("kill")

    assert codes == [1], printed
    assert f"error: rank 0: data worker {workers[0]} was killed by signal: Killed" in printed
    assert "Traceback" not in printed
    assert newest_checkpoint(tmp_path / "runs/tiny/checkpoints").name == "step=00000006.ckpt"
    assert left_running(workers) == []


def test_a_signal_to_workers_too_saves_the_step(with_workers, tmp_path):
    codes, printed, workers = with_workers("terminate the group")

    assert codes == [143], printed
    assert newest_checkpoint(tmp_path / "runs/tiny/checkpoints").name == "step=00000007.ckpt"
    assert left_running(workers) == []


def left_running(pids: list[int]) -> list[int]:
    deadline = time.monotonic() + 15  # workers look after their trainer every five seconds
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system here")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "test", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_says_how_much_it_needs(small_disk):
    def save(step: int, numbers: int) -> Path:
        path = small_disk / f"step={step:08d}.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(numbers)}}, path)
        return path

    first = save(1, 100_000)
    for step in (1, 2):  # in its place, and beside it
        with pytest.raises(RunError, match=rf"{step:08d}.ckpt: no space left .* about 4,000,000 bytes, 1,\d+,\d+ are"):
            save(step, 1_000_000)
        assert damage(first) is None
        assert sorted(os.listdir(small_disk)) == [first.name, first.name + ".sha256"]


def test_a_text_that_does_not_fit_leaves_the_one_before(small_disk):
    path = small_disk / "results.json"
    write_text(path, "before")
    with pytest.raises(RunError, match=r"results.json: no space left .* needs more than \d"):
        write_text(path, "x" * 3_000_000)
    assert path.read_text() == "before"


def test_an_error_that_is_its_own_cause_is_looked_at_once():
    error = RuntimeError("connection reset")
    error.__cause__ = error
    assert not lacks_space(error)
    error = RuntimeError("unexpected position")
    error.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert lacks_space(error)


@pytest.mark.parametrize("what", ["a checkpoint", "a row of metrics", "TensorBoard's file"])
def test_a_run_on_a_full_disk_stops_with_its_newest_checkpoint_and_goes_on_when_there_is_room(
    what, small_disk, tiny_config, tmp_path, capfd
):
    path = tiny_config(trainer={"max_steps": ENDS})
    prepare(yaml.safe_load(path.read_text()))
    fit = ["fit", "--config", str(path), "--ckpt_path", "auto"]
    on_small_disk = ["--trainer.default_root_dir", str(small_disk), "--trainer.callbacks+=test_faults.FillDisk"]
    free = {"a checkpoint": 60_000, "a row of metrics": 0, "TensorBoard's file": 0}[what]
    logger = [] if what == "TensorBoard's file" else ["--trainer.logger", "false"]
    codes = run([*fit, *on_small_disk, f"--trainer.callbacks.free={free}", *logger])
    printed = "".join(capfd.readouterr())

    assert codes == [1], printed
    assert "no space left on its disk" in printed
    assert "Traceback" not in printed
    assert newest_checkpoint(small_disk / "tiny/checkpoints").name == "step=00000004.ckpt"
    assert list((small_disk / "tiny").rglob("*.tmp")) == []
    (small_disk / "filler").unlink()
    assert run([*fit, "--trainer.default_root_dir", str(small_disk)]) == [0]
    assert run([*fit, "--name", "whole"]) == [0]
    assert logged(small_disk / "tiny", "train/loss") == logged(tmp_path / "runs/whole", "train/loss")


class FillDisk(Callback):
    """Fills the disk of the run after the fifth step but for so many bytes.

    Args:
        free: the bytes.
    """

    def __init__(self, free: int) -> None:
        self.free = free

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx != 5:
            return
        disk = Path(trainer.default_root_dir).parent
        with open(disk / "filler", "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            file.truncate(max(0, file.tell() - self.free))


# What is left behind


def test_what_a_killed_process_was_writing_is_removed_when_its_run_goes_on(tmp_path):
    unfinished = tmp_path / ".results.json.host-123.tmp"
    unfinished.write_text("{")
    (tmp_path / "results.json").write_text("{}")
    run_folder.lock(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [run_folder.LOCK, "results.json"]


def test_damaged_checkpoints_do_not_add_up(tiny_config, tmp_path):
    path = tiny_config(trainer={"max_steps": 8})
    prepare(yaml.safe_load(path.read_text()))
    assert run(["fit", "--config", str(path)]) == [0]
    folder = tmp_path / "runs/tiny/checkpoints"
    newest = newest_checkpoint(folder)
    newest.write_bytes(newest.read_bytes()[:-100])

    assert run(["fit", "--config", str(path), "--ckpt_path", "auto"]) == [0]

    assert newest_checkpoint(folder) == newest
    assert list((folder / "superseded").glob("step=*")) == []  # beside a best one, which is whole
