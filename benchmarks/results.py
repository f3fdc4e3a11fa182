"""Writes docs/results/speed.md: the tables of all benchmarks' JSON files, and the goals beside what was measured.

    python benchmarks/results.py

A family's file is ``docs/results/<family>_cpu.json``, or ``…_cuda.json`` from a GPU; ``<family>_kept_cpu.json`` is of
``--freed_memory kept``. What has no file is listed as not measured; so is a goal at sizes that the file is not about.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import attention_core
import decoder_step
import encoder_step
import growth
import steps
import sublayer
import unpadded
from common import between_marks, markdown_table, spread

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAGE = RESULTS / "speed.md"

Record = Mapping[str, Any]

PAGES: dict[str, Callable[[Record], str] | None] = {
    "sublayer": sublayer.page,
    "sublayer_kept": sublayer.page,
    "attention_core": attention_core.page,
    "encoder_step": steps.page,
    "encoder_step_kept": steps.page,
    "decoder_step": steps.page,
    "decoder_step_kept": steps.page,
    "encoder_decoder_step": steps.page,
    "growth": growth.page,
    "decode": None,
    "decode_kept": None,
    "decode_long": None,
    "decode_long_kept": None,
    "decode_heads": None,
    "prepare": None,
    "unpadded": unpadded.page,
}
"""What makes a family's tables of its record; where there is nothing, the Markdown file beside the record has them."""


class Found(NamedTuple):
    """What was measured for a goal.

    Args:
        measured: in words.
        flop_ratio: in words, where there is one.
        met: whether the goal is reached.
    """

    measured: str
    flop_ratio: str
    met: bool


@dataclass(frozen=True)
class Goal:
    """A row of the table.

    Args:
        work: what is done.
        goal: what is wanted of it.
        file: stem of the JSON file that shows it.
        find: what the record says.
    """

    work: str
    goal: str
    file: str
    find: Callable[[Record], Found]


class NotAtThisSizeError(Exception):
    """A record is about other sizes than a goal."""


def at_size(record: Record, **sizes: Any) -> None:
    """Refuse a record of other ``sizes``."""
    for name, value in sizes.items():
        if record["settings"].get(name) != value:
            raise NotAtThisSizeError(f"{name} is {record['settings'].get(name)} and not {value}")


def of_sublayer(case: str, wanted: float) -> Callable[[Record], Found]:
    """Speed of MHE-ADD at a size."""

    def find(record: Record) -> Found:
        row = _sublayer(record, case)["training"]
        times = row[f"times_{sublayer.REFERENCE}"]
        return Found(f"{spread(times)} ×", f"{row['flop_ratio']:.2f}", times["median"] >= wanted)

    return find


def of_saved(case: str) -> Callable[[Record], Found]:
    """Bytes that MHE-ADD keeps for the backward pass at a size."""

    def find(record: Record) -> Found:
        saved = _sublayer(record, case)["saved_ratio"]
        told = (
            f"{saved['without_x']:.2f} without the input x, which both keep ({saved['all']:.2f} with it, "
            f"{saved['attention']:.2f} of the attention alone)"
        )
        return Found(told, "", saved["without_x"] <= 1 / 3)

    return find


def _sublayer(record: Record, case: str) -> Record:
    at_size(record, width=768, heads=12, dtype="float32")
    if case not in record["cases"]:
        raise NotAtThisSizeError(f"there is no case {case}")
    row: Record = record["cases"][case]["mhe_add"]
    return row


def of_step(
    family: steps.Family, name: str, wanted: float, times: str = "times_reference", flops: str = "flop_ratio"
) -> Callable[[Record], Found]:
    """Speed of one of ours in a whole step without dropout."""

    def find(record: Record) -> Found:
        row = _model(record, family, name)
        against = f" {row['best_peer']}" if times == "times_best_peer" else ""
        return Found(f"{spread(row[times])} ×{against}", f"{row[flops]:.2f}", row[times]["median"] >= wanted)

    return find


def of_memory(family: steps.Family, name: str, wanted: float) -> Callable[[Record], Found]:
    """Peak memory of one of ours in a whole step without dropout."""

    def find(record: Record) -> Found:
        ratio = _model(record, family, name)["peak_ratio"]
        return Found(f"{ratio:.3f}", "", ratio <= wanted)

    return find


def _model(record: Record, family: steps.Family, name: str) -> Record:
    at_size(record, **family.sizes, dtype="float32")
    run = next((run for run in record["runs"] if run["dropout"] == run["attention_dropout"] == 0), None)
    if run is None or name not in run["models"]:
        raise NotAtThisSizeError(f"there is no {name} without dropout")
    row: Record = run["models"][name]
    return row


