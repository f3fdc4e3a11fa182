"""MHE without its key embedding is MHE."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mhe_lightning.attention import MHE

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "dead_key.py"


@pytest.fixture(scope="module")
def keyless():
    spec = importlib.util.spec_from_file_location("dead_key", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.KeylessMHE


def test_it_begins_as_mhe_does_and_gives_the_same(keyless):
    made = []
    for kind in (MHE, keyless):
        torch.manual_seed(3)
        made.append(kind(width=16, n_heads=4))
    x = torch.randn(2, 5, 16)

    assert torch.equal(made[0](x, is_causal=True), made[1](x, is_causal=True))


def test_it_lacks_nothing_but_the_key_embedding(keyless):
    names = {name for name, _ in MHE(width=16, n_heads=4).named_parameters()}

    assert {name for name, _ in keyless(width=16, n_heads=4).named_parameters()} == names - {"e_k"}
