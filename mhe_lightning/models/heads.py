"""What is predicted from a net's hidden states: masked tokens, a label of a sequence, a span of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mhe_lightning.models.layers import ACTIVATIONS, Activation, init_normal
from mhe_lightning.models.loss import linear_cross_entropy, token_scores

Pooling = Literal["first", "last", "mean"]


class MaskedTokenHead(nn.Module):
    """BERT's masked-token head: ``E norm(σ(W x)) + b``, where E are the net's token embeddings.

    Source: Devlin et al. 2019. E is the net's and is passed in, so that it is not this module's parameter.

    Args:
        width: model width D.
        vocab_size: number of tokens V.
        activation: σ.
        norm_eps: ε of the layer norm.
        loss_chunk: tokens whose logits are held at once.
    """

    def __init__(
        self,
        *,
        width: int,
        vocab_size: int,
        activation: Activation = "gelu",
        norm_eps: float = 1e-12,
        loss_chunk: int = 512,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.loss_chunk = loss_chunk
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        init_normal(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) → (..., D), to be multiplied with the token embeddings."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))

    def loss(self, hidden: Tensor, embeddings: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, summed; hidden (M, D) at the masked positions, embeddings (V, D), targets (M,)."""
        x = self(hidden)
        return linear_cross_entropy(x, embeddings, targets, bias=self.bias, chunk_size=self.loss_chunk)

    def scores(self, hidden: Tensor, embeddings: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each masked position the cross-entropy in nats (M,) and whether its token is the likeliest (M,)."""
        return token_scores(self(hidden), embeddings, targets, bias=self.bias, chunk_size=self.loss_chunk)


class SequenceHead(nn.Module):
    """Scores of a whole sequence: ``W dropout(tanh(W_p [pooled; spans]))``.

    With ``pooling="first"`` and no spans this is BERT's pooler and classifier (Devlin et al. 2019). A span is the mean
    of its tokens' hidden states, concatenated to the pooled state as in SuperGLUE's baselines (Wang et al. 2019).

    Args:
        width: model width D.
        n_labels: numbers per sequence: classes, or 1 for a value or the score of a choice.
        n_spans: spans per sequence that are looked at besides the pooled state.
        pooling: the hidden state of the "first" token ([CLS]), of the "last" real one (decoders, where the first sees
            nothing but itself), or the "mean" over real tokens.
        dropout: probability of dropping a number of the pooled state, in training.

    Raises:
        ValueError: an unknown pooling.
    """

    def __init__(self, *, width: int, n_labels: int, n_spans: int = 0, pooling: Pooling, dropout: float) -> None:
        super().__init__()
        if pooling not in ("first", "last", "mean"):
            raise ValueError(f"pooling ({pooling!r}) must be 'first', 'last' or 'mean'")
        self.pooling = pooling
        self.n_spans = n_spans
        self.dense = nn.Linear(width * (1 + n_spans), width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, n_labels)
        init_normal(self)

    def forward(self, hidden: Tensor, padding: Tensor | None = None, spans: Tensor | None = None) -> Tensor:
        """(B, T, D) → (B, n_labels).

        Args:
            hidden: the net's hidden states.
            padding: (B, T) boolean, True = a real token.
            spans: (B, n_spans, 2), first token and one past the last of each span.
        """
        pooled = [self._pool(hidden, padding)]
        if self.n_spans:
            assert spans is not None
            pooled += [_mean(hidden, _within(span, hidden.shape[1])) for span in spans.unbind(1)]
        return self.classifier(self.dropout(torch.tanh(self.dense(torch.cat(pooled, -1)))))

    def _pool(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        if self.pooling == "first":
            return hidden[:, 0]
        if padding is None:
            return hidden[:, -1] if self.pooling == "last" else hidden.mean(1)
        if self.pooling == "mean":
            return _mean(hidden, padding)
        return hidden[torch.arange(len(hidden), device=hidden.device), padding.sum(1) - 1]


class SpanHead(nn.Module):
    """Logits of each token to be the first and the last of an answer: ``W x`` (Devlin et al. 2019, SQuAD).

    Args:
        width: model width D.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, 2)
        init_normal(self)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) → start logits (B, T), end logits (B, T)."""
        start, end = self.classifier(hidden).unbind(-1)
        return start, end


def _within(span: Tensor, length: int) -> Tensor:
    """(B, 2) first and one past the last → (B, T) boolean."""
    index = torch.arange(length, device=span.device)
    return (index >= span[:, :1]) & (index < span[:, 1:])


def _mean(hidden: Tensor, kept: Tensor) -> Tensor:
    """Mean of hidden (B, T, D) over the positions that are kept (B, T)."""
    weights = kept.to(hidden.dtype)
    return torch.einsum("btd,bt->bd", hidden, weights / weights.sum(1, keepdim=True))
