#!/usr/bin/env python3
"""Rehearse a job on a SLURM cluster of two nodes that exists for this purpose alone, on this machine.

Starts munged, slurmctld and two slurmd in a temporary folder, submits train.sbatch for two nodes twice, lets one run in
peace and sends USR1 to the other in the middle, sees it requeued and finished, and compares the two. Takes down what it
started. Needs Debian's or Ubuntu's packages slurm-wlm and munge, of which no service has to run, and `mhe` in the
environment of the Python that runs this::

    apt-get install slurm-wlm munge
    python docker/slurm/rehearse.py
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parents[1] / "configs/quickstart.yaml"
SHORT = [
    *("--trainer.max_steps", "60"),
    *("--trainer.val_check_interval", "60"),
    *("--trainer.log_every_n_steps", "1"),
    *("--checkpoints.every_n_steps", "20"),
]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
"""Where `mhe` is, and the daemons, which only root's own path has."""
NODES = ("node1", "node2")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")


class Cluster:
    """A SLURM controller and two nodes, all of them processes of this one.

    Args:
        folder: where it keeps its configuration, its state and its logs; its path must be short, for a socket.

    Attributes:
        environment: that of commands which talk to this cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": PATH,
            "MASTER_ADDR": "127.0.0.1",  # the nodes' names are known to SLURM alone
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        with ExitStack() as on_error:
            on_error.callback(self.__exit__)
            self._write_configuration()
            self._start("munged", "--foreground", "--force", *self._munge_options())
            wait_for("munged's socket", lambda: (self.folder / "munge.socket").exists(), seconds=10)
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node, log=node)
            wait_for("two idle nodes", self._is_up, seconds=60)
            on_error.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def call(self, *command: str, folder: Path | None = None) -> str:
        """Run one of SLURM's commands; what it prints."""
        done = subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says of a job, such as its JobState."""
        found = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", job))
        if found is None:
            raise RuntimeError(f"scontrol show job {job} has no {name}")
        return found[1]

    def wait(self, job: str, *, seconds: float) -> str:
        """Wait until a job has ended for good; its last state. One that waits to be restarted may start at once."""

        def ended() -> bool:
            state = self.field(job, "JobState")
            if state == "PENDING" and self.field(job, "Reason") == "BeginTime":
                tell(f"job {job}: requeued, to begin at {self.field(job, 'StartTime')}; told to begin now")
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
            return state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

        wait_for(f"the end of job {job}", ended, seconds=seconds)
        return self.field(job, "JobState")

    def _start(self, name: str, *arguments: str, log: str = "") -> None:
        program = shutil.which(name, path=PATH)
        assert program is not None
        with open(self.folder / f"{log or name}.out", "wb") as output:
            self._processes.append(
                subprocess.Popen(
                    [program, *arguments],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )

    def _is_up(self) -> bool:
        for process in self._processes:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args[0]} ended with {process.returncode}; its log is in {self.folder}")
        try:
            return self.call("sinfo", "--noheader", "--format=%D %t") == f"{len(NODES)} idle"
        except RuntimeError:  # no controller yet
            return False

    def _munge_options(self) -> list[str]:
        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "socket": "socket"}
        return [f"--{option}={self.folder / f'munge.{ending}'}" for option, ending in files.items()]

    def _write_configuration(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        host = socket.gethostname().split(".")[0]
        controller, *ports = free_ports(1 + len(NODES))
        processors = os.cpu_count() or 1
        lines = [
            "ClusterName=rehearsal",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.folder}/munge.socket",
            "CredType=cred/munge",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/%n.pid",
            f"SlurmdSpoolDir={self.folder}/%n",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/%n.log",
            # as little as possible of the machine: no cgroups, no pinning, no accounting
            "ProctrackType=proctrack/pgid",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",  # both nodes count the same processors
            "ReturnToService=2",
            "KillWait=10",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={processors}"
                for node, port in zip(NODES, ports, strict=True)
            ),
            f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")


def rehearse(cluster: Cluster, place: Path, config: Path, options: Sequence[str], *, seconds: float) -> None:
    """Run the same job in peace and interrupted, and compare.

    Args:
        cluster: to run on.
        place: the folder to submit from, where logs and runs are left.
        config: the experiment.
        options: more options of `fit`, for both runs.
        seconds: how long each job may take.

    Raises:
        RuntimeError: a run did not end well, or the two are not equal.
    """
    cluster.call("mhe", "prepare", "--config", str(config), folder=place)

    def submit(name: str) -> str:
        file = str(HERE / "train.sbatch")
        arguments = ["--config", str(config), "--trainer.default_root_dir", str(place / "runs"), "--name", name]
        job = cluster.call("sbatch", "--parsable", "--nodes=2", file, *arguments, *options, folder=place)
        tell(f"job {job}: {name}, on two nodes")
        return job

    def finish(job: str) -> None:
        state = cluster.wait(job, seconds=seconds)
        tell(f"job {job}: {state}, restarted {cluster.field(job, 'Restarts')} times")
        if state != "COMPLETED":
            raise RuntimeError(f"job {job} ended as {state}:\n{(place / f'slurm-{job}.out').read_text()[-4000:]}")

    finish(submit("undisturbed"))
    last = max(losses(place / "runs/undisturbed"))

    job = submit("interrupted")
    wait_for("half of the steps", lambda: max(losses(place / "runs/interrupted"), default=0) >= last // 2, seconds)
    cluster.call("scancel", "--signal=USR1", job)
    tell(f"job {job}: sent USR1 after step {max(losses(place / 'runs/interrupted'))} of {last}")
    finish(job)

    tell(cluster.call("mhe", "verify-resume", str(place / "runs/interrupted")))
    peace, interrupted = losses(place / "runs/undisturbed"), losses(place / "runs/interrupted")
    if int(cluster.field(job, "Restarts")) < 1:
        raise RuntimeError(f"job {job} has not been requeued")
    if peace != interrupted:
        raise RuntimeError(f"the losses differ: {peace} undisturbed, {interrupted} interrupted")
    tell(f"train/loss, step {last}: {peace[last]} undisturbed, {interrupted[last]} interrupted; all {len(peace)} agree")


def losses(run: Path) -> dict[int, str]:
    """The training losses of a run by step, as written; none before there are any."""
    try:
        with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
            return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}
    except FileNotFoundError:
        return {}


def wait_for(what: str, happened: Callable[[], bool], seconds: float) -> None:
    """Ask four times a second.

    Raises:
        RuntimeError: it has not happened in time.
    """
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise RuntimeError(f"waited for {what} for {seconds:.0f} s in vain")
        time.sleep(0.25)


def free_ports(n: int) -> list[int]:
    """Ports that nothing listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Other options are those of `mhe fit`, and win over " + " ".join(SHORT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="What to train (default: the quick start).")
    parser.add_argument("--seconds", type=float, default=600, help="How long a job may take (default: 600).")
    parser.add_argument("--keep", action="store_true", help="Leave the folder with logs and runs.")
    options, rest = parser.parse_known_args()
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not found; on Debian or Ubuntu: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Cluster(folder) as cluster:
            tell(f"a controller and {len(NODES)} nodes are up in {folder}")
            place = folder / "work"
            place.mkdir()
            rehearse(cluster, place, options.config.resolve(), [*SHORT, *rest], seconds=options.seconds)
    except RuntimeError as error:
        sys.exit(f"{error}\nlogs are left in {folder}")
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
