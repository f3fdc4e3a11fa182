"""What 8, 64 and 1,024 processes send and how fast they train, for eight attentions: the tables of docs/scaling.md.

    python benchmarks/scaling.py --out docs/results/scaling.json --page docs/scaling.md

Nothing is run: each step is followed without numbers, as `plan` does it, and timed at an assumed rate and bandwidths.
The rates of "small" are those that were measured on a CPU (docs/results/small_decoder_step_cpu.json).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import between_marks

from mhe_lightning.comparison.tables import Column, Table, render
from mhe_lightning.experiment import Experiments
from mhe_lightning.planning import Experiment, Share
from mhe_lightning.scaling import GB, Cluster, alternatives

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "docs" / "results" / "small_decoder_step_cpu.json"
WORLD_SIZES = (8, 64, 1024)
PEAK, MFU = 989e12, 0.4
ATTENTIONS = ("mha", "gqa", "skv", "mqa", "el", "mhe_add", "mhe_mul", "sha")
GIB, MIB = 2**30, 2**20
KINDS = ("DDP", "FSDP", "hybrid sharding", "tensor parallelism")


@dataclass(frozen=True)
class Model:
    """What is planned.

    Args:
        title: of its tables.
        config: an experiment, from the repository's root.
        overrides: of it.
        vocab_size: tokens.
        gqa: the overlay of grouped-query attention.
        tensor_parallel: parts.
        cluster: what it runs on.
    """

    title: str
    config: str
    overrides: Sequence[str] = ()
    vocab_size: int | None = None
    gqa: str = "configs/attention/gqa.yaml"
    tensor_parallel: int = 8
    cluster: Cluster = field(default_factory=Cluster)


def _decoder(width: int, n_layers: int, n_heads: int, length: int, rows: int) -> list[str]:
    net = {"width": width, "n_layers": n_layers, "n_heads": n_heads, "max_length": length}
    return [
        *(f"--model.net.{key}={value}" for key, value in net.items()),
        f"--data.block_length={length}",
        f"--data.batch_size={rows}",
        "--trainer.accumulate_grad_batches=1",
        "--model.activation_checkpointing=true",
    ]


GPT2 = "configs/experiment/gpt2_base_wikitext103.yaml"
ETHERNET = Cluster(per_node=1, network_bandwidth=1 * GB, network_latency=50e-6)
MODELS = {
    "gpt2": Model("GPT-2 base", GPT2, gqa="benchmarks/configs/gqa_4.yaml", tensor_parallel=4),
    "1.3b": Model("1.3 billion parameters", GPT2, _decoder(2048, 24, 16, 2048, 8), gqa="benchmarks/configs/gqa_8.yaml"),
    "7b": Model(
        "7 billion parameters", GPT2, _decoder(4096, 32, 32, 4096, 4), 32_000, gqa="benchmarks/configs/gqa_8.yaml"
    ),
    "small": Model(
        "Small decoder, on CPUs", "configs/experiment/small_wikitext2.yaml", tensor_parallel=2, cluster=ETHERNET
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--out", type=Path, help="A JSON file of all numbers.")
    parser.add_argument("--page", type=Path, help="A page whose tables are replaced; they are printed otherwise.")
    options = parser.parse_args()
    records = {name: planned(name, options.attentions) for name in options.models}
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if options.page:
        options.page.write_text(with_tables(options.page.read_text(encoding="utf-8"), records), encoding="utf-8")
        return
    for record in records.values():
        print(tables(record))


def planned(name: str, attentions: Sequence[str] = ATTENTIONS) -> dict[str, Any]:
    """A model's numbers, by attention and layout."""
    model = MODELS[name]
    experiments, layouts = Experiments(), alternatives(WORLD_SIZES, model.cluster.per_node, model.tensor_parallel)
    variants = {}
    for attention in attentions:
        print(f"{name}: {attention}", file=sys.stderr, flush=True)
        overlay = model.gqa if attention == "gqa" else f"configs/attention/{attention}.yaml"
        arguments = ["--config", str(ROOT / model.config), *model.overrides]
        config = experiments.parse([*arguments, f"--model.net.attention={ROOT / overlay}"])
        cost = Experiment(config, model.vocab_size, world_size=1).cost(attention, {}, layouts=layouts)
        assert cost.training_flops is not None
        rate = measured_speed(attention) * cost.training_flops if name == "small" else PEAK * MFU
        variants[attention] = {
            "parameters": cost.total,
            "flops_per_second": rate,
            "layouts": {
                key: None if share is None else _record(share, model.cluster, rate)
                for key, share in cost.scaled.items()
            },
        }
    return {
        "title": model.title,
        "config": model.config,
        "overrides": list(model.overrides),
        "vocab_size": model.vocab_size,
        "tensor_parallel": model.tensor_parallel,
        "cluster": vars(model.cluster),
        "variants": variants,
    }


