"""The table of a language-model comparison, from its run directories.

    python benchmarks/decoder_table.py runs/wikitext2_* --speed docs/results/decoder_step_cpu.json

Prints Markdown: a row per run, in the order of parameters, with the scores of `results.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from mhe_lightning.callbacks.run_record import CONFIG


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--speed", type=Path, help="result of decoder_step.py, for the column of tokens/s")
    options = parser.parse_args()
    speed = json.loads(options.speed.read_text(encoding="utf-8"))["variants"] if options.speed else {}
    rows = sorted((_row(run, speed) for run in options.runs), key=lambda row: -row["attention"])
    mha = next(row["val_ppl"] for row in rows if row["name"] == "mha")
    titles = "attention|attention parameters|all parameters|val ppl|PRR|test ppl|val word ppl|val bits/byte|tokens/s"
    print(f"| {titles.replace('|', ' | ')} |")
    print("|---" + "|--:" * titles.count("|") + "|")
    for row in rows:
        cells = [
            row["name"],
            f"{row['attention']:,}",
            f"{row['total']:,}",
            f"{row['val_ppl']:.1f}",
            f"{100 * (1 - (row['val_ppl'] - mha) / mha):.1f} %",
            row["test_ppl"],
            f"{row['val_word_ppl']:.0f}",
            f"{row['val_bits']:.3f}",
            row["speed"],
        ]
        print(f"| {' | '.join(cells)} |")


def _row(run: Path, speed: dict[str, dict[str, float]]) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    metrics, parameters = results["metrics"], results["parameters"]
    tested = results.get("evaluations", {}).get("test")
    name = _variant(run)
    return {
        "name": name,
        "attention": parameters["attention_qkv"] + parameters["attention_output"],
        "total": parameters["total"],
        "val_ppl": metrics["val/ppl"],
        "test_ppl": f"{tested['metrics']['test/ppl']:.1f}" if tested else "–",
        "val_word_ppl": metrics["val/word_ppl"],
        "val_bits": metrics["val/bits_per_byte"],
        "speed": f"{speed[name]['tokens_per_second']:,.0f}" if name in speed else "–",
    }


def _variant(run: Path) -> str:
    """The name of the overlay in configs/attention that a run was trained with."""
    config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    spec = config["model"]["init_args"]["net"]["init_args"]["attention"]
    for path in sorted(Path(__file__).parents[1].glob("configs/attention/*.yaml")):
        overlay = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = {key: spec["init_args"].get(key) for key in overlay.get("init_args", {})}
        if overlay["class_path"] == spec["class_path"] and settings == overlay.get("init_args", {}):
            return path.stem
    return str(spec["class_path"])


if __name__ == "__main__":
    main()
