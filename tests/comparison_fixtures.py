"""Invented comparisons that look like real ones."""

from __future__ import annotations

import math
import random

from mhe_lightning.comparison.results import Comparison, Curve, Estimate, Metric, Variant

# attention parameters of BERT-base without biases, KV numbers per token and layer, and how much worse a variant is
ATTENTIONS = {
    "mha": (28_311_552, 1536, 0.0),
    "skv": (21_233_664, 768, 0.01),
    "gqa_4": (17_694_720, 512, 0.006),
    "mqa": (15_335_424, 128, 0.021),
    "el_att": (14_155_776, 768, 0.07),
    "mhe_add": (8_875_008, 128, 0.012),
    "mhe_mul": (8_875_008, 128, 0.013),
    "sha": (8_847_360, 128, 0.045),
}
SEEDS = (1, 2, 3)


def estimate(values: list[float]) -> Estimate:
    """Mean and half width of the 95 % interval of three values."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return Estimate(mean, 4.303 * deviation / math.sqrt(len(values)), len(values))


def curves(final: float, draw: random.Random) -> list[Curve]:
    """A loss that is logged often and a perplexity that is logged seldom."""
    steps = list(range(20, 2001, 20))
    losses = [math.log(final) + 5 * math.exp(-s / 150) + draw.gauss(0, 0.02) for s in steps]
    seldom = list(range(200, 2001, 200))
    return [
        Curve("val/ppl", seldom, [final * (1 + 2 * math.exp(-s / 300)) for s in seldom]),
        Curve("train/loss", steps, losses),
    ]


def language_modeling(task: str = "wikitext-2-v1", latency: bool = True) -> Comparison:
    """Eight attentions, three seeds each, compared by perplexity."""
    draw = random.Random(5)
    reference = {seed: 24.0 + draw.gauss(0, 0.05) for seed in SEEDS}
    variants = []
    for name, (parameters, numbers, worse) in ATTENTIONS.items():
        noise = 0.0 if name == "mha" else 0.04
        scores = {seed: score * (1 + worse) + draw.gauss(0, noise) for seed, score in reference.items()}
        kept = [1 - (scores[seed] - reference[seed]) / reference[seed] for seed in SEEDS]
        measured = {t: (4 + numbers * t / 4e5 + draw.random() / 5) / 1000 for t in (128, 512, 2048, 4096)}
        variants.append(
            Variant(
                name=name,
                scores=scores,
                score=estimate(list(scores.values())),
                retained=estimate(kept),
                efficiency=None if name == "sha" else Estimate(0.02, 0.01, 3),
                p_value=None if name == "mha" else 0.03,
                attention_parameters=parameters,
                parameters=parameters + 80_000_000,
                tokens_per_second=Estimate(51_000.0, 900.0, 3),
                peak_memory_bytes=Estimate(3.1e9, 1e6, 3),
                cache_bytes_per_token=numbers * 12 * 4,
                latency=measured if latency else {},
                curves=curves(scores[1], draw),
            )
        )
    return Comparison(
        task=task,
        split="val",
        metric=Metric("ppl", higher_is_better=False),
        reference="mha",
        baseline="sha",
        mode="equal_architecture",
        variants=variants,
        max_context=512,
        facts={
            "steps": "2,000",
            "tokens a step": "32,768",
            "tokenizer": "bpe, 16,000 tokens",
            "precision": "bf16-mixed",
        },
        notes=["Seed 3 of el_att was run on another machine."],
    )


def classification(task: str = "glue-sst2") -> Comparison:
    """Three attentions of encoders: no caches, no latency, no curves, and one of them without a retention ratio."""
    scores = {"mha": (0.921, 0.004), "mhe_add": (0.913, 0.006), "sha": (0.898, 0.002)}
    return Comparison(
        task=task,
        split="test",
        metric=Metric("accuracy", higher_is_better=True, unit=100.0),
        reference="mha",
        baseline="sha",
        mode="equal_architecture",
        variants=[
            Variant(
                name=name,
                scores={1: mean, 2: mean},
                score=Estimate(mean, half, 2),
                retained=None if name == "sha" else Estimate(mean / 0.921, half if name != "mha" else 0.0, 2),
                efficiency=None,
                p_value=None,
                attention_parameters=ATTENTIONS[name][0],
                parameters=100_000_000,
                tokens_per_second=None,
                peak_memory_bytes=None,
                cache_bytes_per_token=None,
            )
            for name, (mean, half) in scores.items()
        ],
    )
