"""`plan`: what an experiment will cost with each attention, before anything is trained."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mhe_lightning.accounting import PARTS
from mhe_lightning.comparison.tables import Column, Table, Value, render
from mhe_lightning.errors import UserError
from mhe_lightning.experiment import Experiments
from mhe_lightning.files import write_text
from mhe_lightning.parsing import as_user_error
from mhe_lightning.planning import DTYPES, Cost, Experiment, Schedule
from mhe_lightning.sizing import match
from mhe_lightning.variants import config_files, find_overlays
from mhe_lightning.verbs.passing import PassingParser, add_variant_arguments
from mhe_lightning.verbs.plan_columns import MIB, Against, MakeTable, Part, big, count, decimal, make_table, ratio_to
from mhe_lightning.verbs.plan_scaling import (
    add_scaling_arguments,
    check_scaling,
    layouts_of,
    rate_of,
    scaling_tables,
    share_record,
)

DESCRIPTION = """\
What an experiment will cost with each attention: parameters by part, FLOPs, KV caches, memory of a training step, and
with --peak_tflops the time. Nothing is trained; it needs neither data nor a GPU.

Options that are not listed here are those of `fit`: --config, --trainer.precision bf16-mixed, --model.net.width 512."""

EXAMPLES = """\
examples:
  train.py plan --config configs/experiment/gpt2_base_wikitext103.yaml
  … --attentions mha mhe_add mqa --mode equal_parameters --spend width
  … --batch 32 --context 8192 --world_size 8 --peak_tflops 989 --mfu 0.4
  … --scale 8 64 1024 --peak_tflops 989 --mfu 0.4
  … --json plan.json --csv plan.csv"""

DAY = 86_400


def main(verb: str, args: list[str]) -> None:
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    try:
        _check(parser, options)
        costs, schedule = _plan(options, rest)
        tables = _tables(costs, schedule, options)
        text = json.dumps(_record(costs, schedule, options), indent=2) + "\n"
        if options.json == "-":
            print(text, end="")
            return
        print("\n".join(render(table, "text") for table in tables), end="")
        if options.json:
            write_text(Path(options.json), text)
        if options.csv:
            write_text(Path(options.csv), render(_joined(tables), "csv"))
    except UserError as error:
        raise UserError(f"{error}{parser.hint(str(error))}") from error
    except ValueError as error:
        raise as_user_error(error) or error from error


def _check(parser: PassingParser, options: argparse.Namespace) -> None:
    check_scaling(parser, options)
    for name in ("batch", "context", "vocab_size", "world_size", "peak_tflops"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name} ({value}) must be positive")
    if not 0 < options.mfu <= 1:
        parser.error(f"--mfu ({options.mfu}) must be above 0 and at most 1; 0.4 is usual on one GPU")


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> tuple[list[Cost], Schedule]:
    experiments = Experiments()
    configs = config_files(rest)
    overlays = find_overlays(options.attentions, configs)
    references = find_overlays([options.reference, options.baseline], configs)
    overlays = {**references, **overlays}
    references = {name: overlays[name] for name in references}
    costs = []
    for name, overlay in overlays.items():
        sizes = match(
            experiments,
            rest,
            overlay,
            reference=references[Path(options.reference).stem],
            mode=options.mode,
            spend=options.spend,
            vocab_size=options.vocab_size,
        )
        arguments = [*rest, f"--model.net.attention={overlay}", *(f"--{key}={value}" for key, value in sizes.items())]
        experiment = Experiment(experiments.parse(arguments), options.vocab_size, options.world_size)
        costs.append(experiment.cost(name, sizes, trace=not options.no_trace, layouts=layouts_of(options)))
    costs.sort(key=lambda cost: -cost.attention_weights)
    return costs, experiment.schedule()


def _tables(costs: Sequence[Cost], schedule: Schedule, options: argparse.Namespace) -> list[Table]:
    reference = next(cost for cost in costs if cost.name == Path(options.reference).stem)
    baseline = next(cost for cost in costs if cost.name == Path(options.baseline).stem)

    def against(measure: Callable[[Cost], float | None]) -> list[Part]:
        return [ratio_to(measure, other) for other in (reference, baseline)]

    def table(caption: str, parts: Sequence[Part], notes: Sequence[str] = ()) -> Table:
        name = Part("attention", lambda cost: cost.name, str, "left")
        return make_table(caption, [name, *parts], costs, notes)

    def attention(cost: Cost) -> float:
        return cost.attention_weights

    sizes = sorted({key for cost in costs for key in cost.sizes})
    parts = [part for part in PARTS if any(cost.counts[part].total for cost in costs)]
    tables = [
        table(
            "Attention parameters, weights and biases apart",
            [
                Part("QKV weights", lambda cost: cost.counts["attention_qkv"].weights, count),
                Part("output weights", lambda cost: cost.counts["attention_output"].weights, count),
                Part("weights", attention, count),
                *against(attention),
                Part("biases", lambda cost: cost.attention_biases, count),
                *(Part(key.removeprefix("model.net."), _size(key), count) for key in sizes),
            ],
        ),
        table(
            "Parameters by part",
            [
                *(Part(part.replace("_", " "), _of_part(part), count) for part in parts),
                Part("total", lambda cost: cost.total, count),
                *against(lambda cost: cost.total),
                Part("without embeddings", lambda cost: cost.without_embeddings, count),
            ],
            [f"a vocabulary of {schedule.vocab_size:,} tokens; what is tied counts once"],
        ),
    ]
    if not options.no_trace:
        tables.append(
            table(
                f"FLOPs per token, in rows of {schedule.length} tokens",
                [
                    Part("forward", lambda cost: cost.forward_flops, big),
                    *against(lambda cost: cost.forward_flops),
                    Part("training", lambda cost: cost.training_flops, big),
                    *against(lambda cost: cost.training_flops),
                ],
                ["matrix products, two for a multiply–add; a causal mask saves nothing"],
            )
        )
    if costs[0].cache is not None:
        tables.append(_cache_table(table, against, schedule, options))
    if not options.no_trace:
        tables.append(_memory_table(table, against, schedule))
        if options.peak_tflops:
            tables.append(_time_table(table, against, schedule, options))
        tables += scaling_tables(table, costs, schedule, options)
    return tables


def _cache_table(table: MakeTable, against: Against, schedule: Schedule, options: argparse.Namespace) -> Table:
    size = (DTYPES[options.cache_dtype] if options.cache_dtype else schedule.cache_dtype).itemsize
    context = options.context or schedule.length

    def own(cost: Cost) -> int:
        return size * cost.cache.per_token if cost.cache else 0

    def source(cost: Cost) -> int:
        return size * cost.cache.per_source_token if cost.cache else 0

    def whole(cost: Cost) -> float:
        return options.batch * context * (own(cost) + source(cost)) / MIB

    with_source = [Part("bytes per source token", source, count)] if schedule.translates else []
    note = ["the context is that of the source and of what is generated, each"] if schedule.translates else []
    return table(
        "KV cache of all layers",
        [
            Part("bytes per token", own, count),
            *with_source,
            Part(f"{options.batch} × {context:,} tokens, MiB", whole, decimal),
            *against(whole),
        ],
        [f"{size} bytes a number", *note],
    )


def _memory_table(table: MakeTable, against: Against, schedule: Schedule) -> Table:
    parts = [
        Part(f"{name}, MiB", _memory(name), decimal)
        for name in ("weights", "gradients", "optimizer", "activations", "communication", "total")
        if name != "communication" or schedule.world_size > 1
    ]
    return table(
        f"Memory of a training step on each of {schedule.world_size} ranks"
        if schedule.world_size > 1
        else "Memory of a training step",
        [*parts, *against(_memory("total"))],
        [
            f"{schedule.precision}, strategy {schedule.strategy}, activation checkpointing "
            f"{'on' if schedule.checkpointing else 'off'}, the largest micro-batch of "
            f"{'a rank' if schedule.world_size > 1 else 'one process'}, attention as "
            f"{'a GPU' if schedule.on_gpu else 'a CPU'} computes it; activations hold what a moment needs, too; "
            "the libraries themselves come on top",
            *([f"a net is laid out as {schedule.layout}"] if schedule.layout.sharded else []),
        ],
    )


def _time_table(table: MakeTable, against: Against, schedule: Schedule, options: argparse.Namespace) -> Table:
    rate = rate_of(options) * schedule.world_size

    def speed(cost: Cost) -> float:
        return rate / (cost.training_flops or math.inf)

    return table(
        "Time, estimated",
        [
            Part("tokens/s", speed, lambda value: count(round(value))),
            *against(speed),
            Part("days", lambda cost: schedule.tokens / speed(cost) / DAY, lambda value: f"{value:,.3g}"),
        ],
        [
            f"at most {schedule.tokens:,} tokens in {schedule.steps:,} steps; {options.peak_tflops:g} TFLOP/s a "
            f"process at its peak, of which {options.mfu:.0%} are assumed to be used, by every attention",
            *(["as if nothing had to be sent"] if schedule.world_size > 1 else []),
        ],
    )


def _size(key: str) -> Callable[[Cost], int | None]:
    return lambda cost: cost.sizes.get(key)


def _of_part(part: str) -> Callable[[Cost], int]:
    return lambda cost: cost.counts[part].total


def _memory(name: str) -> Callable[[Cost], float]:
    return lambda cost: getattr(cost.memory, name) / MIB


def _joined(tables: Sequence[Table]) -> Table:
    """All tables side by side, for CSV; a column's name begins with its table's."""
    columns: list[Column] = []
    values: list[list[Value]] = [[] for _ in tables[0].rows]
    for i, table in enumerate(tables):
        for k, column in enumerate(table.columns):
            if k == 0 and i:
                continue
            name = column.title if k == 0 else f"{table.caption.split(',')[0].lower()}: {column.title}"
            columns.append(Column(name, column.align))
            for row, own in zip(values, table.values, strict=True):
                row.append(own[k])
    return Table("plan", columns, [["" for _ in columns] for _ in values], (), values)


def _record(costs: Sequence[Cost], schedule: Schedule, options: argparse.Namespace) -> dict[str, Any]:
    """All there is, in bytes and single parameters, for other programs."""
    return {
        "reference": Path(options.reference).stem,
        "baseline": Path(options.baseline).stem,
        "mode": options.mode,
        "schedule": schedule.as_dict(),
        "variants": {
            cost.name: {
                "sizes": dict(cost.sizes),
                "parameters": {part: count._asdict() for part, count in cost.counts.items()},
                "attention_weights": cost.attention_weights,
                "attention_biases": cost.attention_biases,
                "total": cost.total,
                "without_embeddings": cost.without_embeddings,
                "cache_numbers": None if cost.cache is None else cost.cache._asdict(),
                "forward_flops_per_token": cost.forward_flops,
                "training_flops_per_token": cost.training_flops,
                "memory_bytes": None if cost.memory is None else {**vars(cost.memory), "total": cost.memory.total},
                "communication": share_record(cost.share, options),
                "scaled": {name: share_record(share, options) for name, share in cost.scaled.items()},
            }
            for cost in costs
        },
    }


def _parser() -> PassingParser:
    parser = PassingParser(
        "plan",
        usage="train.py plan --config FILE [options] [options of fit]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_variant_arguments(parser)
    parser.add_argument(
        "--baseline", default="sha", metavar="NAME", help="A second attention to compare with (default: sha)."
    )
    parser.add_argument("--batch", type=int, default=1, help="Sequences in the KV cache that is sized (default: 1).")
    parser.add_argument("--context", type=int, help="Their tokens (default: the length of the config's rows).")
    parser.add_argument(
        "--cache_dtype", choices=list(DTYPES), help="What the cache is stored in (default: as trainer.precision)."
    )
    parser.add_argument("--vocab_size", type=int, help="Tokens of the vocabulary, if the config does not say.")
    parser.add_argument("--world_size", type=int, help="Processes (default: trainer.devices × trainer.num_nodes).")
    parser.add_argument(
        "--peak_tflops", type=float, help="Of one process's device, in 10¹² per second: gives the time."
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="Model FLOPs utilisation: the share of that peak (default: 0.4)."
    )
    add_scaling_arguments(parser)
    parser.add_argument("--no_trace", action="store_true", help="Leave out FLOPs, memory, time and what is sent.")
    parser.add_argument("--json", metavar="FILE", help="Write everything as JSON; '-' prints it instead of the tables.")
    parser.add_argument("--csv", metavar="FILE", help="Write the tables' numbers as CSV.")
    return parser
