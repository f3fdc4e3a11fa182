"""Finished runs → comparisons: a row per attention, on each task."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from mhe_lightning.accounting import attention_weights, cache_size
from mhe_lightning.checkpoint import read_checkpoint, run_of
from mhe_lightning.comparison.diversity import diversity_of_text, maps_of_text
from mhe_lightning.comparison.latency import decode_latency
from mhe_lightning.comparison.results import Comparison, Estimate, LayerDiversity, Metric, Variant
from mhe_lightning.comparison.runs import VERB_OF, FinishedRun, mean_curves, refuse_differences
from mhe_lightning.comparison.statistics import elasticities, estimate, paired_test, retained
from mhe_lightning.data.tokenizer import load_tokenizer
from mhe_lightning.errors import UserError
from mhe_lightning.experiment import Experiments
from mhe_lightning.loading import Trained
from mhe_lightning.nets import load_net
from mhe_lightning.planning import Experiment
from mhe_lightning.run import TOKENIZER

NOT_OF_AN_EXPERIMENT = ("ckpt_path", "weights_only", "verbose", "return_predictions", "config")


@dataclass(frozen=True)
class Options:
    """What is compared, and what is measured besides.

    Args:
        split: "val" or "test"; None takes test where all runs have it.
        reference: the attention that the others are measured against.
        baseline: the one that parameter efficiency is measured from.
        allowed: categories in which runs may differ, of `CATEGORIES`.
        latency: whether to measure the time of decoding, on this machine.
        text: lines to measure the heads on; None measures none.
        max_tokens: of that text.
    """

    split: str | None = None
    reference: str = "mha"
    baseline: str = "sha"
    allowed: Collection[str] = ()
    latency: bool = False
    text: Sequence[str] | None = None
    max_tokens: int = 4096


@dataclass
class _Group:
    """Runs of one attention on one task."""

    name: str
    runs: list[FinishedRun] = field(default_factory=list)

    def scores(self, split: str) -> dict[int, float]:
        return {run.seed: run.score(split) for run in sorted(self.runs, key=lambda run: run.seed)}


def compare_runs(runs: Sequence[FinishedRun], options: Options) -> list[Comparison]:
    """A comparison for each task among ``runs``, in the order in which tasks appear.

    Raises:
        UserError: runs of a task differ in more than attention and seed, two of an attention have one seed, or the
            reference is missing.
    """
    by_task: dict[str, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    experiments = Experiments()
    return [_compare(task, found, options, experiments) for task, found in by_task.items()]


def _compare(task: str, runs: Sequence[FinishedRun], options: Options, experiments: Experiments) -> Comparison:
    split = options.split or ("test" if all(run.has_score("test") for run in runs) else "val")
    groups = _by_attention(task, runs, options.reference)
    notes = refuse_differences(runs, split, options.reference, options.allowed)
    metric = runs[0].metric
    reference = groups[options.reference].scores(split)
    seeds = set(reference)
    for group in groups.values():
        if missing := sorted(seeds - set(group.scores(split))):
            notes.append(f"{group.name} has no run of seed {', '.join(map(str, missing))}.")
    if split == "val" and any(run.settings for run in runs):
        notes.append("Settings were chosen on the validation split, on which the scores are, too.")
    costs = {name: _Costs.of(group.runs[0], experiments) for name, group in groups.items()}
    variants = [_variant(group, costs[name], costs, groups, split, metric, options) for name, group in groups.items()]
    variants.sort(key=lambda variant: -variant.attention_parameters)
    if options.latency:
        nets = {name: _trained(group.runs[0]).net for name, group in groups.items()}
        latency = decode_latency(nets)
        variants = [replace(variant, latency=latency.get(variant.name, {})) for variant in variants]
        if latency:
            notes.append(_how_latency_was_measured())
    if options.baseline not in groups:
        notes.append(f"PEoP is not defined, since there are no runs of {options.baseline}.")
    if len({run.results.get("machine") and json.dumps(run.results["machine"]) for run in runs}) > 1:
        notes.append("Runs were made on different machines: tokens/s and peak memory do not compare.")
    if any(cost.with_source for cost in costs.values()):
        notes.append("Bytes of the cache are for a token of the source and one of the target.")
    modes = {run.mode for run in runs if run.attention != options.reference} or {runs[0].mode}
    return Comparison(
        task=task,
        split=split,
        metric=metric,
        reference=options.reference,
        baseline=options.baseline,
        mode=sorted(modes)[0],
        variants=variants,
        max_context=next(iter(costs.values())).max_context,
        facts=_facts(runs, split),
        notes=notes,
    )


def _by_attention(task: str, runs: Sequence[FinishedRun], reference: str) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    for run in runs:
        group = groups.setdefault(run.attention, _Group(run.attention))
        twin = next((other for other in group.runs if other.seed == run.seed), None)
        if twin is not None:
            raise UserError(
                f"{twin.path} and {run.path} are both {run.attention} with seed {run.seed} on {task}; give one"
            )
        group.runs.append(run)
    if reference not in groups:
        raise UserError(
            f"no run of {reference} on {task}, which the others are compared with; there are {', '.join(groups)}: add "
            "its runs, or choose another --reference"
        )
    return groups


def _variant(
    group: _Group,
    cost: _Costs,
    costs: Mapping[str, _Costs],
    groups: Mapping[str, _Group],
    split: str,
    metric: Metric,
    options: Options,
) -> Variant:
    scores, reference = group.scores(split), groups[options.reference].scores(split)
    baseline = groups.get(options.baseline)
    efficiency = None
    if baseline is not None:
        efficiency = elasticities(
            scores, baseline.scores(split), cost.attention, costs[options.baseline].attention, metric
        )
    diversity: Sequence[LayerDiversity] = ()
    maps = None
    if options.text is not None:
        trained = [_trained(run) for run in group.runs]
        diversity = _mean_diversity(
            [diversity_of_text(t.net, t.tokenizer, options.text, max_tokens=options.max_tokens) for t in trained]
        )
        maps = maps_of_text(trained[0].net, trained[0].tokenizer, options.text)
    return Variant(
        name=group.name,
        scores=scores,
        score=estimate(list(scores.values())),
        retained=retained(scores, reference, metric),
        efficiency=efficiency,
        p_value=None if group.name == options.reference else paired_test(scores, reference),
        attention_parameters=cost.attention,
        parameters=cost.total,
        tokens_per_second=_over_seeds(group, "tokens_per_second"),
        peak_memory_bytes=_over_seeds(group, "peak_memory_bytes"),
        cache_bytes_per_token=cost.cache_bytes,
        cache_dtype_bytes=cost.cache_dtype_bytes,
        curves=mean_curves(group.runs),
        diversity=diversity,
        maps=maps,
        settings={**group.runs[0].settings, **group.runs[0].sizes},
    )


def _over_seeds(group: _Group, key: str) -> Estimate | None:
    values = [float(run.results[key]) for run in group.runs if run.results.get(key)]
    return estimate(values) if values else None


@dataclass(frozen=True)
class _Costs:
    attention: int
    total: int
    cache_bytes: int | None
    cache_dtype_bytes: int
    max_context: int | None
    with_source: bool

    @classmethod
    def of(cls, run: FinishedRun, experiments: Experiments) -> _Costs:
        """Of the run's model, built without memory."""
        config = {key: value for key, value in run.config.items() if key not in NOT_OF_AN_EXPERIMENT}
        parsed: Namespace = experiments.parser.parse_object(config)
        vocab_size = run.results.get("data", {}).get("vocab_size")
        if vocab_size is None:
            raise UserError(f"{run.path} does not record its vocabulary; its data module is not one of this library's")
        experiment = Experiment(parsed, vocab_size, world_size=1)
        net = experiment.empty_task().net
        size = experiment.precision.weights.itemsize
        cache = cache_size(net)
        return cls(
            attention=attention_weights(net),
            total=run.results["parameters"]["total"],
            cache_bytes=None if cache is None else size * (cache.per_token + cache.per_source_token),
            cache_dtype_bytes=size,
            max_context=getattr(net, "max_length", None),
            with_source=cache is not None and cache.per_source_token > 0,
        )


