"""The parameters of a model, part by part."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from attention.oracle import VARIANTS
from mhe_lightning.accounting import attention_weights, cache_size, count_parameters, parameters_by_part
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.tasks import MaskedLanguageModeling, SequenceClassification

PARTS = ("embeddings", "attention_qkv", "attention_output", "feed_forward", "norms", "head", "other")
every_attention = pytest.mark.parametrize("name", VARIANTS)
# heads n and head size d, of a small model and of BERT-base
SIZES = [(4, 3), (12, 64)]
CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = sorted((CONFIGS / "attention").glob("*.yaml"))
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
NETS = {
    "decoder": Decoder,
    "decoder with an output of its own": partial(Decoder, tie_embeddings=False),
    "encoder": Encoder,
    "encoder-decoder": EncoderDecoder,
    "encoder-decoder with three embeddings": partial(EncoderDecoder, share_embeddings=False, tie_embeddings=False),
}


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


def factory(overlay: Path, **settings) -> partial:
    """What an overlay builds, as the command line would."""
    spec = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    module, _, name = spec["class_path"].rpartition(".")
    return partial(getattr(import_module(module), name), **{**spec.get("init_args", {}), **settings})


@every_overlay
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(("n", "d"), [(2, 4), (4, 3), (6, 8)])
def test_weights_and_biases_sum_to_those_of_the_net_that_is_built(overlay, bias, kind, n, d):
    sizes = {"width": n * d, "n_heads": n, "n_layers": 2, "max_length": 16, "bias": bias}
    attention = factory(overlay, bias=bias)
    with torch.device("meta"):
        counts = count_parameters(NETS[kind](50, attention, **sizes))
    torch.manual_seed(0)
    built = dict(NETS[kind](50, attention, **sizes).named_parameters())  # a tied parameter has one name
    biases = sum(p.numel() for name, p in built.items() if name.endswith("bias"))
    assert sum(count.biases for count in counts.values()) == biases
    assert sum(count.total for count in counts.values()) == sum(p.numel() for p in built.values())
    assert (biases > 0) == bias


BERT = {  # QKV weights of a layer from n and d, and the millions of all layers with W_O
    "mha": (lambda n, d: 3 * n**2 * d**2, 28.31),
    "skv": (lambda n, d: 2 * n**2 * d**2, 21.23),
    "mqa": (lambda n, d: n**2 * d**2 + 2 * n * d**2, 15.34),
    "el": (lambda n, d: n**2 * d**2, 14.16),
    "mhe_add": (lambda n, d: 3 * n * d**2 + 3 * n * d, 8.88),
    "mhe_mul": (lambda n, d: 3 * n * d**2 + 3 * n * d, 8.88),
    "sha": (lambda n, d: 3 * n * d**2, 8.85),
    "gqa": (lambda n, d: n**2 * d**2 + 4 * n * d**2, 16.52),
}


@every_overlay
def test_attention_weights_of_the_shipped_bert_base(overlay):
    spec = yaml.safe_load((CONFIGS / "model" / "bert_base.yaml").read_text(encoding="utf-8"))
    sizes = spec["init_args"]["net"]["init_args"]
    with torch.device("meta"):
        net = Encoder(30522, **{**sizes, "attention": factory(overlay)})
    qkv, millions = BERT[overlay.stem]
    n, d, L = 12, 64, 12
    assert attention_weights(net) == L * (qkv(n, d) + n**2 * d**2)
    assert round(attention_weights(net) / 1e6, 2) == millions


@pytest.mark.parametrize("combine", ["add", "mul"])
@pytest.mark.parametrize(("n", "d"), [(2, 4), (3, 5), (8, 16), (12, 64)])
def test_biases_leave_the_papers_differences_of_weights_as_they_are(combine, n, d):
    L = 3

    def weights(name: str) -> int:
        with torch.device("meta"):
            attention = factory(CONFIGS / "attention" / f"{name}.yaml", bias=True)
            return attention_weights(Decoder(50, attention, width=n * d, n_heads=n, n_layers=L, max_length=4))

    mhe = weights(f"mhe_{combine}")
    assert mhe - weights("sha") == L * 3 * n * d
    assert weights("mha") - mhe == L * ((3 * n**2 - 3 * n) * d**2 - 3 * n * d)


CACHED = {  # numbers per token of a layer, from n and d
    "mha": lambda n, d: 2 * n * d,
    "gqa": lambda n, d: 4 * d,
    "mqa": lambda n, d: 2 * d,
    "mhe_add": lambda n, d: 2 * d,
    "mhe_mul": lambda n, d: 2 * d,
    "sha": lambda n, d: 2 * d,
    "skv": lambda n, d: n * d,
    "el": lambda n, d: n * d,
}


@every_overlay
@torch.no_grad()
def test_the_cache_of_a_decoder_is_what_its_forward_pass_stores(overlay):
    n, d, L = 4, 3, 2
    net = Decoder(50, factory(overlay), width=n * d, n_heads=n, n_layers=L, max_length=8).eval()
    caches = net.new_caches()
    net(torch.zeros(2, 5, dtype=torch.long), caches=caches)
    assert cache_size(net) == (sum(cache.elements_per_token for cache in caches), 0)
    assert cache_size(net).per_token == L * CACHED[overlay.stem](n, d)


@every_overlay
@torch.no_grad()
def test_the_caches_of_an_encoder_decoder_are_those_of_target_and_source(overlay):
    n, d, L = 4, 3, 3
    net = EncoderDecoder(
        50,
        factory(CONFIGS / "attention" / "mha.yaml"),
        cross_attention=factory(overlay),
        width=n * d,
        n_heads=n,
        n_layers=2,
        n_decoder_layers=L,
    ).eval()
    caches = net.new_caches(source_length=5, max_length=8)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    net.decode(tokens[:, :3], net.encode(tokens), caches=caches)
    own, source = (sum(getattr(cache, side).elements_per_token for cache in caches) for side in ("own", "source"))
    assert cache_size(net) == (own, source) == (L * 2 * n * d, L * CACHED[overlay.stem](n, d))


def test_an_encoder_has_no_cache():
    assert cache_size(encoder()) is None
