"""The heads against plain torch: masked tokens, scores of a sequence, spans of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mhe_lightning.models.heads import MaskedTokenHead, SequenceHead, SpanHead

WIDTH, VOCABULARY = 6, 11


def of_size_one(head: nn.Module) -> nn.Module:
    """The head in float64, its biases and norms drawn too, so that they matter."""
    head.double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def draw(*shape: int, seed=1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)


# Masked tokens


def masked_tokens(chunk: int = 512) -> tuple[MaskedTokenHead, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head, hidden states (M, D), embeddings (V, D) and targets (M,)."""
    torch.manual_seed(0)
    head = of_size_one(MaskedTokenHead(width=WIDTH, vocab_size=VOCABULARY, loss_chunk=chunk))
    hidden, embeddings = draw(13, WIDTH).requires_grad_(), draw(VOCABULARY, WIDTH, seed=2).requires_grad_()
    return head, hidden, embeddings, torch.randint(VOCABULARY, (13,))


def literal_logits(head: MaskedTokenHead, hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """E norm(gelu(W x)) + b, with all logits at once."""
    x = F.gelu(hidden @ head.dense.weight.T + head.dense.bias)
    x = F.layer_norm(x, (WIDTH,), head.norm.weight, head.norm.bias, eps=1e-12)
    return x @ embeddings.T + head.bias


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy_on_all_logits(chunk):
    head, hidden, embeddings, targets = masked_tokens(chunk)
    inputs = {"hidden": hidden, "embeddings": embeddings, **dict(head.named_parameters())}
    assert {"dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias"} < set(inputs)
    loss = head.loss(hidden, embeddings, targets)
    wanted = F.cross_entropy(literal_logits(head, hidden, embeddings), targets, reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0.0)
    found, expected = (torch.autograd.grad(value, list(inputs.values())) for value in (loss, wanted))
    for name, gradient, reference in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_scores_are_each_tokens_loss_and_whether_it_is_the_likeliest(chunk):
    head, hidden, embeddings, targets = masked_tokens(chunk)
    logits = literal_logits(head, hidden, embeddings)
    targets[::2] = logits.argmax(-1)[::2]
    losses, hits = head.scores(hidden, embeddings, targets)
    assert_same(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(hits, logits.argmax(-1) == targets)
    assert 0 < hits.sum() < len(hits)  # both kinds are there


def test_no_masked_token_is_a_loss_of_zero_and_no_scores():
    head, hidden, embeddings, targets = masked_tokens()
    assert head.loss(hidden[:0], embeddings, targets[:0]).item() == 0.0
    assert [len(scores) for scores in head.scores(hidden[:0], embeddings, targets[:0])] == [0, 0]


def test_the_embeddings_are_not_the_heads_own():
    head = MaskedTokenHead(width=WIDTH, vocab_size=VOCABULARY)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "bias": (VOCABULARY,),
        "dense.weight": (WIDTH, WIDTH),
        "dense.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }


# Scores of a sequence


def sequence_head(pooling: str, **settings) -> SequenceHead:
    torch.manual_seed(0)
    return of_size_one(SequenceHead(width=WIDTH, n_labels=3, pooling=pooling, dropout=0.1, **settings))


def literal_scores(head: SequenceHead, *pooled: torch.Tensor) -> torch.Tensor:
    return head.classifier(torch.tanh(head.dense(torch.cat(pooled, -1))))


@pytest.mark.parametrize(
    ("pooling", "pool"), [("first", lambda x: x[:, 0]), ("last", lambda x: x[:, -1]), ("mean", lambda x: x.mean(1))]
)
def test_scores_are_those_of_the_pooled_state(pooling, pool):
    head, hidden = sequence_head(pooling), draw(4, 5, WIDTH)
    assert_same(head(hidden), literal_scores(head, pool(hidden)))
    assert head(hidden).shape == (4, 3)


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_a_padded_row_is_pooled_as_if_unpadded(pooling):
    head, hidden = sequence_head(pooling), draw(4, 7, WIDTH)
    lengths = [7, 4, 1, 6]
    scores = head(hidden, padding=torch.arange(7) < torch.tensor(lengths)[:, None])
    for row, n in enumerate(lengths):
        assert_same(scores[row], head(hidden[row : row + 1, :n])[0])


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_spans_are_the_means_of_their_tokens_in_order(pooling):
    head, hidden = sequence_head(pooling, n_spans=2), draw(2, 7, WIDTH)
    padding = torch.arange(7) < torch.tensor([[7], [5]])
    spans = torch.tensor([[[0, 3], [6, 7]], [[2, 5], [1, 2]]])
    scores = head(hidden, padding=padding, spans=spans)
    for row, n in enumerate((7, 5)):
        pooled = {"first": hidden[row, 0], "last": hidden[row, n - 1], "mean": hidden[row, :n].mean(0)}[pooling]
        means = [hidden[row, start:stop].mean(0) for start, stop in spans[row].tolist()]
        assert_same(scores[row], literal_scores(head, pooled, *means))


def test_the_pooled_state_is_dropped_in_training_only():
    head, hidden = sequence_head("first"), draw(64, 5, WIDTH)
    assert torch.equal(head(hidden), head(hidden))
    head.train()
    assert not torch.equal(head(hidden), head(hidden))


def test_an_unknown_pooling_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"pooling \('max'\) must be 'first', 'last' or 'mean'"):
        SequenceHead(width=WIDTH, n_labels=2, pooling="max", dropout=0.0)


# Spans of a sequence


def test_every_token_has_a_start_and_an_end_logit():
    head, hidden = of_size_one(SpanHead(width=WIDTH)), draw(4, 7, WIDTH)
    start, end = head(hidden)
    assert start.shape == end.shape == (4, 7)
    weight, bias = head.classifier.weight, head.classifier.bias
    assert_same(start, hidden @ weight[0] + bias[0])
    assert_same(end, hidden @ weight[1] + bias[1])


# Initialisation


@pytest.mark.parametrize(
    "head",
    [
        MaskedTokenHead(width=128, vocab_size=50),
        SequenceHead(width=128, n_labels=50, n_spans=1, pooling="first", dropout=0.1),
        SpanHead(width=128),
    ],
    ids=lambda head: type(head).__name__,
)
def test_initial_numbers(head):
    for key, parameter in head.named_parameters():
        if "norm" in key:
            assert torch.equal(parameter, torch.full_like(parameter, float(key.endswith("weight")))), key
        elif key.endswith("bias"):
            assert not parameter.any(), key
        else:
            # six standard errors of a standard deviation, estimated from so many numbers
            assert abs(parameter.std().item() - 0.02) < 6 * 0.02 / (2 * parameter.numel()) ** 0.5, key
