"""Runs of several processes that lose one, or are told to end, and go on: they end as undisturbed ones."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import logged, prepare
from processes import run

STEPS = 120
ONE_NODE = ["--trainer.num_nodes=1", "--trainer.devices=2"]
TWO_NODES = ["--trainer.num_nodes=2", "--trainer.devices=1"]

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture
def fit(tiny_config: Callable[..., Path], tmp_path: Path) -> list[str]:
    """The command line of a run; one called "undisturbed", of two processes too, has been made."""
    config = tiny_config(trainer={"max_steps": STEPS, "val_check_interval": STEPS})
    content = yaml.safe_load(config.read_text())
    content["checkpoints"]["every_n_steps"] = 10
    config.write_text(yaml.safe_dump(content))
    prepare(content)
    assert run(["fit", "--config", str(config), *ONE_NODE, "--name", "undisturbed"], ranks=2) == [0, 0]
    return ["-m", "mhe_lightning", "fit", "--config", str(config), "--ckpt_path", "auto"]


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_elastic_torchrun_restarts_a_group_whose_worker_was_killed(n_nodes, fit, tmp_path):
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--max-restarts=2"]
    options = [f"--nnodes={n_nodes}", f"--nproc-per-node={2 // n_nodes}", *rendezvous]
    command = [*torchrun(*options), *fit, *(ONE_NODE if n_nodes == 1 else TWO_NODES)]
    with Nodes([command] * n_nodes, tmp_path) as nodes:
        nodes.wait_for_step(STEPS // 3)
        kill_worker_of(nodes.processes[-1])
        assert nodes.exit_codes() == [0] * n_nodes, nodes.log()
        assert "going on from" in nodes.log()
    assert_undisturbed(tmp_path)


def test_static_torchrun_ends_on_all_nodes_when_a_worker_was_killed_and_may_be_begun_again(fit, tmp_path):
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "--max-restarts=0"]
    options = [[f"--node-rank={node}", "--nnodes=2", "--nproc-per-node=1", *address] for node in range(2)]
    commands = [[*torchrun(*own), *fit, *TWO_NODES] for own in options]
    with Nodes(commands, tmp_path) as nodes:
        nodes.wait_for_step(STEPS // 3)
        kill_worker_of(nodes.processes[-1])
        assert nodes.exit_codes() == [1, 1], nodes.log()
    with Nodes(commands, tmp_path) as nodes:
        assert nodes.exit_codes() == [0, 0], nodes.log()
        assert "going on from" in nodes.log()
    assert_undisturbed(tmp_path)


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_pods_end_with_143_when_one_is_told_to_end_and_go_on_when_they_are_replaced(n_nodes, fit, tmp_path):
    """NODE_RANK alone tells pods apart; in each `mhe` starts the processes, and is all that the signal reaches."""
    command = [sys.executable, *fit, *(ONE_NODE if n_nodes == 1 else TWO_NODES)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**address, "NODE_RANK": str(node)} for node in range(n_nodes)]
    with Nodes([command] * n_nodes, tmp_path, environments) as nodes:
        nodes.wait_for_step(STEPS // 3)
        nodes.processes[-1].terminate()
        assert nodes.exit_codes() == [143] * n_nodes, nodes.log()
    with Nodes([command] * n_nodes, tmp_path, environments) as nodes:
        assert nodes.exit_codes() == [0] * n_nodes, nodes.log()
        assert nodes.log().count("going on from") == 1
    assert not (tmp_path / "runs/tiny.1").exists()
    assert_undisturbed(tmp_path)


class Nodes:
    """Processes that stand for nodes, all on this machine.

    Args:
        commands: a command line for each.
        folder: where their logs and the run are.
        environments: what each has beyond this process's own.
    """

    def __init__(
        self, commands: list[list[str]], folder: Path, environments: list[dict[str, str]] | None = None
    ) -> None:
        self.run = folder / "runs/tiny"
        self._logs = [folder / f"node{number}.log" for number in range(len(commands))]
        self.processes = []
        for command, log, own in zip(commands, self._logs, environments or [{}] * len(commands), strict=True):
            # without this torch leaves the addresses of dead processes in a store that it keeps
            environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", **own}
            with open(log, "wb") as output:
                self.processes.append(
                    subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
                )

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()  # its own processes with it
        for process in self.processes:
            process.wait(timeout=60)

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 600
        while not ((self.run / "metrics.csv").is_file() and max(logged(self.run, "train/loss"), default=0) >= step):
            assert time.monotonic() < end, self.log()
            assert all(process.poll() is None for process in self.processes), self.log()
            time.sleep(0.02)

    def exit_codes(self) -> list[int]:
        return [process.wait(timeout=600) for process in self.processes]

    def log(self) -> str:
        return "".join(log.read_text() for log in self._logs)


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options]


def kill_worker_of(agent: subprocess.Popen[bytes]) -> None:
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def assert_undisturbed(folder: Path) -> None:
    losses = logged(folder / "runs/tiny", "train/loss")
    assert len(losses) == STEPS
    assert losses == logged(folder / "runs/undisturbed", "train/loss")
