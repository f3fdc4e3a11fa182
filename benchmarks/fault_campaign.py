"""Runs that are killed, terminated, starved and damaged again and again, and must end as if nothing had happened.

    python benchmarks/fault_campaign.py --runs 240 --out docs/results/faults.json

Every run is one of a tiny decoder in forked processes, in which all from the command line's `main` on is real. It is
given one to three faults, and restarted with ``--ckpt_path auto`` after each, until it has finished. It passes if

1. every attempt ended within the time limit, with one of the exit codes that its fault promises;
2. no process was left running;
3. an attempt went on from the newest checkpoint that was whole, and lost no more steps than lie between two
   checkpoints (sharded ones, written in the background: between three; none at SIGTERM while it trained);
4. in the end weights, optimizer state, losses, validation scores and the names of the checkpoints equal bit for bit
   those of a run without faults, on the same number of ranks and data workers;
5. `verify-resume` finds no row skipped or repeated.

What is done to run number i is a function of ``--seed`` and i. What was found is kept in ``--work`` run by run; the
same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from common import machine
from fault_injection import ALL, PLACES, Fault, Processes, start

from mhe_lightning.callbacks.run_record import git_commit, versions
from mhe_lightning.checkpoint import checkpoints_in, damage, read_checkpoint, step_of

STEPS = 24
EVERY = 4
VALIDATE_EVERY = 8
DISK_BYTES = 6_000_000
TIME_LIMIT = 120.0
ALONE = 15.0
"""Seconds in which the other ranks must end by themselves once one has failed."""

JOINED = "All distributed processes registered"
"""What Lightning says when all ranks are there."""

SIGTERM_CODES = (143, -signal.SIGTERM)
EXACT = ("step", "train/", "val/", "lr", "grad_norm", "tokens_seen")
"""Metrics that depend on no clock, by their beginnings; `tokens_per_second`, `mfu` and `data_wait` do."""

COUNTED = ("put", "struck", "most_steps_lost", "problems")
"""Columns of the table: how often a fault was put there, how often it ended an attempt, and what followed."""

DAMAGES = ("cut short", "byte flipped", "checksum changed", "checksum lost", "empty")
SHAPES = ((1, 0), (1, 2), (2, 0), (2, 1))
"""(ranks, data workers of each)"""


@dataclass
class Attempt:
    """One start of a run and its end."""

    fault: Fault | None
    damaged: str | None
    codes: list[int | None]
    seconds: float
    went_on_from: int
    reached: int
    trained: bool
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Runs with faults in one folder.

    Args:
        work: folder of runs, data and finished results.
        seed: of the faults.
        overlay: a config that is laid over the tiny one, such as a strategy; None for DDP.
    """

    def __init__(self, work: Path, seed: int, overlay: Path | None) -> None:
        self.work = work.resolve()
        self.seed = seed
        self.commit = git_commit()
        self.overlay = overlay
        self.config = self.work / "config.yaml"
        self.work.mkdir(parents=True, exist_ok=True)
        _write_prose(self.work / "prose.jsonl")
        self.config.write_text(yaml.safe_dump(_config(self.work)), encoding="utf-8")
        self._references: dict[tuple[int, int], tuple[dict[str, Any], float]] = {}
        if self._start("prepare", "--config", str(self.config)).codes != [0]:
            raise RuntimeError(f"prepare failed: {(self.work / 'log').read_text()}")

    # One run

    def run(self, number: int) -> dict[str, Any]:
        """Run ``number`` with its faults, and what was found."""
        draw = random.Random(f"{self.seed}-{number}")
        ranks, workers = draw.choice([shape for shape in SHAPES if self.overlay is None or shape[0] > 1])
        _, usual = self.reference(ranks, workers)
        faults = draw_faults(draw, ranks, workers, usual)
        damages = [None, *(draw.choice(DAMAGES) if draw.random() < 0.25 else None for _ in faults)]
        return {"run": number, **self.undergo(f"run{number:04d}", ranks, workers, faults, damages, draw)}

    def undergo(
        self,
        name: str,
        ranks: int,
        workers: int,
        faults: Sequence[Fault],
        damages: Sequence[str | None] = (),
        draw: random.Random | None = None,
    ) -> dict[str, Any]:
        """A run with these faults, and what was found.

        Args:
            name: of the run.
            ranks: its processes.
            workers: the data workers of each.
            faults: one for each attempt; one more is made without.
            damages: before each attempt what is done to the newest checkpoint, of `DAMAGES` or None.
            draw: where files are damaged.
        """
        draw = draw or random.Random(name)
        expected, _ = self.reference(ranks, workers)
        attempts: list[Attempt] = []
        with self._root(name) as root:
            for fault, damage_to in zip_longest([*faults, None], damages[: len(faults) + 1]):
                damaged = self._damage(root / name, damage_to, draw) if damage_to else None
                since = len(attempts) - next((i for i, a in enumerate(reversed(attempts)) if a.trained), len(attempts))
                n_damaged = sum(a.damaged is not None for a in attempts[since:]) + (damaged is not None)
                attempts.append(self._attempt(name, root, ranks, workers, fault, damaged, n_damaged))
                if attempts[-1].codes == [0] * ranks:
                    break
            problems = [problem for attempt in attempts for problem in attempt.problems]
            if attempts[-1].codes == [0] * ranks:
                problems += self._compare(root, name, expected)
            else:
                problems.append(f"it did not finish: {attempts[-1].codes}")
            if problems:
                kept = self.work / "failed" / name
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(root, kept)
        attempted = [asdict(attempt) for attempt in attempts]
        return {"ranks": ranks, "workers": workers, "attempts": attempted, "problems": problems, "commit": self.commit}

    def reference(self, ranks: int, workers: int) -> tuple[dict[str, Any], float]:
        """What a run without faults leaves, and the seconds that it takes."""
        if (ranks, workers) not in self._references:
            name = f"whole-{ranks}-{workers}"
            begun = time.monotonic()
            with self._root(name) as root:
                attempt = self._attempt(name, root, ranks, workers, None)
                if attempt.codes != [0] * ranks or attempt.problems:
                    raise RuntimeError(f"a run without faults failed: {attempt}\n{(root / 'log').read_text()}")
                self._references[ranks, workers] = content(root / name), time.monotonic() - begun
        return self._references[ranks, workers]

    @contextmanager
    def _root(self, name: str) -> Iterator[Path]:
        """A folder for the run; a small file system of its own where that may be mounted."""
        root = self.work / "roots" / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        mounted = can_mount()
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "faults", root], check=True)
        try:
            yield root
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", root], check=True)
            shutil.rmtree(root, ignore_errors=True)

    def _attempt(
        self,
        name: str,
        root: Path,
        ranks: int,
        workers: int,
        fault: Fault | None,
        damaged: str | None = None,
        n_damaged: int = 0,
    ) -> Attempt:
        """Start the run, which may be damaged, and judge how it went on and ended.

        ``n_damaged`` checkpoints were damaged since it last trained.
        """
        log = self.work / "roots" / f"{name}.log"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"\n===== {fault} after {damaged}\n")
        before = log.stat().st_size
        whole = newest_whole(root / name)
        was_at = reached(root / name)
        args = ["fit", "--config", str(self.config)]
        if self.overlay is not None:
            args += ["--config", str(self.overlay)]
        elif ranks > 1:
            args += ["--trainer.strategy", "ddp"]
        args += ["--name", name, "--ckpt_path", "auto", "--trainer.devices", str(ranks)]
        args += ["--data.num_workers", str(workers), "--trainer.default_root_dir", str(root)]
        metrics_before = _changed(root / name / "metrics.csv")
        begun = time.monotonic()
        processes = start(args, ranks=ranks, log=log, fault=fault, stacks_after=TIME_LIMIT - 20)
        problems = _watch(processes, fault, log)
        seconds = time.monotonic() - begun
        text = _tail(log, before)
        (root / "filler").unlink(missing_ok=True)
        told = re.findall(r"going on from .*step=(\d+)", text)
        went_on_from = int(told[-1]) if told else -1
        trained = _changed(root / name / "metrics.csv") != metrics_before
        attempt = Attempt(
            fault, damaged, processes.codes, seconds, went_on_from, reached(root / name), trained, problems
        )
        problems += _wrong_codes(attempt, joined=JOINED in text)
        if told and went_on_from != whole:
            problems.append(f"went on from step {went_on_from}, the newest whole checkpoint is of step {whole}")
        # one that several processes write is written while training goes on, and complete before the next begins
        allowed = EVERY * (1 + n_damaged + (self.overlay is not None))
        if told and was_at - went_on_from > allowed:
            problems.append(f"went on from step {went_on_from}, but step {was_at} had been reached")
        if trained and fault is not None and fault.kind.startswith("SIGTERM") and processes.codes == [143] * ranks:
            saved = newest_whole(root / name)
            if saved != attempt.reached:
                problems.append(f"SIGTERM lost steps: {saved} is saved of {attempt.reached}")
        return attempt

    def _start(self, *args: str) -> Processes:
        processes = start(args, ranks=1, log=self.work / "log", fault=None)
        _watch(processes, None, self.work / "log")
        return processes

    def _compare(self, root: Path, name: str, expected: dict[str, Any]) -> list[str]:
        found = content(root / name)
        problems = [f"{key} differs from that of the run without faults" for key in _different(expected, found)]
        if self._start("verify-resume", str(root / name)).codes != [0]:
            problems.append("verify-resume fails")
        unfinished = [str(path) for path in (root / name).rglob("*.tmp")]
        if unfinished:
            problems.append(f"left unfinished: {unfinished}")
        return problems

    def _damage(self, folder: Path, kind: str, draw: random.Random) -> str | None:
        """Damage the newest checkpoint, unless it is the only whole one; what was done."""
        whole = [path for path in checkpoints_in(folder / "checkpoints") if damage(path) is None]
        if len(whole) < 2:
            return None
        harm(whole[-1], kind, draw)
        return kind


