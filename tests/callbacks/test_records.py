"""Logs of each process, traces of chosen steps, and what memory did before it ran out."""

from __future__ import annotations

import csv
import gzip
import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from conftest import logged, prepare
from mhe_lightning.callbacks import MemoryTimeline, Profile
from mhe_lightning.callbacks.failures import is_collateral, is_out_of_memory
from processes import run


class Warns(Callback):
    """Each rank warns of something."""

    def on_train_start(self, trainer, pl_module) -> None:
        warnings.warn(f"rank {trainer.global_rank} has its doubts", stacklevel=1)


class OutOfMemory(Callback):
    """Memory runs out after the forward pass of the fourth micro-batch."""

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")


@pytest.mark.distributed
def test_each_of_several_processes_has_a_log_that_a_resumed_run_continues(tiny_config, tmp_path):
    path = tiny_config(trainer={"devices": 2, "strategy": "ddp"})
    prepare(yaml.safe_load(path.read_text()))
    fit = ["fit", "--config", str(path), "--trainer.callbacks+=callbacks.test_records.Warns"]

    assert run([*fit, "--trainer.max_steps=4"], ranks=2, log=tmp_path / "log") == [0, 0]
    assert run([*fit, "--ckpt_path=auto"], ranks=2, log=tmp_path / "log") == [0, 0]

    logs = sorted((tmp_path / "runs" / "tiny" / "logs").iterdir())
    assert [log.name for log in logs] == ["rank-0000.log", "rank-0001.log"]
    for rank, log in enumerate(logs):
        text = log.read_text()
        assert text.count(f"rank {rank} has its doubts") == 2
        assert f"rank {1 - rank} has its doubts" not in text


def test_a_single_process_has_no_log(tiny_config, tmp_path, command):
    assert command("fit", "--config", str(tiny_config()))[0] == 0

    assert not (tmp_path / "runs" / "tiny" / "logs").exists()


def events(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def test_chosen_steps_are_traced_and_train_as_without(tiny_config, tmp_path, command):
    config = str(tiny_config(trainer={"accumulate_grad_batches": 2, "val_check_interval": 8}))

    code, out, err = command("fit", "--config", config, "--profile.first_step=3", "--profile.n_steps=2")
    assert code == 0, err
    assert command("fit", "--config", config, "--name=plain")[0] == 0

    runs = tmp_path / "runs"
    assert [path.name for path in sorted((runs / "tiny" / "profile").iterdir())] == [
        "rank-0000.trace.json.gz",
        "rank-0000.txt",
    ]
    steps = [e for e in events(runs / "tiny" / "profile" / "rank-0000.trace.json.gz") if "Optimizer.step" in e["name"]]
    assert len(steps) == 2
    assert (runs / "tiny" / "profile" / "rank-0000.txt").read_text() in out
    assert not (runs / "plain" / "profile").exists()
    assert logged(runs / "tiny", "train/loss") == logged(runs / "plain", "train/loss")


def test_steps_beyond_the_end_are_traced_as_far_as_there_are_any(tiny_config, tmp_path, command):
    code, _, err = command("fit", "--config", str(tiny_config()), "--profile.first_step=8", "--profile.n_steps=5")

    assert code == 0, err
    assert (tmp_path / "runs" / "tiny" / "profile" / "rank-0000.trace.json.gz").is_file()


def test_memory_before_it_ran_out_is_written(tiny_config, tmp_path, capfd):
    callback = "--trainer.callbacks+=callbacks.test_records.OutOfMemory"
    options = ["fit", "--config", str(tiny_config()), callback, "--memory.micro_batches=2"]

    assert run(options, log=tmp_path / "log") == [1]

    path = tmp_path / "runs" / "tiny" / "logs" / "rank-0000.memory.csv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "3", "4"], "the last two and the one that failed"
    assert all(int(row["bytes_before"]) > 1e6 for row in rows)
    assert not rows[-1]["bytes_after"]
    out, err = capfd.readouterr()
    assert str(path) in err
    assert "step 4: out of memory" in out + err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("shape mismatch"), False),
        (KeyError("NCCL"), False),
    ],
)
def test_what_counts_as_the_loss_of_another_rank(error, expected):
    assert is_collateral(error) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Profile(first_step=0), r"first_step \(0\)"),
        (lambda: Profile(n_steps=0), r"n_steps \(0\)"),
        (lambda: MemoryTimeline(micro_batches=-1), r"micro_batches \(-1\)"),
    ],
)
def test_numbers_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