def of_growth(axis: str) -> Callable[[Record], Found]:
    """What MHE-ADD's time adds from the first to the last point of an axis, beside MHA's."""

    def find(record: Record) -> Found:
        at_size(record, width=768)
        ours, theirs = (record["axes"][axis]["slopes"][name] for name in ("mhe_add", sublayer.REFERENCE))
        told = (
            f"{1e3 * ours['added_seconds']:.0f} ms are added from the first to the last point, by MHA "
            f"{1e3 * theirs['added_seconds']:.0f} ms; slopes of the logarithms {ours['seconds']:.2f}, "
            f"{theirs['seconds']:.2f}"
        )
        met = ours["added_seconds"] <= theirs["added_seconds"]
        if axis == "heads":
            met = met and ours["seconds"] < theirs["seconds"]
        return Found(told, f"slopes {ours['flops']:.2f}, {theirs['flops']:.2f}", met)

    return find


GPT2_BASE = {"width": 768, "heads": 12, "layers": 12, "feed_forward": 3072, "length": 1024, "vocab": 50257}


def of_utilisation(record: Record) -> Found:
    """MHA's share of the matrix rate in a step of GPT-2 base on a GPU."""
    at_size(record, **GPT2_BASE, dtype="bfloat16")
    share = record["runs"][0]["models"]["mha"]["share_of_matrix_rate"]
    return Found(f"{100 * share:.0f} %", "", share >= 0.5)


def of_gpu_step(record: Record) -> Found:
    """MHE-ADD's tokens per second over MHA's in the same step."""
    at_size(record, **GPT2_BASE, dtype="bfloat16")
    models = record["runs"][0]["models"]
    ratio = models["mhe_add"]["tokens_per_second"] / models["mha"]["tokens_per_second"]
    return Found(f"{ratio:.2f} ×", f"{models['mha']['flops'] / models['mhe_add']['flops']:.2f}", ratio >= 1.15)


def of_decoding(shape: str, name: str, wanted: float) -> Callable[[Record], Found]:
    """Speed of greedy decoding with one of ours at a shape; the ratio beside it is that of the bytes that are read."""

    def find(record: Record) -> Found:
        at_size(record, width=512, layers=4, heads=[8], vocab=30522)
        row = record["shapes"][shape]["candidates"][name]
        times = row["times_gpt2"]
        return Found(f"{spread(times)} ×", f"bytes {row['bytes_ratio']:.2f}", times["median"] >= wanted)

    return find


def of_cache(record: Record) -> Found:
    """Numbers in MHA's cache over those in MHE-ADD's, which should be n."""
    at_size(record, heads=[8])
    found = [shape["candidates"] for shape in record["shapes"].values()]
    ratios = {c["mha"]["cached_numbers_per_token"] / c["mhe_add"]["cached_numbers_per_token"] for c in found}
    return Found(", ".join(f"{ratio:g} times smaller" for ratio in sorted(ratios)), "", ratios == {8})


def of_preparing(reference: str, wanted: float) -> Callable[[Record], Found]:
    """CPU time of `prepare` beside another way's."""

    def find(record: Record) -> Found:
        times = record["preparing"]["prepare"][f"cpu_times_{reference}"]
        return Found(f"{spread(times)} × as little", "", times["median"] >= wanted)

    return find


def of_memory_limit(record: Record) -> Found:
    """Peak memory of `prepare` on a corpus larger than what it may have."""
    bound = record["limited"]
    told = (
        f"{bound['text_bytes'] / 1e6:,.0f} MB of text under a limit of {bound['limit_bytes'] / 1e6:,.0f} MB of data, "
        f"peak {bound['peak_bytes'] / 1e6:,.0f} MB"
    )
    return Found(told, "", bound["text_bytes"] > bound["limit_bytes"])


def of_core(record: Record) -> Found:
    """MHE-ADD's attention alone beside the fastest of MHA's, at all sizes of the goal."""
    at_size(record, head_dim=64, dtype="bfloat16", heads=[12, 16], lengths=[1024, 2048, 4096, 8192])
    told, met = [], True
    for kind, wanted in (("forward", 2.0), ("training", 1.7)):
        times = [case[attention_core.OURS][kind]["times_best"]["median"] for case in record["cases"].values()]
        told.append(f"{kind} {min(times):.2f} to {max(times):.2f} ×")
        met = met and min(times) >= wanted
    ratios = [case[attention_core.OURS]["training"]["flop_ratio"] for case in record["cases"].values()]
    return Found(", ".join(told), f"{min(ratios):.2f} to {max(ratios):.2f}", met)


