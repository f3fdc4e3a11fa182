"""Wrong arguments raise ``ValueError`` with the value, the constraint and a remedy; importing stays light."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import mhe_lightning
from attention.oracle import VARIANTS, assert_near, build
from mhe_lightning.attention import GQA, MHA, MHE, Attention

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "attention").glob("*.yaml"))


@pytest.fixture
def x():
    return torch.randn(2, 5, 12, dtype=torch.float64)


@pytest.mark.parametrize(("width", "n_heads"), [(24, 5), (24, 0), (24, -4), (768, 7), (24, 48), (13, 2)])
def test_heads_that_do_not_divide_the_width_get_divisors_suggested(variant, width, n_heads):
    message = rf"n_heads \({n_heads}\) must divide width \({width}\); try "
    with pytest.raises(ValueError, match=message) as error:
        variant.build(width=width, n_heads=n_heads)
    suggested = [int(number) for number in re.findall(r"\d+", str(error.value).split("try")[1])]
    assert suggested
    assert all(width % h == 0 for h in suggested)


@pytest.mark.parametrize("width", [0, -8])
def test_width_below_one_is_refused(variant, width):
    with pytest.raises(ValueError, match=rf"width \({width}\) must be at least 1"):
        variant.build(width=width, n_heads=2)


@pytest.mark.parametrize("n_kv_heads", [0, -1, 3, 8])
def test_kv_heads_that_do_not_divide_the_heads_get_divisors_suggested(n_kv_heads):
    with pytest.raises(ValueError, match=rf"n_kv_heads \({n_kv_heads}\) must divide n_heads \(4\); try 1, 2 or 4"):
        GQA(width=24, n_heads=4, n_kv_heads=n_kv_heads)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_outside_its_range_is_refused(variant, dropout):
    with pytest.raises(ValueError, match=rf"dropout \({dropout}\) must be in \[0, 1\); 0 switches it off"):
        variant.build(width=12, n_heads=4, dropout=dropout)


@pytest.mark.parametrize("combine", ["mul", "", None])
def test_unknown_combine_is_refused(combine):
    with pytest.raises(ValueError, match=rf"combine \({combine!r}\) must be 'add' or 'multiply'"):
        MHE(width=12, n_heads=4, combine=combine)


def test_negative_embedding_std_is_refused():
    with pytest.raises(ValueError, match=r"embedding_std \(-0.02\) must not be negative; 0.02 is"):
        MHE(width=12, n_heads=4, embedding_std=-0.02)


def test_head_embeddings_start_with_the_documented_spread():
    m = MHE(width=4096, n_heads=16)
    for e in (m.e_q, m.e_k, m.e_v):
        assert e.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(e.mean().item()) < 0.002
    assert MHE(width=12, n_heads=4, embedding_std=0.0).e_q.abs().max() == 0


def test_arguments_are_keyword_only(variant):
    with pytest.raises(TypeError, match="positional"):
        variant.build(12, 4)


@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 1, 5, 12), (2, 5, 11)], ids=str)
def test_x_of_a_wrong_shape_is_refused(variant, shape):
    message = re.escape(f"x has shape {shape}; it must be (B, T, 12)")
    with pytest.raises(ValueError, match=message):
        build(variant)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 7, 11), (3, 7, 12), (1, 7, 12), (7, 12), (2, 1, 7, 12)], ids=str)
def test_context_of_a_wrong_shape_is_refused(variant, x, shape):
    message = re.escape(f"context has shape {shape}; it must be (2, S, 12)") + ".*project"
    with pytest.raises(ValueError, match=message):
        build(variant)(x, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 4), (2, 3, 5, 5), (3, 1, 1, 5), (2, 5), (1,) * 5], ids=str)
def test_mask_of_a_wrong_shape_is_refused(variant, x, shape, is_causal):
    message = re.escape(f"mask has shape {shape}; it must broadcast to (B, n, T, S) = (2, 4, 5, 5)")
    with pytest.raises(ValueError, match=message + r".*padding\[:, None, None, :\]"):
        build(variant)(x, mask=torch.ones(shape, dtype=torch.bool), is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8], ids=str)
def test_mask_of_a_wrong_dtype_is_refused(variant, x, dtype):
    with pytest.raises(ValueError, match=rf"mask has dtype {dtype}; it must be torch.bool .*additive == 0"):
        build(variant)(x, mask=torch.ones(2, 1, 1, 5, dtype=dtype))


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("mask", [[True, False, True, True, False], True], ids=["keys", "one value"])
def test_mask_of_fewer_than_two_dimensions_broadcasts(variant, x, mask, is_causal):
    m, mask = build(variant), torch.tensor(mask)
    expected = m(x, mask=mask.expand(2, 4, 5, 5), is_causal=is_causal)
    assert_near(m(x, mask=mask, is_causal=is_causal), expected)


def test_repr_shows_what_the_module_is():
    assert "width=12, n_heads=4, dropout=0.1" in repr(MHA(width=12, n_heads=4, dropout=0.1))
    assert "combine='multiply'" in repr(MHE(width=12, n_heads=4, combine="multiply"))


def test_every_class_documents_its_arguments(variant):
    cls = type(build(variant))
    for name in inspect.signature(cls).parameters:
        assert re.search(rf"^\s+{name}: ", cls.__doc__, re.MULTILINE), f"{name} is not documented"


def test_import_loads_no_training_framework():
    heavy = ["lightning", "jsonargparse", "datasets", "tokenizers", "torchmetrics", "sacrebleu"]
    code = f"import sys, mhe_lightning.attention; print([m for m in {heavy} if m in sys.modules])"
    folder = Path(mhe_lightning.__file__).parents[1]
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True)
    assert loaded.strip() == "[]"


def from_config(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(config) <= {"class_path", "init_args"}
    module, name = config["class_path"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(width=24, n_heads=4, **config.get("init_args", {}))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_an_attention(path):
    m = from_config(path)
    assert isinstance(m, Attention)
    assert m(torch.randn(2, 5, 24), is_causal=True).shape == (2, 5, 24)


def test_every_variant_has_a_config():
    def kind(m):
        return type(m).__name__, getattr(m, "combine", None)

    configured = {kind(from_config(path)) for path in CONFIGS}
    assert {kind(v.build(width=24, n_heads=4)) for v in VARIANTS.values()} <= configured
