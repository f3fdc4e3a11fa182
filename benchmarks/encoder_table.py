"""What pretraining is worth: the table of finetuned runs with and without it, from their run directories.

    python benchmarks/encoder_table.py runs/finetuned/*

Prints Markdown: a row per task with the mean score over seeds at the end of training (no checkpoint is chosen on the
split that is scored), its 95 % interval by Student's t, and that of the difference paired by seed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import yaml

from mhe_lightning.callbacks.run_record import CONFIG, read_results
from mhe_lightning.comparison.statistics import estimate

KEY = {"glue-sst2": "val/accuracy", "glue-qnli": "val/accuracy", "glue-cola": "val/matthews", "squad-v1": "val/f1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    options = parser.parse_args()
    scores: dict[str, dict[bool, dict[int, float]]] = defaultdict(lambda: {True: {}, False: {}})
    for run in options.runs:
        results = read_results(run)
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        label = results["data"]["label"]
        value = results["metrics"][KEY[label]] * (1 if label.startswith("squad") else 100)
        name = f"{label}, {KEY[label].removeprefix('val/')}"
        if config["model"]["init_args"].get("pooling") == "first":
            name += ", [CLS] alone"
        own = scores[name][config["init_from"] is not None]
        if results["seed"] in own:
            raise SystemExit(f"{run}: a second run of {name} with seed {results['seed']}")
        own[results["seed"]] = value
    print("| task | seeds | at random | pretrained | difference |")
    print("|---|--:|--:|--:|--:|")
    for name, by_start in scores.items():
        seeds = sorted(by_start[True].keys() & by_start[False].keys())
        without, with_ = ([by_start[start][seed] for seed in seeds] for start in (False, True))
        differences = [b - a for a, b in zip(without, with_, strict=True)]
        cells = [name, str(len(seeds)), interval(without), interval(with_), interval(differences, sign="+")]
        print(f"| {' | '.join(cells)} |")


def interval(values: list[float], sign: str = "") -> str:
    """Mean ± half the 95 % interval."""
    found = estimate(values)
    half_width = "" if found.half_width is None else f" ± {found.half_width:.1f}"
    return f"{found.mean:{sign}.1f}{half_width}"


if __name__ == "__main__":
    main()
