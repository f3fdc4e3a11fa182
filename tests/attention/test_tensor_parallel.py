"""Attention and blocks whose heads are divided among processes compute what one process does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor

from attention.oracle import VARIANTS
from mhe_lightning.attention import GQA, MHA, MQA, SHA
from mhe_lightning.models.layers import CrossBlock, FeedForward
from processes import group
from saved import saved_storages


class OneProcess:
    """Stands for a mesh where its size alone is asked for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def blocks(variant):
    """A block with self- and cross-attention, and the same one divided among two processes."""
    torch.manual_seed(0)
    make = {"attention": variant.build(width=16, n_heads=4), "cross_attention": variant.build(width=16, n_heads=4)}
    feed_forward = FeedForward(width=16, hidden=32, activation="gelu")
    whole = CrossBlock(**make, feed_forward=feed_forward, width=16, dropout=0.0, norm_eps=1e-5).double()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():  # nothing that starts as zeros or ones hides a mistake
            parameter.add_(torch.randn_like(parameter) * 0.3)
            assert parameter.is_floating_point(), name
    divided = copy.deepcopy(whole)
    divided.parallelize(init_device_mesh("cpu", (2,)))
    return whole, divided


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_both(variant):
    whole, divided = blocks(variant)
    x, source = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:, None, None]
    found = []
    for block in (whole, divided):
        inputs = [t.clone().requires_grad_() for t in (x, source)]
        output = block(*inputs, mask)
        output.square().sum().backward()
        gradients = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            for name, p in block.named_parameters()
        }
        found.append({"output": output.detach(), "x": inputs[0].grad, "source": inputs[1].grad, **gradients})
    differences = {name: float((found[0][name] - found[1][name]).abs().max()) for name in found[0]}
    split = [name for name, p in divided.named_parameters() if isinstance(p, DTensor)]
    own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in divided.parameters())
    return differences, split, own


@pytest.mark.distributed
def test_two_processes_give_the_outputs_and_gradients_of_one(variant):
    for differences, split, own in group(run_both, 2, variant):
        assert max(differences.values()) < 1e-12, differences
        assert "feed_forward.w_1.weight" in split
        assert "feed_forward.w_2.bias" not in split
        assert own < sum(p.numel() for p in blocks_of(variant).parameters())


def blocks_of(variant) -> CrossBlock:
    return CrossBlock(
        attention=variant.build(width=16, n_heads=4),
        cross_attention=variant.build(width=16, n_heads=4),
        feed_forward=FeedForward(width=16, hidden=32, activation="gelu"),
        width=16,
        dropout=0.0,
        norm_eps=1e-5,
    )


SHARED = {"mhe_add": {"w_q", "w_k", "w_v"}, "mhe_multiply": {"w_q", "w_k", "w_v"}, "mqa": {"w_k", "w_v"}}


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in VARIANTS if name in SHARED])
def test_what_all_heads_share_is_whole_on_every_process(name):
    for _, split, _ in group(run_both, 2, VARIANTS[name]):
        for projection in SHARED[name]:
            assert f"attention.{projection}.weight" not in split
        assert "attention.w_o.weight" in split
        assert ("attention.e_q" in split) == name.startswith("mhe")


def kept_by_a_divided_feed_forward_net():
    """Bytes in each storage that is kept for the backward pass."""
    net = FeedForward(width=4, hidden=64, activation="gelu")
    net.parallelize(init_device_mesh("cpu", (2,)))
    return list(saved_storages(lambda: net(torch.randn(8, 4, requires_grad=True))).values())


@pytest.mark.distributed
def test_of_divided_hidden_units_only_what_goes_into_the_activation_is_kept():
    for kept in group(kept_by_a_divided_feed_forward_net, 2):
        assert kept.count(4 * 8 * 32) == 1


@pytest.mark.parametrize(
    ("attention", "size", "message"),
    [
        (MHA(width=16, n_heads=4), 3, r"n_heads \(4\) must be a multiple of tensor_parallel \(3\)"),
        (GQA(width=16, n_heads=4, n_kv_heads=2), 4, r"n_kv_heads \(2\) must be a multiple of tensor_parallel \(4\)"),
        (MQA(width=16, n_heads=4, dropout=0.1), 2, r"dropout \(0.1\) .* must be 0 with tensor_parallel"),
        (FeedForward(width=16, hidden=30, activation="gelu"), 4, r"feed-forward width \(30\) must be a multiple"),
    ],
)
def test_what_cannot_be_divided_is_refused(attention, size, message):
    before = {name: p.shape for name, p in attention.named_parameters()}

    with pytest.raises(ValueError, match=message):
        attention.parallelize(OneProcess(size))

    assert {name: p.shape for name, p in attention.named_parameters()} == before


def test_one_head_is_not_divided():
    attention = SHA(width=16, n_heads=4, dropout=0.1)
    attention.parallelize(OneProcess(2))
    assert attention.mesh is None
