"""torchrun restarts a group of which a process was killed, and the run ends as an undisturbed one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conftest import logged, prepare
from processes import run

STEPS = 120

LAUNCHERS = {
    "elastic, one node": [["--standalone", "--nproc-per-node=2"]],
    "elastic, two nodes": [
        ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{port}"]
    ]
    * 2,
    "static, two nodes": [
        ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1", "--master-port={port}"]
        for node in range(2)
    ],
}
"""The options of torchrun on each node."""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_worker_killed_in_the_middle_does_not_change_the_losses(launcher, tiny_config, tmp_path):
    nodes = LAUNCHERS[launcher]
    config = tiny_config(trainer={"max_steps": STEPS, "val_check_interval": STEPS, "strategy": "ddp"})
    content = yaml.safe_load(config.read_text())
    content["checkpoints"]["every_n_steps"] = 10
    config.write_text(yaml.safe_dump(content))
    prepare(content)
    fit = [
        "fit",
        "--config",
        str(config),
        "--trainer.num_nodes",
        str(len(nodes)),
        "--trainer.devices",
        str(2 // len(nodes)),
    ]
    assert run(["fit", "--config", str(config), "--trainer.devices", "2", "--name", "undisturbed"], ranks=2) == [0, 0]

    agents = launch(nodes, [*fit, "--name", "killed", "--ckpt_path", "auto"], tmp_path)
    try:
        killed = kill_a_worker(agents, tmp_path / "runs/killed")
        codes = [agent.wait(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # its workers with it
            agent.wait(timeout=60)
    log = "".join(path.read_text() for path in sorted(tmp_path.glob("agent*.log")))
    assert codes == [0] * len(nodes), log
    assert killed < STEPS
    assert "going on from" in log
    assert logged(tmp_path / "runs/killed", "train/loss") == logged(tmp_path / "runs/undisturbed", "train/loss")


def launch(nodes: list[list[str]], command: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    agents = []
    for number, options in enumerate(nodes):
        filled = [option.format(port=port) for option in options]
        with open(folder / f"agent{number}.log", "wb") as log:
            agents.append(
                subprocess.Popen(
                    [*torchrun, *filled, "--max-restarts=2", "-m", "mhe_lightning", *command],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                )
            )
    return agents


def kill_a_worker(agents: list[subprocess.Popen[bytes]], folder: Path) -> int:
    """SIGKILL to the last agent's last worker when a third of the steps is done; the step it was at."""
    end = time.monotonic() + 240
    while (step := last_step(folder)) < STEPS // 3:
        assert time.monotonic() < end
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.02)
    agent = agents[-1].pid
    workers = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    return step


def last_step(folder: Path) -> int:
    return max(map(int, logged(folder, "train/loss")), default=0) if (folder / "metrics.csv").is_file() else 0