def of_latency(record: Record) -> Found:
    """Seconds of a later step of decoding with MHE-ADD, against the number of heads."""
    heads = [1, 2, 4, 8, 16, 32]
    at_size(record, width=512, layers=4, heads=heads, vocab=30522)
    (shape,) = record["shapes"].values()
    later = [shape["candidates"][f"mhe_add n={n}"]["later"]["median"] for n in heads]
    told = ", ".join(f"{1e3 * seconds:.1f}" for seconds in later)
    return Found(f"{told} ms a step", "", max(later) <= 1.05 * later[0])


_SUBLAYER = "MHE-ADD sublayer, forward + backward, against SDPA MHA, D = 768, n = 12"
_ENCODER, _DECODER = "encoder step against BertForMaskedLM", "decoder step against the fastest of its peers"
_DECODE = "greedy decoding against GPT2LMHeadModel.generate"
_PREPARE = "CPU time of `prepare` against"
_BEST = ("times_best_peer", "flop_ratio_to_best_peer")
GOALS = (
    Goal(f"{_SUBLAYER}, 8 × 512 causal", "≥ 3.5 ×", "sublayer_cpu", of_sublayer("8 x 512, causal", 3.5)),
    Goal(f"{_SUBLAYER}, 8 × 512 full", "≥ 3 ×", "sublayer_cpu", of_sublayer("8 x 512, full", 3.0)),
    Goal(f"{_SUBLAYER}, 2 × 2048 causal", "≥ 3 ×", "sublayer_cpu", of_sublayer("2 x 2048, causal", 3.0)),
    Goal(f"{_SUBLAYER}, 2 × 2048 full", "≥ 2.5 ×", "sublayer_cpu", of_sublayer("2 x 2048, full", 2.5)),
    Goal("the same, saved for backward, 8 × 512", "≤ 1/3", "sublayer_cpu", of_saved("8 x 512, causal")),
    Goal("the same, saved for backward, 2 × 2048", "≤ 1/3", "sublayer_cpu", of_saved("2 x 2048, causal")),
    Goal(f"{_ENCODER}, MHA", "≥ 2.1 ×", "encoder_step_cpu", of_step(encoder_step.FAMILY, "mha", 2.1)),
    Goal(f"{_ENCODER}, MHE-ADD", "≥ 2.8 ×", "encoder_step_cpu", of_step(encoder_step.FAMILY, "mhe_add", 2.8)),
    Goal(f"{_ENCODER}, MHE-ADD's memory", "≤ 0.5", "encoder_step_cpu", of_memory(encoder_step.FAMILY, "mhe_add", 0.5)),
    Goal(f"{_DECODER}, MHA", "≥ 1.05 ×", "decoder_step_cpu", of_step(decoder_step.FAMILY, "mha", 1.05, *_BEST)),
    Goal(f"{_DECODER}, MHE-ADD", "≥ 1.2 ×", "decoder_step_cpu", of_step(decoder_step.FAMILY, "mhe_add", 1.2, *_BEST)),
    Goal("growth with T at D = 768: no faster than MHA's", "added time ≤ MHA's", "growth_cpu", of_growth("tokens")),
    Goal("growth with n at D = 768: slower than MHA's", "slope < MHA's", "growth_cpu", of_growth("heads")),
    Goal(f"{_DECODE}, 16 × (256 + 128), MHA", "≥ 1.5 ×", "decode_cpu", of_decoding("16 × (256 + 128)", "mha", 1.5)),
    Goal(
        f"{_DECODE}, 16 × (256 + 128), MHE-ADD", "≥ 2 ×", "decode_cpu", of_decoding("16 × (256 + 128)", "mhe_add", 2.0)
    ),
    Goal(
        f"{_DECODE}, 32 × (1,024 + 64), MHA", "≥ 2.5 ×", "decode_long_cpu", of_decoding("32 × (1024 + 64)", "mha", 2.5)
    ),
    Goal(
        f"{_DECODE}, 32 × (1,024 + 64), MHE-ADD",
        "≥ 3.5 ×",
        "decode_long_cpu",
        of_decoding("32 × (1024 + 64)", "mhe_add", 3.5),
    ),
    Goal("cache of MHE-ADD beside MHA's, n = 8", "n times smaller", "decode_cpu", of_cache),
    Goal(
        "latency of decoding with MHE-ADD at n = 1 to 32", "none above n = 1's by 5 %", "decode_heads_cpu", of_latency
    ),
    Goal(
        f"{_PREPARE} datasets.map and group_texts, as scripts have them",
        "≥ 1.4 ×",
        "prepare_cpu",
        of_preparing("datasets, transformers", 1.4),
    ),
    Goal(f"{_PREPARE} the leanest form of these", "≥ 1.4 ×", "prepare_cpu", of_preparing("datasets", 1.4)),
    Goal(f"{_PREPARE} bare encode_batch_fast", "≥ 1/1.1 ×", "prepare_cpu", of_preparing("bare", 1 / 1.1)),
    Goal("memory of `prepare`", "below a limit, corpus above it", "prepare_cpu", of_memory_limit),
    Goal(
        "MHE-ADD attention core against SDPA's flash and cuDNN backends on an H100, bf16",
        "forward ≥ 2 ×, with backward ≥ 1.7 ×",
        "attention_core_cuda",
        of_core,
    ),
    Goal("GPT-2 base training step on an H100, MHA's MFU", "≥ 50 %", "decoder_step_cuda", of_utilisation),
    Goal("the same, MHE-ADD's tokens/s over MHA's, T = 1024", "≥ 1.15 ×", "decoder_step_cuda", of_gpu_step),
)


