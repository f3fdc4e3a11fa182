"""What a step needs, found without numbers, against what torch counts when the step is really done."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode

from attention.oracle import VARIANTS
from mhe_lightning.attention import MHA, Attention
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.models.loss import IGNORE
from mhe_lightning.planning import FLOPS_DEPTHS, MEMORY_DEPTHS
from mhe_lightning.tasks import (
    ExtractiveQuestionAnswering,
    LanguageModeling,
    MaskedLanguageModeling,
    SequenceClassification,
    Translation,
)
from mhe_lightning.tracing import Step, of_depth
from saved import saved_storages

V, B, T, S, N, D = 29, 3, 10, 7, 4, 12  # N heads of 3
SIZES = {"width": D, "n_heads": N, "n_layers": 2, "max_length": 16, "dropout": 0.1}


def tokens(length: int) -> torch.Tensor:
    return torch.randint(V, (B, length))


def rows() -> torch.Tensor:
    return torch.arange(B)


def decoder_task(attention, sizes, settings):
    net = Decoder(V, attention, loss_chunk=8, **sizes)  # the last chunk is not full
    return LanguageModeling(net, max_steps=1, **settings)


def decoder_batch():
    return {"tokens": tokens(T), "targets": tokens(T), "rows": rows()}


def masked_task(attention, sizes, settings):
    return MaskedLanguageModeling(Encoder(V, attention, **sizes), max_steps=1, **settings)


def masked_batch():
    targets = torch.full((B, T), IGNORE)
    targets[:, 2:5] = tokens(3)
    return {"tokens": tokens(T), "targets": targets, "segments": torch.zeros(B, T, dtype=torch.long), "rows": rows()}


def class_task(attention, sizes, settings):
    data = {"problem": "classes", "n_labels": 3, "n_spans": 0, "metrics": ["accuracy"]}
    return SequenceClassification(Encoder(V, attention, **sizes), max_steps=1, **data, **settings)


def class_batch():
    labels = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)
    return {"tokens": tokens(T), "padding": torch.ones(B, T, dtype=torch.bool), "labels": labels, "rows": rows()}


def question_task(attention, sizes, settings):
    net = Encoder(V, attention, **sizes)
    return ExtractiveQuestionAnswering(net, max_steps=1, unanswerable=False, **settings)


def question_batch():
    padding = torch.ones(B, T, dtype=torch.bool)
    start, end = torch.tensor([1, 2, 3]), torch.tensor([2, 4, 5])
    return {"tokens": tokens(T), "padding": padding, "starts": start, "ends": end, "rows": rows()}


def translation_task(attention, sizes, settings):
    net = EncoderDecoder(V, attention, loss_chunk=8, **sizes)
    tokenizer = Tokenizer(models.BPE())
    return Translation(net, max_steps=1, tokenizer=tokenizer, end_token=0, **settings)


def translation_batch():
    return {"tokens": tokens(S), "target_tokens": tokens(T), "targets": tokens(T), "rows": rows()}


def own(n):
    """Heads, queries and keys of each self-attention of two layers."""
    return [(n, T, T)] * 2


TASKS = {  # task, batch, and the attention sublayers as (heads, queries, keys)
    "decoder": (decoder_task, decoder_batch, own),
    "masked": (masked_task, masked_batch, own),
    "classes": (class_task, class_batch, own),
    "question": (question_task, question_batch, own),
    "translation": (translation_task, translation_batch, lambda n: [(n, S, S), (n, T, T), (n, T, S)] * 2),
}
CASES = [("decoder", name) for name in VARIANTS] + [
    (task, name) for task in TASKS if task != "decoder" for name in ("mha", "mhe_add", "sha")
]
every_case = pytest.mark.parametrize(("kind", "variant"), CASES)
with_and_without_checkpointing = pytest.mark.parametrize("checkpointing", [False, True])


def step_of(kind, variant="mha", *, attention_dropout=0.0, checkpointing=False, n_layers=2, **settings) -> Step:
    torch.manual_seed(0)
    make, batch, _ = TASKS[kind]
    attention = partial(VARIANTS[variant].build, dropout=attention_dropout)
    sizes = {**SIZES, "n_layers": n_layers}
    return Step(partial(make, attention, sizes, {"activation_checkpointing": checkpointing}), batch(), **settings)


def real_task(step: Step):
    task = step.make_task().train()
    task.configure_model()
    return task


def plainly_counted(step: Step) -> tuple[int, int]:
    """Operations that torch itself counts, forward and training, in a step with numbers."""
    task = real_task(step)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        task.training_step(step.batch, 0)
    with FlopCounterMode(display=False) as training:
        task.training_step(step.batch, 0).backward()
    return forward.get_total_flops(), training.get_total_flops()


@every_case
@with_and_without_checkpointing
def test_flops_are_those_of_a_real_step_with_attention_dropout(kind, variant, checkpointing):
    step = step_of(kind, variant, attention_dropout=0.1, checkpointing=checkpointing)
    assert step.flops() == plainly_counted(step)


@every_case
@with_and_without_checkpointing
def test_flops_are_those_of_a_real_step_and_of_its_attention_kernels(kind, variant, checkpointing):
    step = step_of(kind, variant, checkpointing=checkpointing)
    forward, training = plainly_counted(step)
    heads = {"sha": 1, "mhe_add_shared_scores": 0}.get(variant, N)  # shared scores are an operator that torch counts
    products = [n * queries * keys * B * (D // N) for n, queries, keys in TASKS[kind][2](heads)]
    recomputed = 2 if checkpointing else 1
    # two products forward, five backward, two operations for a multiply–add; torch's own counter has none of them
    assert step.flops() == (forward + 4 * sum(products), training + (4 * recomputed + 10) * sum(products))


def test_flops_of_a_decoder_by_hand():
    L, ff, tokens = 2, 4 * D, B * T
    projections = 4 * D * D
    feed_forward = 2 * D * ff
    scores_and_sums = 2 * T * D  # N heads of D / N numbers, T keys
    logits = D * V
    forward = 2 * tokens * (L * (projections + scores_and_sums + feed_forward) + logits)
    # two products backward for one forward; scores are computed again
    training = 2 * tokens * (L * (3 * projections + 3.5 * scores_and_sums + 3 * feed_forward) + 3 * logits)
    assert step_of("decoder").flops() == (forward, training)


def test_a_gpu_has_the_operations_of_dropout_in_its_kernel():
    dropping, plain = step_of("decoder", attention_dropout=0.1, as_on_gpu=True), step_of("decoder")
    assert dropping.flops() == plain.flops()
    assert dropping.memory() == plain.memory()


# Memory


def really_kept(step: Step) -> int:
    """Bytes of what autograd saves in a real forward pass, each storage once; weights and the batch left out."""
    task = real_task(step)
    known = {p.untyped_storage().data_ptr() for p in [*task.parameters(), *task.buffers()]}
    known |= {value.untyped_storage().data_ptr() for value in step.batch.values() if isinstance(value, torch.Tensor)}
    saved = saved_storages(lambda: task.training_step(step.batch, 0))
    return sum(nbytes for address, nbytes in saved.items() if address not in known)


@pytest.mark.parametrize(("kind", "variant"), [("decoder", name) for name in VARIANTS] + [("translation", "mha")])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_each_layer_keeps_what_autograd_saves_in_a_real_one(kind, variant, attention_dropout):
    steps = [step_of(kind, variant, attention_dropout=attention_dropout, n_layers=n) for n in (2, 3, 4)]
    kept = [step.memory().kept for step in steps]
    saved = [really_kept(step) for step in steps]
    assert kept[2] - kept[1] == kept[1] - kept[0] == saved[1] - saved[0] == saved[2] - saved[1] > 0


def test_with_checkpointing_a_layer_keeps_its_input_alone():
    def kept(n_layers: int) -> int:
        return step_of("decoder", checkpointing=True, n_layers=n_layers).memory().kept

    states = torch.empty(0).new_empty(B, T, D).nbytes
    assert kept(4) - kept(3) == kept(3) - kept(2) == states


def test_memory_in_double_precision_is_twice_that_of_floating_point_numbers():
    single, double = (step_of("decoder", dtype=dtype).memory().forward for dtype in (torch.float32, torch.float64))
    assert 1.7 * single < double <= 2 * single  # masks and token ids are as large as before


def test_gradients_of_an_earlier_micro_batch_are_not_counted():
    first, later = step_of("decoder"), step_of("decoder", accumulating=True)
    parameters = sum(p.nbytes for p in real_task(first).parameters())
    assert 0 < first.memory().peak - later.memory().peak <= parameters
    assert first.memory().kept == later.memory().kept


@pytest.mark.parametrize("variant", ["mha", "mhe_add"])
@pytest.mark.parametrize("accumulating", [False, True])
@with_and_without_checkpointing
def test_a_deep_net_follows_from_two_shallow_ones(variant, accumulating, checkpointing):
    def step(depth: int) -> Step:
        return step_of("decoder", variant, checkpointing=checkpointing, n_layers=depth, accumulating=accumulating)

    assert of_depth(9, FLOPS_DEPTHS, lambda depth: step(depth).flops()) == step(9).flops()
    found, traced = of_depth(9, MEMORY_DEPTHS, lambda depth: step(depth).memory()), step(9).memory()
    assert (found.kept, found.forward, found.peak) == (traced.kept, traced.forward, traced.peak)


def test_a_net_of_few_layers_is_counted_itself():
    assert of_depth(3, (5, 6), lambda depth: step_of("decoder", n_layers=depth).flops()) == (
        step_of("decoder", n_layers=3).flops()
    )


def test_a_step_that_depends_on_numbers_is_refused_and_says_what_can_be_planned():
    class Peeks(LanguageModeling):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 2 if loss.item() > 1 else loss

    step = replace(step_of("decoder"), make_task=lambda: Peeks(Decoder(V, MHA, **SIZES), max_steps=1))
    for count in (step.flops, step.memory):
        with pytest.raises(ValueError, match=r"step of Peeks cannot be followed .*--no_trace"):
            count()


def test_an_attention_of_a_users_own_is_counted():
    class Mean(Attention):
        """Every token gets the mean of all."""

        def forward(self, x, context=None, mask=None, is_causal=False, cache=None):
            return self.w_o(x.mean(1, keepdim=True).expand_as(x))

    step = replace(step_of("decoder"), make_task=lambda: LanguageModeling(Decoder(V, Mean, **SIZES), max_steps=1))
    assert step.flops() == plainly_counted(step)


def test_the_default_dtype_is_as_before():
    step_of("decoder", dtype=torch.float64).memory()
    assert torch.get_default_dtype() == torch.float32
