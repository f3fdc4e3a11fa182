"""What two processes that train together lose against two that train alone, side by side.

    python benchmarks/data_parallel.py --out docs/results/data_parallel_cpu.json

Each round runs, for every config, two independent `fit`s at the same time with one thread each and half of the config's
rows, then `fit` on two processes (DDP, or another overlay) with one thread each and all of them. The score is the ratio
of the latter's tokens per second to the sum of the former's: medians over the logged steps of a run, without the first,
and over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from common import machine, write_results

ROOT = Path(__file__).parents[1]


def command(config: Path, name: str, root: Path, options: argparse.Namespace, more: list[str]) -> list[str]:
    steps = options.steps
    return [
        "train.py",
        "fit",
        *("--config", str(config)),
        *("--name", name),
        *("--trainer.default_root_dir", str(root)),
        *("--trainer.max_steps", str(steps)),
        *("--trainer.log_every_n_steps", "5"),
        *("--trainer.accumulate_grad_batches", str(options.accumulate)),
        *("--trainer.val_check_interval", str(steps * options.accumulate)),
        *("--trainer.limit_val_batches", "1"),
        *("--checkpoints.every_n_steps", str(steps)),
        *("--samples.prompts", "[]"),
        *more,
    ]


def tokens_per_second(folder: Path) -> float:
    """Median over a run's logged steps, the first left out."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        found = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row.get("tokens_per_second")]
    return statistics.median(found[1:])


def run(commands: list[list[str]]) -> None:
    """Run them at the same time, each with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(c, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) for c in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"{commands[0]} ended with {codes}")


def together(config: Path, root: Path, options: argparse.Namespace, overlay: str) -> float:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = ["--config", str(ROOT / "configs/strategy" / overlay), "--trainer.devices", "2"]
    run([launch + command(config, "together", root, options, two)])
    return tokens_per_second(root / "together")


def alone(config: Path, root: Path, options: argparse.Namespace) -> float:
    rows = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["init_args"]["batch_size"]
    half = ["--data.batch_size", str(rows // 2)]
    names = ["first", "second"]
    run([[sys.executable, *command(config, name, root, options, half)] for name in names])
    return sum(tokens_per_second(root / name) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["configs/quickstart.yaml", "configs/quickstart_encoder.yaml"])
    parser.add_argument("--overlays", nargs="+", default=["ddp.yaml"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for config in options.configs:
            measured: dict[str, list[float]] = {}
            subprocess.run([sys.executable, "train.py", "prepare", "--config", config], cwd=ROOT, check=True)
            for number in range(options.rounds):
                root = Path(folder) / Path(config).stem / str(number)
                measured.setdefault("alone", []).append(alone(ROOT / config, root, options))
                for overlay in options.overlays:
                    measured.setdefault(overlay, []).append(together(ROOT / config, root / overlay, options, overlay))
            alone_median = statistics.median(measured["alone"])
            results[config] = {
                "tokens_per_second": {name: [round(v, 1) for v in values] for name, values in measured.items()},
                "ratio": {o: round(statistics.median(measured[o]) / alone_median, 4) for o in options.overlays},
            }
            print(config, results[config], flush=True)
    if options.out is not None:
        write_results(options.out, options, machine(), configs=results)


if __name__ == "__main__":
    main()
