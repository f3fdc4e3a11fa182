"""Which tokens a masked language model must predict, and what it sees in their place."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from mhe_lightning.data.tokenizer import vocabulary_size

Ids = npt.NDArray[np.int64]

SEEN_AS_MASK, SEEN_AS_RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become [MASK] and a random token; the rest are seen as they are."""


class Masking:
    """BERT's masking: a share of a row's tokens is chosen; of these 80 % become [MASK], 10 % a random token.

    Special tokens are never chosen, nor drawn as random tokens. Source: Devlin et al. 2019; whole words as in the
    authors' later release: the chosen tokens are those of whole words.

    Args:
        tokenizer: its special tokens and, for whole words, its way of writing pieces of words ("##" of WordPiece,
            a leading space of byte-level BPE).
        share: share of the tokens that is chosen, in (0, 1); at least one token of a row.
        whole_words: choose all tokens of a word or none.

    Raises:
        ValueError: the share is out of range, or the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: Tokenizer, *, share: float = 0.15, whole_words: bool = False) -> None:
        if not 0 < share < 1:
            raise ValueError(f"mask_share ({share}) must be between 0 and 1; BERT's is 0.15")
        mask = mask_token_id(tokenizer)
        special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        size = vocabulary_size(tokenizer)
        self.mask = mask
        self.share = share
        self.special: npt.NDArray[np.bool_] = np.zeros(size, dtype=bool)
        self.special[list(special)] = True
        ids = set(tokenizer.get_vocab(with_added_tokens=True).values())  # there may be gaps
        self.ordinary: Ids = np.array(sorted(ids - special), dtype=np.int64)
        self.continues = _continues_a_word(tokenizer, size) if whole_words else None

    def __call__(self, tokens: Ids, key: list[int]) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """What is seen (T,) and which positions are to be predicted (T,): a function of the tokens and ``key`` alone.

        Args:
            tokens: (T,) token ids.
            key: up to 624 numbers in [0, 2³²) that the draw depends on.
        """
        draw = np.random.RandomState(key)  # its streams are frozen across numpy versions
        chosen = self._choose(tokens, draw)
        seen = tokens.copy()
        fate = draw.random_sample(len(tokens))
        drawn = self.ordinary[draw.randint(len(self.ordinary), size=len(tokens))]
        seen[chosen & (fate < SEEN_AS_MASK)] = self.mask
        random = chosen & (fate >= SEEN_AS_MASK) & (fate < SEEN_AS_MASK + SEEN_AS_RANDOM)
        seen[random] = drawn[random]
        return seen, chosen

    def _choose(self, tokens: Ids, draw: np.random.RandomState) -> npt.NDArray[np.bool_]:
        chosen = np.zeros(len(tokens), dtype=bool)
        candidates = np.flatnonzero(~self.special[tokens])
        if len(candidates) == 0:
            return chosen
        wanted = max(1, round(self.share * len(candidates)))
        if self.continues is None:
            chosen[draw.permutation(candidates)[:wanted]] = True
            return chosen
        begins = ~self.continues[tokens[candidates]]
        begins[0] = True
        begins[1:] |= np.diff(candidates) > 1  # a special token ends a word
        words = np.cumsum(begins) - 1
        sizes = np.bincount(words)
        order = draw.permutation(len(sizes))
        # BERT's: word by word, leaving out those that would make it too many; the first is taken in any case
        left = wanted
        for word in order:
            if sizes[word] <= left or left == wanted:
                chosen[candidates[words == word]] = True
                left -= int(sizes[word])
            if left <= 0:
                break
        return chosen


def mask_token_id(tokenizer: Tokenizer) -> int:
    """The id of ``[MASK]`` or ``<mask>``; ValueError if the vocabulary has neither."""
    for token in ("[MASK]", "<mask>"):
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return int(token_id)
    raise ValueError("the tokenizer has no mask token; use a wordpiece one, or add [MASK] to its special tokens")


def _continues_a_word(tokenizer: Tokenizer, size: int) -> npt.NDArray[np.bool_]:
    """For each token id whether it goes on with the word of the token before."""
    continues = np.zeros(size, dtype=bool)
    # asked of the model, since the vocabulary of a byte-level BPE may have a token ## too (Markdown's headings)
    mark = getattr(tokenizer.model, "continuing_subword_prefix", None)
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        continues[token_id] = token.startswith(mark) if mark else not token.startswith(("Ġ", "Ċ", "▁"))
    return continues
