"""A net with multi-head attention as one with a leaner attention that does, as nearly as it can, the same.

1. `convert_net` goes through the net block by block. Each attention is measured on what it sees of calibration texts
   after all blocks before it have been converted.
2. `solve` finds the new attention's projections from the old one's products ``W_Q W_Kᵀ`` and ``W_V W_O``, in the metric
   of these data. What it does depends on the new attention's class.
3. `fit_output` solves for ``W_O`` and its bias by least squares, so that the outputs are nearest to the old ones with
   the attention as it is now.

Nothing is trained. Everything but the attentions is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhe_lightning.attention import MHA, Attention
from mhe_lightning.interop.calibration import (
    AttentionInput,
    after,
    first_calls,
    inputs_of,
    measure,
    real_queries,
    stages_of,
)
from mhe_lightning.interop.solving import RIDGE, output_bias_of, problem_of, set_linear, share, solve
from mhe_lightning.models.layers import Block
from mhe_lightning.text_batches import TokenBatch, attentions_of

Progress = Callable[["LayerReport"], None]


@dataclass(frozen=True)
class LayerReport:
    """How near one attention has come to the one that it replaces, on the calibration's real tokens.

    All errors are squared, as shares of what there is: 0 is equal.

    Args:
        place: "self", or "encoder", "decoder" or "cross".
        layer: from 0.
        scores: of the scores' products, in the metric of queries and keys.
        values: of the value-output products, in the metric of the attended states.
        output: of the sublayer's output before W_O is fitted, as a share of its variance.
        fitted: the same, after.
        seconds: for measuring, solving and fitting.
    """

    place: str
    layer: int
    scores: float
    values: float
    output: float
    fitted: float
    seconds: float


@torch.no_grad()
def convert_net(
    source: nn.Module,
    target: nn.Module,
    batches: Sequence[TokenBatch],
    *,
    ridge: float = RIDGE,
    sequential: bool = True,
    fit: bool = True,
    progress: Progress | None = None,
) -> list[LayerReport]:
    """Give ``target`` the weights of ``source``, and attentions that come near to its own, in place.

    Args:
        source: a `Decoder`, `Encoder` or `EncoderDecoder` with MHA everywhere; in eval mode.
        target: a net of the same sizes, in eval mode, with other attentions; the same dtype and device (the CPU).
        batches: what the attentions are measured on.
        ridge: see `RIDGE`.
        sequential: measure on the inputs that the converted blocks before give, as in GPTQ (Frantar et al. 2023), not
            on those of ``source``.
        fit: solve for W_O on the data.
        progress: is told of every attention when it is done.

    Raises:
        ValueError: an attention of ``source`` is not MHA, one of ``target`` cannot be made from it, the nets do not
            fit, or there are no batches.
    """
    _check(source, target, batches, ridge)
    copied = {k: v for k, v in source.state_dict().items() if ".attention." not in k and ".cross_attention." not in k}
    target.load_state_dict(copied, strict=False)
    reports = []
    for ours, theirs in zip(stages_of(target), stages_of(source), strict=True):
        real = list(real_queries(batches, ours.place))
        calls, calls_there = (
            first_calls(target, ours.blocks[0], batches),
            first_calls(source, theirs.blocks[0], batches),
        )
        for layer, (block, block_there) in enumerate(zip(ours.blocks, theirs.blocks, strict=True)):
            for name, place in _attentions_in(block, ours.place):
                begun = time.perf_counter()
                new, old = getattr(block, name), getattr(block_there, name)
                there = inputs_of(old, block_there, calls_there, real)
                here = inputs_of(new, block, calls, real)
                errors = convert_attention(old, new, there, here if sequential else there, here, ridge=ridge, fit=fit)
                reports.append(LayerReport(place, layer, *errors, time.perf_counter() - begun))
                if progress is not None:
                    progress(reports[-1])
            calls, calls_there = after(block, calls), after(block_there, calls_there)
    return reports


def convert_attention(
    old: MHA,
    new: Attention,
    there: Sequence[AttentionInput],
    measured: Sequence[AttentionInput],
    here: Sequence[AttentionInput],
    *,
    ridge: float,
    fit: bool,
) -> tuple[float, float, float, float]:
    """Convert one attention in place.

    Args:
        old: the MHA.
        new: what it becomes.
        there: what ``old`` is called with in its net.
        measured: what the moments are taken of.
        here: what ``new`` is called with in its net.
        ridge: see `RIDGE`.
        fit: solve for W_O on the data.

    Returns:
        ``scores``, ``values``, ``output`` and ``fitted`` of a `LayerReport`.
    """
    problem = problem_of(old, measure(old, measured), ridge)
    solution = solve(new, problem)
    bias = output_bias_of(old) + solution.output_bias(problem)
    blocks = solution.outputs.flatten(0, 1).T  # (D, n·d)
    if new.w_o.bias is None and bias.abs().max() > 0:
        bias = torch.zeros_like(bias)  # nothing to put it into
    set_linear(new.w_o, blocks, bias)
    wanted = [one.output(old) for one in there]
    before = output_error(new, here, wanted)
    if fit:
        fit_output(new, here, wanted, ridge)
    return *solution.errors(problem), before, output_error(new, here, wanted)


def fit_output(attention: Attention, inputs: Sequence[AttentionInput], wanted: Sequence[Tensor], ridge: float) -> None:
    """Set W_O and its bias to those nearest to ``wanted`` outputs, by least squares with a ridge around what they are.

    Args:
        attention: with no embeddings on its heads' outputs.
        inputs: what it is called with.
        wanted: (N, D) for each, of the real queries.
        ridge: share of the heads' mean square; the bias has none.
    """
    w_o = attention.w_o
    width, biased = attention.width, w_o.bias is not None
    gram = torch.zeros(width + biased, width + biased, dtype=torch.float64)
    towards = torch.zeros(width + biased, width, dtype=torch.float64)
    for one, output in zip(inputs, wanted, strict=True):
        heads = one.heads(attention)  # (N, n·d)
        heads = nn.functional.pad(heads, (0, int(biased)), value=1.0)
        gram += (heads.T @ heads).double()
        towards += (heads.T @ output).double()
    old = w_o.weight.double().T
    if w_o.bias is not None:
        old = torch.cat([old, w_o.bias.double()[None]])
    weight = torch.full((len(gram),), ridge * float(gram.diagonal()[:width].mean()), dtype=torch.float64)
    weight[width:] = 0.0
    found = torch.linalg.solve(gram + weight.diag(), towards + weight[:, None] * old)
    set_linear(w_o, found[:width].T, found[-1])


def output_error(attention: Attention, inputs: Sequence[AttentionInput], wanted: Sequence[Tensor]) -> float:
    """Squared error of the outputs as a share of the variance of the wanted ones."""
    mean = torch.cat([*wanted]).double().mean(0)
    wrong = right = 0.0
    for one, output in zip(inputs, wanted, strict=True):
        wrong += float((one.output(attention) - output).double().square().sum())
        right += float((output.double() - mean).square().sum())
    return share(wrong, right)


def _attentions_in(block: Block, place: str) -> list[tuple[str, str]]:
    """The attentions of a block in the order in which they run: attribute and place."""
    own = [("attention", place)]
    return [*own, ("cross_attention", "cross")] if hasattr(block, "cross_attention") else own


def _check(source: nn.Module, target: nn.Module, batches: Sequence[TokenBatch], ridge: float) -> None:
    if not batches:
        raise ValueError("there are no batches to calibrate with; give at least one text")
    if ridge < 0:
        raise ValueError(f"ridge ({ridge}) must not be negative; {RIDGE} is the default")
    ours, theirs = attentions_of(target), attentions_of(source)
    for (place, layer), attention in theirs.items():
        if type(attention) is not MHA:
            raise ValueError(
                f"the {place} attention of layer {layer} is {type(attention).__name__}; only MHA can be converted"
            )
    if type(source) is not type(target) or ours.keys() != theirs.keys():
        raise ValueError(
            f"a {type(source).__name__} with {len(theirs)} attentions cannot become a {type(target).__name__} with "
            f"{len(ours)}; let them differ in their attentions alone"
        )