def read(folder: Path) -> dict[str, Record]:
    """The records of ``folder``, by the stems of their files."""
    stems = [f"{family}_{device}" for family in PAGES for device in ("cpu", "cuda")]
    return {
        stem: json.loads(path.read_text(encoding="utf-8"))
        for stem in stems
        if (path := folder / f"{stem}.json").exists()
    }


def goals(records: Mapping[str, Record]) -> str:
    """The table of goals, in Markdown."""
    rows = []
    for goal in GOALS:
        measured, flop_ratio, met = judged(goal, records.get(goal.file))
        with_kept = "–"
        kept = f"{goal.file.removesuffix('_cpu')}_kept_cpu"
        if goal.file.endswith("_cpu") and kept in records:
            again, _, met_again = judged(goal, records[kept])
            with_kept = f"{again} {met_again}"
        rows.append([goal.work, goal.goal, measured, met, with_kept, flop_ratio])
    head = ["work", "goal", "measured: median (quartiles)", "", "with freed memory kept", "FLOP ratio"]
    return markdown_table(head, rows)


def judged(goal: Goal, record: Record | None) -> tuple[str, str, str]:
    """What ``record`` shows of a goal, its FLOP ratio, and whether it is met, in words."""
    if record is None:
        return "not measured: " + ("no GPU" if goal.file.endswith("_cuda") else "no file"), "", "–"
    try:
        measured, flop_ratio, met = goal.find(record)
    except NotAtThisSizeError as reason:
        return f"not from this file: {reason}", "", "–"
    except KeyError as name:
        return f"not from this file: it has no {name}", "", "–"
    return measured, flop_ratio, "met" if met else "**not met**"


def tables(family: str, records: Mapping[str, Record], folder: Path) -> str:
    """A family's tables, in Markdown."""
    parts = []
    for device in ("cpu", "cuda"):
        stem = f"{family}_{device}"
        if stem not in records:
            parts.append("Not measured." if device == "cpu" else "On a GPU: not measured, there was none.")
            continue
        make, beside = PAGES[family], folder / f"{stem}.md"
        if make is not None:
            parts.append(make(records[stem]))
        elif beside.exists():
            parts.append(beside.read_text(encoding="utf-8"))
        parts += [f"![{family} against {path.stem.rsplit('_', 1)[1]}]({path.name})" for path in plots(folder, stem)]
        alone = f", these tables alone [{beside.name}]({beside.name})" if beside.exists() else ""
        parts.append(f"All numbers: [{stem}.json]({stem}.json){alone}.")
    return "\n\n".join(part.strip() for part in parts)


def plots(folder: Path, stem: str) -> list[Path]:
    """The plots beside a record."""
    return sorted(folder.glob(f"{stem}_*.png"))


def written(page: str, folder: Path) -> str:
    """``page`` with all tables from the records of ``folder``."""
    records = read(folder)
    page = between_marks(page, "goals", goals(records))
    for family in PAGES:
        page = between_marks(page, family, tables(family, records, folder))
    return page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="whose tables are replaced")
    options = parser.parse_args(arguments)
    options.page.write_text(written(options.page.read_text(encoding="utf-8"), options.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
