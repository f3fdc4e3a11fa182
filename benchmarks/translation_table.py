"""Attentions compared on translation: the table of runs on one data set, from their run directories.

    python benchmarks/translation_table.py runs/multi30k/* --out docs/results/translation_runs.json

Prints Markdown: a row per attention with its scores on the test split, of the last `test` of each run: the mean over
seeds with its 95 % interval by Student's t or, of two seeds, whose interval says nothing, the mean and both. What is
kept of MHA is the ratio of BLEU, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from common import interval

from mhe_lightning.callbacks.run_record import CONFIG, RESULTS

KEPT = ("seed", "steps", "tokens_seen", "training_seconds", "tokens_per_second", "peak_memory_bytes", "parameters")
RECORDED = ("git_commit", "versions", "machine", "metrics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file to write: what every run says of itself")
    options = parser.parse_args()
    runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    records = {}
    for path in options.runs:
        results = json.loads((path / RESULTS).read_text(encoding="utf-8"))
        config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        name = attentions_of(config["model"]["init_args"]["net"]["init_args"])
        if results["seed"] in runs[name]:
            raise SystemExit(f"{path}: a second run of {name} with seed {results['seed']}")
        runs[name][results["seed"]] = results
        test = results["evaluations"]["test"]
        records[path.name] = {
            "attention": name,
            **{key: results[key] for key in (*KEPT, *RECORDED)},
            "test": {**test["metrics"], "checkpoint": Path(test["checkpoint"]).name, "signatures": test["signatures"]},
        }
    print("| attention | seeds | attention parameters | all parameters | test BLEU | chrF | kept of MHA | training |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, by_seed in runs.items():
        print(f"| {' | '.join(row(name, by_seed, runs.get('mha', {})))} |")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def row(name: str, by_seed: dict[int, dict[str, Any]], mha: dict[int, dict[str, Any]]) -> list[str]:
    """The cells of an attention."""
    parts = next(iter(by_seed.values()))["parameters"]
    bleu, chrf = ([scored(run, name) for run in by_seed.values()] for name in ("bleu", "chrf"))
    kept = [100 * scored(run, "bleu") / scored(mha[seed], "bleu") for seed, run in by_seed.items() if seed in mha]
    minutes = statistics.fmean(run["training_seconds"] for run in by_seed.values()) / 60
    return [
        name,
        str(len(by_seed)),
        f"{parts['attention_qkv'] + parts['attention_output']:,}",
        f"{parts['total']:,}",
        spread(bleu),
        spread(chrf),
        f"{spread(kept)} %" if kept else "–",
        f"{minutes:.1f} min",
    ]


def spread(values: list[float]) -> str:
    """Mean and what is known of its spread."""
    if len(values) != 2:
        return interval(values)
    return f"{statistics.fmean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def scored(run: dict[str, Any], name: str) -> float:
    """A score of the run's last `test`."""
    score: float = run["evaluations"]["test"]["metrics"][f"test/{name}"]
    return score


def attentions_of(net: dict[str, Any]) -> str:
    """The attention of a net, or those of its three places where they differ."""
    places = [net.get(f"{place}_attention") or net["attention"] for place in ("encoder", "decoder", "cross")]
    names = [attention_of(spec) for spec in places]
    return names[0] if len(set(names)) == 1 else "/".join(names)


def attention_of(spec: dict[str, Any]) -> str:
    """Name of an attention by its class and what makes a variant of it."""
    name = spec["class_path"].rpartition(".")[2].lower()
    combine = spec.get("init_args", {}).get("combine")
    return f"{name}_{combine[:3]}" if combine else name  # as the files in configs/attention


if __name__ == "__main__":
    main()
