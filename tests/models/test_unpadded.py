"""An encoder that computes the real tokens of a padded batch alone gives what one that computes all of it gives."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from mhe_lightning.attention import GQA, MHA, MHE, MQA, SHA, SKV, ELAttention
from mhe_lightning.attention.unpadded import Unpadded
from mhe_lightning.distributed import MeshSizes, new_mesh, parallelize
from mhe_lightning.models import Encoder
from mhe_lightning.models.encoder import UNPAD_FROM
from processes import group

ATTENTIONS = {
    "mha": MHA,
    "gqa": partial(GQA, n_kv_heads=2),
    "skv": SKV,
    "mqa": MQA,
    "el": ELAttention,
    "mhe_add": partial(MHE, combine="add"),
    "mhe_mul": partial(MHE, combine="multiply"),
    "sha": SHA,
}
B, T, WIDTH = 4, 12, 16
LENGTHS = torch.tensor([12, 5, 7, 1])
PADDING = torch.arange(T) < LENGTHS[:, None]
REAL = PADDING.flatten().nonzero().flatten()


def encoder(attention=MHA, dtype: torch.dtype = torch.float64, **settings) -> Encoder:
    torch.manual_seed(0)
    net = Encoder(30, attention, width=WIDTH, n_heads=4, n_layers=2, max_length=T, dropout=0.0, **settings)
    return net.to(dtype)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "tokens": torch.randint(30, (B, T)),
        "segments": (torch.arange(T) >= 3).long().expand(B, T),
        "padding": PADDING,
    }


def hidden_and_gradients(net: Encoder, **inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Hidden states, and all gradients of a function of the real tokens' ones."""
    hidden = net(**inputs)
    torch.manual_seed(2)
    weights = torch.randn(B, T, WIDTH, dtype=hidden.dtype) * PADDING[:, :, None]
    if "kept" in inputs:
        weights = weights.flatten(0, 1)[inputs["kept"]]
    net.zero_grad()
    (hidden * weights).sum().backward()
    return hidden.detach(), [parameter.grad for parameter in net.parameters()]


def assert_same(net: Encoder, tolerance: float, **more: Tensor) -> None:
    inputs = {**batch(), **more}
    (padded, gradients), (unpadded, found) = (
        hidden_and_gradients(net, **inputs, **places) for places in ({}, {"real": REAL})
    )
    if "kept" not in inputs:
        padded, unpadded = padded[PADDING], unpadded[PADDING]
    torch.testing.assert_close(unpadded, padded, rtol=tolerance, atol=tolerance)
    for theirs, ours in zip(gradients, found, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, scale))


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_hidden_states_and_gradients_are_those_of_the_padded_batch(name, dtype, tolerance):
    assert_same(encoder(ATTENTIONS[name], dtype), tolerance)


def test_positions_that_are_kept_are_the_same_ones():
    assert_same(encoder(), 1e-12, kept=torch.tensor([2 * T + 6, 0, T + 4, 3 * T]))


def test_documents_are_kept_apart():
    assert_same(encoder(), 1e-12, documents=(torch.arange(T) >= 4).long().expand(B, T))


@pytest.mark.parametrize("recompute", [True, "selective"])
def test_recomputed_blocks_give_the_same(recompute):
    net = encoder()
    net.checkpoint_activations = recompute
    assert_same(net, 1e-12)


def test_compiled_blocks_take_batches_of_any_number_of_real_tokens():
    net = encoder()
    for block in net.blocks:
        block.compile(backend="aot_eager")
    assert_same(net, 1e-12)
    other = {**batch(), "padding": PADDING.flip(0)}
    places = other["padding"].flatten().nonzero().flatten()[:-1]
    other["padding"] = torch.zeros(B * T, dtype=torch.bool).index_fill(0, places, True).view(B, T)
    with torch.no_grad():
        expected, found = net(**other), net(**other, real=places)
    torch.testing.assert_close(found[other["padding"]], expected[other["padding"]], rtol=1e-12, atol=1e-12)


def test_hidden_states_are_zero_at_padding():
    hidden = encoder()(**batch(), real=REAL)
    assert not hidden[~PADDING].any()
    assert hidden[PADDING].any(-1).all()


def test_only_real_tokens_go_through_the_feed_forward_layers():
    seen = []
    net = encoder()
    for block in net.blocks:
        block.feed_forward.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    net(**batch(), real=REAL)
    assert seen == [(len(REAL), WIDTH)] * 2


def test_a_batch_with_little_padding_is_computed_whole():
    lengths = torch.full((B,), T)
    lengths[0] -= int(UNPAD_FROM * B * T)
    padding = torch.arange(T) < lengths[:, None]
    seen = []
    net = encoder()
    net.blocks[0].feed_forward.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    net(**{**batch(), "padding": padding}, real=padding.flatten().nonzero().flatten())
    assert seen == [(B, T, WIDTH)]


def test_attention_without_padding_needs_a_mask_and_no_context():
    attention = MHA(width=WIDTH, n_heads=4)
    rows, places = torch.randn(len(REAL), WIDTH), Unpadded(REAL, B, T)
    with pytest.raises(ValueError, match="with a mask that hides the padding's keys"):
        attention(rows, unpadded=places)
    with pytest.raises(ValueError, match="for self-attention without a cache"):
        attention(rows, context=rows[None], mask=PADDING[:, None, None], unpadded=places)
    with pytest.raises(ValueError, match=r"x has shape \(1, 25, 16\); with unpadded it must be \(M, D\)"):
        attention(rows[None], mask=PADDING[:, None, None], unpadded=places)


@pytest.mark.distributed
@pytest.mark.parametrize("sizes", [MeshSizes(1, 2, 1), MeshSizes(1, 1, 2)], ids=["sharded", "tensor parallel"])
def test_processes_that_share_a_model_take_real_tokens_alone(sizes):
    expected, gradients = hidden_and_gradients(encoder(MHE), **batch())
    for hidden, gradient in group(_shared, 2, sizes):
        torch.testing.assert_close(torch.from_numpy(hidden)[PADDING], expected[PADDING], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.from_numpy(gradient), gradients[0], rtol=1e-11, atol=1e-11)


def _shared(sizes: MeshSizes) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states, and the whole gradient of the token embeddings."""
    net = encoder(MHE)
    parallelize(net, new_mesh("cpu", sizes))
    hidden, gradients = hidden_and_gradients(net, **batch(), real=REAL)
    return hidden.numpy(), gradients[0].full_tensor().numpy()
