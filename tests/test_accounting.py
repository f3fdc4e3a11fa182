"""The parameters of a model, part by part."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attention.oracle import VARIANTS
from mhe_lightning.accounting import parameters_by_part
from mhe_lightning.models import Decoder, Encoder
from mhe_lightning.tasks import MaskedLanguageModeling, SequenceClassification

PARTS = ("embeddings", "attention_qkv", "attention_output", "feed_forward", "norms", "head", "other")
every_attention = pytest.mark.parametrize("name", VARIANTS)
# heads n and head size d, of a small model and of BERT-base
SIZES = [(4, 3), (12, 64)]


def build(name: str, *, n=4, d=3, L=2, attention_bias=True, **settings) -> Decoder:
    factory = partial(VARIANTS[name].build, bias=attention_bias)
    with torch.device("meta"):
        return Decoder(50, factory, width=n * d, n_heads=n, n_layers=L, max_length=16, **settings)


@every_attention
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_parts_sum_to_all_parameters_each_counted_once(name, tied, bias):
    net = build(name, attention_bias=bias, bias=bias, tie_embeddings=tied)
    counts = parameters_by_part(net)
    assert set(counts) == {*PARTS, "total", "without_embeddings"}
    numel = sum({id(p): p.numel() for p in net.parameters()}.values())
    assert counts["total"] == sum(counts[part] for part in PARTS) == numel
    assert counts["without_embeddings"] == numel - counts["embeddings"]


@every_attention
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_attention_without_biases_has_the_papers_parameters(name, n, d):
    L = 3
    counts = parameters_by_part(build(name, n=n, d=d, L=L, attention_bias=False))
    assert counts["attention_qkv"] == L * VARIANTS[name].parameters(n, d)
    assert counts["attention_output"] == L * n**2 * d**2


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_head_embeddings_add_what_the_paper_says(combine, n, d):
    def qkv(name):
        return parameters_by_part(build(name, n=n, d=d, L=1, attention_bias=False))["attention_qkv"]

    assert qkv(f"mhe_{combine}") - qkv("sha") == 3 * n * d
    assert qkv("mha") - qkv(f"mhe_{combine}") == (3 * n**2 - 3 * n) * d**2 - 3 * n * d


@pytest.mark.parametrize(
    ("name", "millions"),
    {"mha": 28.31, "skv": 21.23, "mqa": 15.34, "el": 14.16, "mhe_add": 8.88, "mhe_multiply": 8.88, "sha": 8.85}.items(),
)
def test_attention_parameters_of_bert_base(name, millions):
    counts = parameters_by_part(build(name, n=12, d=64, L=12, attention_bias=False))
    assert round((counts["attention_qkv"] + counts["attention_output"]) / 1e6, 2) == millions


@pytest.mark.parametrize("tied", [False, True])
def test_the_other_parts(tied):
    n, d, L, V, positions = 4, 3, 2, 50, 16
    D = n * d
    counts = parameters_by_part(build("mha", n=n, d=d, L=L, ff_width=20, tie_embeddings=tied))
    assert counts["embeddings"] == V * D + positions * D
    assert counts["attention_qkv"] == L * (3 * D**2 + 3 * D)
    assert counts["attention_output"] == L * (D**2 + D)
    assert counts["feed_forward"] == L * (20 * D + 20 + 20 * D + D)
    assert counts["norms"] == (2 * L + 1) * 2 * D
    assert counts["head"] == (0 if tied else V * D)
    assert counts["other"] == 0


def encoder() -> Encoder:
    return Encoder(50, VARIANTS["mha"].build, width=12, n_heads=4, n_layers=2, max_length=16)


def test_the_head_of_a_task_is_a_part_of_its_own():
    D, net = 12, parameters_by_part(encoder())
    settings = {"problem": "classes", "metrics": ["accuracy"]}
    task = SequenceClassification(encoder(), max_steps=1, n_labels=3, n_spans=2, **settings)
    counts = parameters_by_part(task)
    assert counts["head"] == (3 * D * D + D) + (3 * D + 3)
    assert {**counts, "head": 0} == {
        **net,
        "total": net["total"] + counts["head"],
        "without_embeddings": net["without_embeddings"] + counts["head"],
    }


def test_the_head_of_masked_tokens_has_no_embeddings_of_its_own():
    D, V = 12, 50
    counts = parameters_by_part(MaskedLanguageModeling(encoder(), max_steps=1))
    assert counts["head"] == (D * D + D) + 2 * D + V
    assert counts["embeddings"] == parameters_by_part(encoder())["embeddings"]
