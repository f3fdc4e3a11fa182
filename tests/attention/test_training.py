"""Attention dropout, and what an optimizer does to the head embeddings."""

import pytest
import torch

from attention.oracle import VARIANTS, assert_near, build
from mhe_lightning.attention import MHE

MHES = pytest.mark.parametrize("name", ["mhe_add", "mhe_multiply"])


@pytest.fixture
def x():
    return torch.randn(2, 5, 12, dtype=torch.float64)


def with_seed(seed, m, *args, **kwargs):
    torch.manual_seed(seed)
    return m(*args, **kwargs)


def show_heads(m):
    """Make the output the concatenated heads, exactly."""
    with torch.no_grad():
        m.w_o.weight.copy_(torch.eye(m.width))
        m.w_o.bias.zero_()
    return m


def test_dropout_is_reproducible_under_a_seed(variant, x):
    m = build(variant, dropout=0.5).train()
    assert torch.equal(with_seed(7, m, x), with_seed(7, m, x))
    assert not torch.equal(with_seed(7, m, x), with_seed(8, m, x))


def test_dropout_is_off_in_evaluation(variant, x):
    m, plain = build(variant, dropout=0.5).eval(), build(variant, dropout=0.0).train()
    plain.load_state_dict(m.state_dict())
    assert torch.equal(m(x), plain(x))
    assert torch.equal(m(x), m(x))


def test_dropout_changes_the_training_output(variant, x):
    m = build(variant, dropout=0.5)
    assert not torch.allclose(m.train()(x), m.eval()(x), rtol=1e-2)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "causal and padding"])
def test_dropout_keeps_the_mean(variant, masked):
    m, x, draws = build(variant, dropout=0.3), torch.randn(1, 5, 12, dtype=torch.float64), 4000
    mask = torch.tensor([True, True, False, True, True])[None, None, None, :] if masked else None
    outputs = m.train()(x.expand(draws, -1, -1), mask=mask, is_causal=True)
    error = (outputs.mean(0) - m.eval()(x, mask=mask, is_causal=True)[0]).abs()
    assert (error <= 5 * outputs.std(0) / draws**0.5 + 1e-12).all()


def test_dropout_does_not_let_the_future_through(variant, x):
    m = build(variant, dropout=0.5).train()
    changed = x.clone()
    changed[:, -1] += 1
    y, z = (with_seed(3, m, t, is_causal=True) for t in (x, changed))
    assert torch.equal(y[:, :-1], z[:, :-1])


@MHES
def test_every_head_draws_its_own_dropout(name, x):
    m = show_heads(build(VARIANTS[name], dropout=0.5)).train()
    with torch.no_grad():
        for e in (m.e_q, m.e_k, m.e_v):
            e.zero_()
    heads = m(x).unflatten(-1, (4, 3))
    for i in range(4):
        for j in range(i):
            assert not torch.equal(heads[..., i, :], heads[..., j, :])


def test_added_value_embedding_is_outside_the_dropout(x):
    m = show_heads(build(VARIANTS["mhe_add"], dropout=0.9)).train()
    with torch.no_grad():
        m.w_v.weight.zero_()
        m.w_v.bias.zero_()
    assert torch.equal(m(x), m.e_v.flatten().expand(2, 5, 12))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_added_key_embedding_gets_a_zero_gradient_that_is_there(dropout, autocast):
    m, x = build(VARIANTS["mhe_add"], dtype=torch.float32, dropout=dropout).train(), torch.randn(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = m(x, is_causal=True)
    y.float().square().sum().backward()
    assert m.e_k.grad is not None
    assert torch.equal(m.e_k.grad, torch.zeros(4, 3))
    assert (m.e_q.grad != 0).any()
    assert (m.e_v.grad != 0).any()


def test_added_key_embedding_does_not_change_the_output(x):
    m = build(VARIANTS["mhe_add"])
    y = m(x)
    with torch.no_grad():
        m.e_k.normal_()
    assert torch.equal(m(x), y)


def train(combine, steps=50, dropout=0.0):
    """The module and its start, after AdamW on random data with no weight decay on the head embeddings."""
    m = MHE(width=12, n_heads=4, combine=combine, dropout=dropout)
    start = {k: p.detach().clone() for k, p in m.named_parameters()}
    embeddings = [p for k, p in m.named_parameters() if k.startswith("e_")]
    others = [p for k, p in m.named_parameters() if not k.startswith("e_")]
    optimizer = torch.optim.AdamW([{"params": embeddings, "weight_decay": 0.0}, {"params": others}], lr=1e-2)
    x, target = torch.randn(8, 6, 12), torch.randn(8, 6, 12)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (m(x, is_causal=True) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return m, start


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_leaves_the_added_key_embedding_alone(dropout):
    m, start = train("add", dropout=dropout)
    assert torch.equal(m.e_k, start["e_k"])
    assert not torch.equal(m.e_q, start["e_q"])
    assert not torch.equal(m.e_v, start["e_v"])


def test_training_moves_the_multiplying_key_embedding():
    m, start = train("multiply")
    for name in ("e_q", "e_k", "e_v"):
        assert (getattr(m, name) - start[name]).abs().max() > 1e-2, name


def test_float32_is_near_float64(variant, x):
    m = build(variant)
    y = m(x, is_causal=True)
    assert_near(m.float()(x.float(), is_causal=True).double(), y, 1e-6)