def harm(path: Path, kind: str, draw: random.Random) -> None:
    """Damage a checkpoint; of a folder its largest file, or the manifest with the checksums."""
    checksum = path / "manifest.json" if path.is_dir() else path.with_name(path.name + ".sha256")
    if path.is_dir():
        path = max((file for file in path.iterdir() if file != checksum), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    if kind == "cut short":
        path.write_bytes(data[: draw.randrange(1, len(data))])
    elif kind == "byte flipped":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "checksum lost":
        checksum.unlink()
    else:
        text = checksum.read_text(encoding="utf-8")
        place = re.search(r"[0-9a-f]{64}", text)
        assert place is not None
        digit = "1" if text[place.start()] == "0" else "0"
        checksum.write_text(text[: place.start()] + digit + text[place.start() + 1 :], encoding="utf-8")


def draw_faults(draw: random.Random, ranks: int, workers: int, usual: float) -> list[Fault]:
    """One to three faults for a run that takes ``usual`` seconds without them."""
    kinds = ["SIGKILL"] * 4 + ["SIGTERM"] * 3 + ["SIGTERM to the group", "full disk", "NaN"]
    if workers:
        kinds += ["dead data worker"]
    if not can_mount():
        kinds.remove("full disk")
    return [_draw_fault(draw, draw.choice(kinds), ranks, usual) for _ in range(draw.choice((1, 1, 2, 2, 3)))]


def _draw_fault(draw: random.Random, kind: str, ranks: int, usual: float) -> Fault:
    rank = draw.choice([*range(ranks), ALL])
    if kind == "NaN":
        return Fault(kind, "step: before the optimizer", draw.randint(1, STEPS // 2), rank=draw.randrange(ranks))
    if kind == "dead data worker":
        place = draw.choice(("step: before the optimizer", "validation"))
        nth = draw.randint(1, STEPS // 2)
        if place == "validation":  # a batch each, and at the third the workers are not needed any more
            nth = 1 + nth % 2
        return Fault(kind, place, nth, rank=draw.randrange(ranks))
    if kind == "full disk":
        free = draw.choice((0, 4096, 20_000, 60_000, 100_000))
        place = draw.choice(("step: before the optimizer", "start-up: before the first batch", "validation"))
        return Fault(kind, place, draw.randint(1, STEPS // 2) if "step" in place else 1, free=free)
    place = draw.choice(("any time", "any time", *PLACES))
    if place == "any time":
        return Fault(kind, place, rank=rank, after=round(draw.uniform(0, usual), 3))
    nth = 1 if place.startswith(("start-up", "end")) else draw.randint(1, STEPS // 2 if "step" in place else 3)
    only_first = place.startswith(("checkpoint", "end")) or place == "step: metrics written"
    return Fault(kind, place, nth, rank=draw.choice((0, ALL)) if only_first else rank)


# Watching and judging


def _watch(processes: Processes, fault: Fault | None, log: Path) -> list[str]:
    """Wait for the end as torchrun does, and what was wrong with it.

    Ranks that wait for one that is lost before it has joined them are ended here, as their launcher does; later they
    have to end by themselves.
    """
    problems = []
    log_before = log.stat().st_size if log.exists() else 0
    failed_at: float | None = None
    told = False
    while None in processes.codes:
        time.sleep(0.01)
        now = time.monotonic()
        if fault is not None and fault.place == "any time" and not told and now - processes.begun >= fault.after:
            number = signal.SIGKILL if fault.kind == "SIGKILL" else signal.SIGTERM
            processes.send(number, fault.rank, group=fault.kind.endswith("group"))
            told = True
        if failed_at is None and any(code not in (None, 0) for code in processes.codes):
            failed_at = now
        if failed_at is not None and now - failed_at > 1 and JOINED not in _tail(log, log_before):
            processes.send(signal.SIGKILL, ALL, group=True)
            failed_at = math.inf
        if failed_at is not None and now - failed_at > ALONE:
            problems.append(f"rank {processes.codes.index(None)} waited for the one that had failed")
            processes.send(signal.SIGKILL, ALL, group=True)
            failed_at = math.inf
        if now - processes.begun > TIME_LIMIT:
            problems.append(f"it hung: {processes.codes} after {TIME_LIMIT:.0f} s")
            processes.send(signal.SIGKILL, ALL, group=True)
    for process in processes.ranks:
        process.join()
    deadline = time.monotonic() + 15
    while processes.left_over() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = processes.left_over()
    if left:
        problems.append(f"processes are left running: {left}")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    return problems


def _tail(file: Path, start: int) -> str:
    with open(file, "rb") as stream:
        stream.seek(start)
        return stream.read().decode(errors="replace")


def _wrong_codes(attempt: Attempt, joined: bool) -> list[str]:
    fault, codes = attempt.fault, attempt.codes
    if fault is None:
        return [] if set(codes) == {0} else [f"exit codes {codes} without a fault"]
    if set(codes) == {0}:
        return []  # it ended before the fault
    hit = range(len(codes)) if fault.rank == ALL else [fault.rank]
    promised: tuple[int, ...] = (1,)
    if fault.kind == "SIGKILL":
        promised = (-signal.SIGKILL,)
    elif fault.kind.startswith("SIGTERM"):
        # while ranks join, they hear a signal when all are there: until then the launcher has to end them
        promised = SIGTERM_CODES if joined else (*SIGTERM_CODES, -signal.SIGKILL)
    if fault.place.startswith("end"):  # the others may be through
        hit = [0]
    problems = [f"rank {rank} exited with {codes[rank]} at {fault.kind}" for rank in hit if codes[rank] not in promised]
    if 0 in codes and fault.kind != "SIGKILL" and not fault.place.startswith("end"):
        problems.append(f"exit codes {codes}: not all ranks failed at {fault.kind}")
    return problems


def newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint that passes its checksum, -1 without one."""
    whole = [step_of(path) for path in checkpoints_in(folder / "checkpoints") if damage(path) is None]
    return max(whole, default=-1)


def reached(folder: Path) -> int:
    """The last step that a run has logged, -1 if none."""
    return max((int(row["step"]) for row in _metrics(folder)), default=-1)


def _changed(file: Path) -> int:
    """When a file was changed, 0 if there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


def content(folder: Path) -> dict[str, Any]:
    """What must not depend on faults: metrics, the names of the checkpoints, and what the newest holds."""
    paths = checkpoints_in(folder / "checkpoints")
    checkpoint = read_checkpoint(paths[-1])
    rows = [{k: v for k, v in row.items() if k.startswith(EXACT)} for row in _metrics(folder)]
    return {
        "metrics.csv": rows,
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir() if path.suffix == ".ckpt"),
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "step": checkpoint["global_step"],
    }


def _metrics(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a row that was cut short is none
    return list(csv.DictReader(lines))


def _different(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [key for key in expected if not _equal(expected[key], found[key])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def can_mount() -> bool:
    """Whether small file systems can be mounted here."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


# What is trained


def _write_prose(path: Path) -> None:
    draw = random.Random(7)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ten", "ru") for b in ("na", "sti", "vor", "el", "um")]
    texts = (" ".join(draw.choice(words) for _ in range(draw.randint(5, 40))) for _ in range(200))
    path.write_text("".join(json.dumps({"text": f"{text}."}) + "\n" for text in texts), encoding="utf-8")


def _config(work: Path) -> dict[str, Any]:
    attention = {"class_path": "mhe_lightning.attention.MHE", "init_args": {"combine": "add", "dropout": 0.1}}
    net = {"width": 16, "n_heads": 2, "n_layers": 2, "max_length": 16, "dropout": 0.1, "attention": attention}
    corpus = {"path": str(work / "prose.jsonl"), "tokenizer_size": 300, "validation_fraction": 0.1}
    data = {"corpus": corpus, "block_length": 16, "batch_size": 96, "cache_dir": str(work / "prepared")}
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "log_every_n_steps": 1,
            "val_check_interval": VALIDATE_EVERY,
            "gradient_clip_val": 1.0,
        },
        "model": {
            "class_path": "mhe_lightning.tasks.LanguageModeling",
            "init_args": {
                "lr": 1e-2,
                "warmup_steps": 2,
                "net": {"class_path": "mhe_lightning.models.Decoder", "init_args": net},
            },
        },
        "data": {"class_path": "mhe_lightning.data.LanguageModelingData", "init_args": data},
        "checkpoints": {"every_n_steps": EVERY},
    }


# The table


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each fault and place: how often it was put and struck, what it cost, and what was wrong."""
    rows: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    most: Counter[tuple[str, str]] = Counter()
    for run in runs:
        attempts = run["attempts"]
        for number, attempt in enumerate(attempts):
            if attempt["damaged"]:
                rows["damaged checkpoint", attempt["damaged"]].update({"put": 1, "struck": 1})
            if attempt["fault"] is None:
                continue
            key = attempt["fault"]["kind"], attempt["fault"]["place"]
            struck = set(attempt["codes"]) != {0}
            rows[key].update({"put": 1, "struck": int(struck), "problems": len(attempt["problems"])})
            if struck and attempt["trained"]:
                # the next that got so far as to say where it goes on; none, where it began anew
                later = next((a for a in attempts[number + 1 :] if a["went_on_from"] >= 0 or a["trained"]), None)
                if later is not None:
                    cost = "damaged checkpoint", later["damaged"]
                    cost = cost if later["damaged"] else key
                    most[cost] = max(most[cost], attempt["reached"] - max(later["went_on_from"], 0))
    return [
        {"fault": kind, "place": place, "problems": 0, **counts, "most_steps_lost": max(most[kind, place], 0)}
        for (kind, place), counts in sorted(rows.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults in runs that must end as if there had been none.")
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--overlay", type=Path, default=None, help="a config over the tiny one, such as a strategy's")
    parser.add_argument("--work", type=Path, default=Path("fault_campaign"), help="folder of runs; what it has is kept")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    campaign = Campaign(options.work, options.seed, options.overlay)
    results = options.work / "runs.jsonl"
    runs = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    for number in range(options.first, options.first + options.runs):
        if any(run["run"] == number for run in runs):
            continue
        run = campaign.run(number)
        runs.append(run)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        faults = ", ".join(
            f"{a['fault']['kind']} ({a['fault']['place']}) → {a['codes']}" for a in run["attempts"] if a["fault"]
        )
        print(f"run {number}: {run['ranks']}×{run['workers']} {faults}: {run['problems'] or 'as without'}", flush=True)
    _report(runs, options)
    sys.exit(1 if any(run["problems"] for run in runs) else 0)


def _report(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    wrong = [run["run"] for run in runs if run["problems"]]
    attempts = [attempt for run in runs for attempt in run["attempts"]]
    table = summary(runs)
    print("| fault | where | put | struck | most steps lost | problems |\n|---|---|--:|--:|--:|--:|")
    for row in table:
        print("| " + " | ".join(str(row[key]) for key in ("fault", "place", *COUNTED)) + " |")
    print(f"{len(runs)} runs, {len(attempts)} attempts, {len(wrong)} runs with problems: {wrong}")
    if options.out is None:
        return
    facts = {
        "date": datetime.date.today().isoformat(),
        "settings": {"seed": options.seed, "overlay": None if options.overlay is None else str(options.overlay)},
        "commits": sorted({str(run["commit"]) for run in runs}),
        "versions": versions(),
        "runs": len(runs),
        "attempts": len(attempts),
        "by_ranks_and_workers": {
            f"{ranks} × {workers}": sum((run["ranks"], run["workers"]) == (ranks, workers) for run in runs)
            for ranks, workers in SHAPES
        },
        "runs_with_problems": wrong,
        "table": table,
    }
    options.out.write_text(json.dumps({"machine": machine(), **facts}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
