"""The learning rate, what decays, and what an optimizer step does."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from mhe_lightning.attention import MHA, MHE
from mhe_lightning.models import Decoder
from mhe_lightning.tasks import LanguageModeling
from mhe_lightning.tasks.base import learning_rate_schedule

VOCABULARY, LENGTH = 13, 8


def decoder(attention=MHE, **kwargs) -> Decoder:
    torch.manual_seed(0)
    settings = {"width": 8, "n_heads": 2, "n_layers": 2, "max_length": LENGTH, "dropout": 0.0, **kwargs}
    return Decoder(VOCABULARY, attention, **settings)


def task(net: nn.Module | None = None, **kwargs) -> LanguageModeling:
    return LanguageModeling(net or decoder(), **{"max_steps": 10, "lr": 0.01, **kwargs})


def fit(model: LanguageModeling, steps: int, *callbacks: Callback, **kwargs) -> Trainer:
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (4 * steps, LENGTH + 1))
    rows = [{"tokens": row[:-1], "targets": row[1:]} for row in tokens]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **kwargs,
    )
    trainer.fit(model, DataLoader(rows, batch_size=4))
    return trainer


# The learning rate


def test_cosine_rises_linearly_and_falls_to_its_end():
    rate = learning_rate_schedule("cosine", max_steps=14, warmup_steps=4, final_ratio=0.1)
    assert [rate(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for s in range(4, 14):
        assert rate(s) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (s - 4) / 9)) / 2, rel=1e-12)
    assert rate(13) == pytest.approx(0.1, rel=1e-12)  # the last step
    assert rate(1000) == pytest.approx(0.1, rel=1e-12)


def test_linear_falls_by_equal_steps():
    rate = learning_rate_schedule("linear", max_steps=7, warmup_steps=2, final_ratio=0.2)
    assert [rate(s) for s in range(8)] == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_inverse_square_root_continues_the_warm_up():
    rate = learning_rate_schedule("inverse_sqrt", max_steps=-1, warmup_steps=4, final_ratio=0.1)
    assert [rate(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [rate(s) for s in (4, 15, 399)] == pytest.approx([math.sqrt(4 / 5), 0.5, 0.1])
    without = learning_rate_schedule("inverse_sqrt", max_steps=-1, warmup_steps=0, final_ratio=0.1)
    assert [without(s) for s in (0, 3, 99)] == pytest.approx([1.0, 0.5, 0.1])


def test_constant_stays():
    rate = learning_rate_schedule("constant", max_steps=-1, warmup_steps=2, final_ratio=0.1)
    assert [rate(s) for s in (0, 1, 2, 10**6)] == [0.5, 1.0, 1.0, 1.0]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    schedule=st.sampled_from(["cosine", "linear", "inverse_sqrt", "constant"]),
    max_steps=st.integers(1, 200),
    warmup_steps=st.integers(0, 250),
    final_ratio=st.floats(0, 1),
)
def test_every_schedule_stays_in_range_rises_in_the_warm_up_and_never_after(
    schedule, max_steps, warmup_steps, final_ratio
):
    rate = learning_rate_schedule(schedule, max_steps=max_steps, warmup_steps=warmup_steps, final_ratio=final_ratio)
    rates = [rate(s) for s in range(max(max_steps, warmup_steps) + 20)]
    assert all(0 <= r <= 1 for r in rates)
    warm, after = rates[:warmup_steps], rates[warmup_steps:]
    assert all(a < b for a, b in pairwise(warm))
    assert warm == [] or (warm[0] > 0 and warm[-1] == 1)
    assert after[0] == 1 or schedule == "inverse_sqrt"
    assert all(b <= a + 1e-12 for a, b in pairwise(after))
    if schedule in ("cosine", "linear") and max_steps > warmup_steps + 1:
        assert rates[max_steps - 1] == pytest.approx(final_ratio, abs=1e-12)
        assert after[-1] == rates[max_steps - 1]


def test_a_warm_up_below_one_is_a_share_of_the_steps():
    share, steps = task(max_steps=40, warmup_steps=0.1), task(max_steps=40, warmup_steps=4)
    assert [share.learning_rate(s) for s in range(40)] == [steps.learning_rate(s) for s in range(40)]


def test_each_step_is_taken_at_its_rate():
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:  # after the step before it
            if trainer.global_step > len(self.seen):
                self.seen.append([group["lr"] for group in optimizer.param_groups])

        def on_train_end(self, trainer, pl_module) -> None:
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    rates = Rates()
    model = task(max_steps=6, warmup_steps=2)
    fit(model, 6, rates)
    expected = [0.01 * model.learning_rate(s) for s in range(6)]
    assert [group for group, _ in rates.seen] == pytest.approx(expected, rel=1e-12)
    assert all(a == b for a, b in rates.seen)


# What decays


def names(model: LanguageModeling) -> tuple[set[str], set[str]]:
    """The names of the parameters that decay, and of those that do not."""
    optimizer = model.configure_optimizers()
    by_id = {id(p): name for name, p in model.net.named_parameters()}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in optimizer.param_groups:
        found[group["weight_decay"] > 0] |= {by_id[id(p)] for p in group["params"]}
        assert group["weight_decay"] in (0.0, model.weight_decay)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(by_id)  # each once
    return found[True], found[False]


MATRICES = {
    f"blocks.{i}.{part}.weight"
    for i in range(2)
    for part in (*(f"attention.w_{x}" for x in "qkvo"), "feed_forward.w_1", "feed_forward.w_2")
}


@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_exactly_the_matrices_of_linear_layers_decay(combine):
    model = task(decoder(partial(MHE, combine=combine)))
    decayed, others = names(model)
    assert decayed == MATRICES
    assert decayed | others == {name for name, _ in model.net.named_parameters()}
    assert {f"blocks.1.attention.e_{x}" for x in "qkv"} <= others
    assert {"token_embedding.weight", "position_embedding.weight", "norm.weight", "norm.bias"} <= others
    assert {"blocks.0.norm_1.weight", "blocks.0.attention.w_q.bias", "blocks.0.feed_forward.w_2.bias"} <= others


def test_an_untied_output_projection_decays_and_a_tied_one_does_not():
    assert names(task(decoder(MHA)))[0] == MATRICES
    assert names(task(decoder(MHA, tie_embeddings=False)))[0] == MATRICES | {"head.weight"}


def test_further_parameters_decay_by_pattern():
    decayed, others = names(task(decay_also=["*.attention.e_[qv]", "norm.weight"]))
    further = {f"blocks.{i}.attention.e_{x}" for i in range(2) for x in "qv"} | {"norm.weight"}
    assert decayed == MATRICES | further
    assert {"blocks.0.attention.e_k", "blocks.0.norm_1.weight"} <= others


def test_decay_shrinks_a_matrix_without_gradient_and_nothing_else():
    model = task(decoder(MHA), weight_decay=0.5, schedule="constant")
    before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    optimizer = model.configure_optimizers()
    for p in model.net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.net.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 0.01 * 0.5 if name in MATRICES else 1.0))


def test_the_dead_key_embedding_is_never_moved():
    model = task(decoder(partial(MHE, combine="add", dropout=0.1), dropout=0.1), max_steps=12)
    before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    fit(model, 12, gradient_clip_val=1.0)
    for name, p in model.net.named_parameters():
        assert torch.equal(p, before[name]) == name.endswith("e_k"), name


def test_settings_of_this_run_win_over_those_of_a_resumed_optimizer():
    class OldSettings(Callback):
        """The optimizer as a checkpoint of a run with other settings restores it."""

        def on_fit_start(self, trainer, pl_module) -> None:
            for group in trainer.optimizers[0].param_groups:
                group.update(betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7, lr=7.0)

    trainer = fit(task(betas=(0.8, 0.9), eps=1e-7, weight_decay=0.2), 1, OldSettings())
    decayed, others = trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0.0)
    for group in (decayed, others):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.9), 1e-7, 0.01)


# What is refused


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("max_steps", [-1, 0])
def test_a_schedule_with_an_end_needs_max_steps(schedule, max_steps):
    with pytest.raises(ValueError, match=rf"'{schedule}' .* --trainer.max_steps \(now {max_steps}\)"):
        task(schedule=schedule, max_steps=max_steps)


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "constant"])
def test_a_schedule_without_end_does_not(schedule):
    assert task(schedule=schedule, max_steps=-1).learning_rate(0) == 1.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": 0.0}, r"lr \(0.0\)"),
        ({"lr": -1.0}, r"lr \(-1.0\)"),
        ({"weight_decay": -0.1}, r"weight_decay \(-0.1\)"),
        ({"warmup_steps": -1}, r"warmup_steps \(-1\)"),
        ({"warmup_steps": 1.5}, r"warmup_steps \(1.5\)"),
        ({"final_lr_ratio": 1.5}, r"final_lr_ratio \(1.5\)"),
        ({"schedule": "step"}, r"schedule \('step'\)"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        task(**settings)


def test_a_net_that_cannot_be_compiled_by_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks"):
        task(nn.Linear(2, 2), compile=True).configure_model()