def _trained(run: FinishedRun) -> Trained:
    folder, path = run_of(run.path)
    net = load_net(read_checkpoint(path))
    return Trained(net, load_tokenizer(folder / TOKENIZER), run.config["model"]["init_args"])


def _mean_diversity(each: Sequence[Sequence[LayerDiversity]]) -> list[LayerDiversity]:
    """Over seeds, layer by layer."""
    return [
        replace(
            layers[0],
            jensen_shannon=sum(layer.jensen_shannon for layer in layers) / len(layers),
            cosine=sum(layer.cosine for layer in layers) / len(layers),
        )
        for layers in zip(*each, strict=True)
    ]


def _how_latency_was_measured() -> str:
    import torch

    return (
        "Time for a token was measured when this was made, one sequence at a time, all attentions in turn, medians, "
        f"on {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} of the CPU."
    )


def _facts(runs: Sequence[FinishedRun], split: str) -> dict[str, str]:
    """What all runs have in common, in words."""
    first = runs[0]
    data = first.results.get("data", {})
    found: dict[str, Any] = {
        "model": first.config["model"]["init_args"]["net"]["class_path"].rpartition(".")[2],
        "steps": f"{first.results['steps']:,}",
        "tokens seen": _range([run.results.get("tokens_seen", 0) for run in runs]),
        "tokenizer": str(data.get("tokenizer_sha256"))[:12],
        "vocabulary": f"{data.get('vocab_size', 0):,} tokens",
        "versions": ", ".join(f"{name} {version}" for name, version in first.results.get("versions", {}).items()),
        "commit": first.results.get("git_commit") or "–",
        "seeds": ", ".join(map(str, sorted({run.seed for run in runs}))),
    }
    evaluation = first.results.get("evaluations", {}).get(VERB_OF[split], {})
    if (checkpoint := evaluation.get("checkpoint")) is not None:
        found["scored checkpoint"] = Path(checkpoint).name
    for name, signature in (evaluation.get("signatures") or {}).items():
        found[f"{name} signature"] = signature
    return found


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