def measured_speed(attention: str) -> float:
    """Tokens per second of one process on a CPU."""
    (run,) = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]
    speed: float = run["models"][attention]["tokens_per_second"]
    return speed


def _record(share: Share, cluster: Cluster, rate: float) -> dict[str, Any]:
    time = share.time(cluster, rate)
    sums = [one for one in share.collectives if one.carries == "activations"]
    return {
        "memory_bytes": share.memory.total,
        "sent_bytes": share.sent,
        "sent_in_sums": sum(one.sent(share.layout) for one in sums),
        "tokens": time.tokens,
        "seconds": time.overlapped,
        "waiting": time.waiting,
        "tokens_per_second": time.tokens_per_second,
        "efficiency": time.efficiency,
        "serial_efficiency": time.serial_efficiency,
        "critical_tokens": time.critical_tokens,
    }


def tables(record: Mapping[str, Any]) -> str:
    """A model's tables in Markdown."""
    unit, name = (GIB, "GiB") if max(v["parameters"] for v in record["variants"].values()) > 1e8 else (MIB, "MiB")

    def of(key: str, scale: float = 1.0, digits: int = 0) -> Callable[[Mapping[str, Any]], str]:
        return lambda layout: "–" if layout[key] is None else f"{layout[key] / scale:,.{digits}f}"

    def efficiency(layout: Mapping[str, Any]) -> str:
        return f"{100 * layout['efficiency']:.0f} ({100 * layout['serial_efficiency']:.0f})"

    shown = [
        _table(f"Sent by each process in an optimizer step, {name}", record, of("sent_bytes", unit, 2)),
        _table(f"Of this, sums of tensor parallelism, {name}", record, of("sent_in_sums", unit, 3), KINDS[3:]),
        _table(f"Memory of each process, {name}", record, of("memory_bytes", unit, 1)),
        _table("Efficiency with the best overlap (and with none), %", record, efficiency),
        _table("Tokens per second of all, in thousands", record, of("tokens_per_second", 1e3)),
        _table("Tokens of a micro-batch from which on all but sums can be hidden", record, of("critical_tokens")),
    ]
    return "\n".join(f"{_bold(render(table, 'markdown'))}" for table in shown)


def _table(
    caption: str, record: Mapping[str, Any], show: Callable[[Mapping[str, Any]], str], kinds: Sequence[str] = KINDS
) -> Table:
    variants = record["variants"]
    names = [key for key in next(iter(variants.values()))["layouts"] if key.split(" by ")[1] in kinds]
    names.sort(key=lambda key: KINDS.index(key.split(" by ")[1]))  # the sizes keep their order
    short = {"hybrid sharding": "hybrid", "tensor parallelism": f"{record['tensor_parallel']} parts"}
    titles = []
    for key in names:
        size, kind = key.split(" processes by ")
        titles.append(f"{short.get(kind, kind)}, {size}")
    rows = [
        [attention, *("–" if (layout := found["layouts"][key]) is None else show(layout) for key in names)]
        for attention, found in variants.items()
    ]
    return Table(caption, [Column("attention"), *(Column(title, "right") for title in titles)], rows)


def _bold(markdown: str) -> str:
    caption, rest = markdown.split("\n", 1)
    return f"**{caption}**\n{rest}"


def with_tables(page: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """``page`` with the tables of ``records`` between its marks.

    Raises:
        ValueError: there is no place for a model's tables.
    """
    for name, record in records.items():
        page = between_marks(page, name, tables(record))
    return page


if __name__ == "__main__":
    main()
