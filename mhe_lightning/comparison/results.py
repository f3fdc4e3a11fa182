"""What a comparison has found, as plain data: computed by one module, shown by others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and what is known of its spread.

    Args:
        mean: over the values.
        half_width: of the 95 % confidence interval of the mean; None of fewer than two values.
        n: number of values.
    """

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class Metric:
    """A score that runs are compared by.

    Args:
        name: such as "ppl", "bleu" or "accuracy".
        higher_is_better: False for losses and perplexities.
        unit: factor from the recorded number to the one that is shown, 100 for shares that are shown in per cent.
    """

    name: str
    higher_is_better: bool
    unit: float = 1.0


@dataclass(frozen=True)
class Curve:
    """A logged quantity over optimizer steps, averaged over seeds.

    Args:
        name: such as "train/loss" or "val/ppl".
        steps: optimizer steps.
        values: mean over seeds at each.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class LayerDiversity:
    """How different a layer's attention heads are on a text.

    Args:
        place: which attention of the layer: "self", or "encoder", "decoder" and "cross".
        layer: number of the layer, from 0.
        jensen_shannon: mean divergence of two heads' attention distributions over keys, in bits: 0 if all heads
            attend alike, 1 if no two attend to one same key.
        cosine: mean cosine similarity of two heads' attention distributions, 1 if all attend alike.
    """

    place: str
    layer: int
    jensen_shannon: float
    cosine: float


@dataclass(frozen=True)
class AttentionMaps:
    """Attention distributions of all heads of some layers on one short text.

    Args:
        tokens: what each key's token reads as, S of them; queries' too where they are the same sequence.
        queries: what each query's token reads as, T of them.
        layers: of each (place, layer) the distributions, [head][query][key].
    """

    tokens: Sequence[str]
    queries: Sequence[str]
    layers: Mapping[tuple[str, int], Sequence[Sequence[Sequence[float]]]]


@dataclass(frozen=True)
class Variant:
    """A row of a comparison: all runs that differ by their seed only.

    Args:
        name: of the attention.
        scores: seed → score, as recorded.
        score: their mean.
        retained: performance retention ratio (PRR) against the reference, 1 = all kept, paired by seed; None where it
            is not defined.
        efficiency: performance elasticity of parameters (PEoP) against the single head; None where it is not defined.
        p_value: of the paired test against the reference, two-sided; None with fewer than two common seeds.
        attention_parameters: of all attention sublayers with their output projections, without biases.
        parameters: of the whole model.
        tokens_per_second: in training.
        peak_memory_bytes: of the training process.
        cache_bytes_per_token: of the KV caches of all layers, for one token of one sequence; in an encoder–decoder, for
            one of the source and one of the target; None for encoders.
        cache_dtype_bytes: bytes of a number in that cache.
        latency: length of the context in tokens → median seconds for the next token of one sequence; empty if it was
            not measured.
        curves: of training.
        diversity: of the attention heads; empty if it was not measured.
        maps: pictures' data; None if it was not measured.
        settings: what was chosen for this variant, such as {"model.init_args.lr": 0.001}; empty without a grid.
    """

    name: str
    scores: Mapping[int, float]
    score: Estimate
    retained: Estimate | None
    efficiency: Estimate | None
    p_value: float | None
    attention_parameters: int
    parameters: int
    tokens_per_second: Estimate | None
    peak_memory_bytes: Estimate | None
    cache_bytes_per_token: int | None
    cache_dtype_bytes: int = 4
    latency: Mapping[int, float] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    diversity: Sequence[LayerDiversity] = ()
    maps: AttentionMaps | None = None
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Variants compared on one task.

    Args:
        task: what was trained on, such as "wikitext-2-v1" or "glue-sst2".
        split: whose scores these are, "val" or "test".
        metric: the score.
        reference: name of the variant that retention is measured against, "mha".
        baseline: name of the variant that efficiency is measured against, "sha".
        mode: "equal_architecture", "equal_parameters" or "equal_flops".
        variants: rows, the most attention parameters first.
        max_context: the longest sequence of the models in tokens, for the axis of the context; None if unknown.
        facts: what all runs have in common, in words → value, such as "steps" → "1,416".
        notes: what a reader should know, a sentence each: differences that were allowed, seeds that are missing.
    """

    task: str
    split: str
    metric: Metric
    reference: str
    baseline: str
    mode: str
    variants: Sequence[Variant]
    max_context: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
