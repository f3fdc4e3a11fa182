"""Text as any of the models reads it, and where their attentions are: for looking at trained nets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from torch import Tensor, nn

from mhe_lightning.attention import Attention
from mhe_lightning.data.examples import pad
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.translation import encode_sources, is_empty
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder, beam_search

CHARACTERS_PER_TOKEN = 16
"""More than a text has on average, so that a text cut by it still fills the rows asked for."""

Place = tuple[str, int]
"""Where an attention is, "self", "encoder", "decoder" or "cross", and the number of its layer."""


class TokenBatch(NamedTuple):
    """Input of a model, padded on the right.

    Args:
        tokens: (B, T) token ids; of an encoder-decoder, the sources.
        padding: (B, T) boolean, True = a real token; None where all are.
        target_tokens: (B, T') token ids that the decoder of an encoder-decoder reads, the start token first.
        target_padding: (B, T') boolean, True = a real token; None where all are.
    """

    tokens: Tensor
    padding: Tensor | None = None
    target_tokens: Tensor | None = None
    target_padding: Tensor | None = None


def attentions_of(net: nn.Module) -> dict[Place, Attention]:
    """The attention modules of a model by place and layer: "self", or "encoder", "decoder" and "cross".

    Raises:
        ValueError: it is none of this package's models.
    """
    if isinstance(net, EncoderDecoder):
        places: dict[str, list[Any]] = {
            "encoder": [block.attention for block in net.encoder_blocks],
            "decoder": [block.attention for block in net.decoder_blocks],
            "cross": [block.cross_attention for block in net.decoder_blocks],
        }
    elif isinstance(net, Decoder | Encoder):
        places = {"self": [block.attention for block in net.blocks]}
    else:
        raise ValueError(f"net is a {type(net).__name__}; it must be a Decoder, an Encoder or an EncoderDecoder")
    return {(place, layer): module for place, layers in places.items() for layer, module in enumerate(layers)}


def text_batches(
    net: nn.Module,
    tokenizer: Tokenizer,
    lines: Iterable[str],
    *,
    max_tokens: int = 4096,
    batch_size: int = 8,
    row_tokens: int | None = None,
) -> Iterator[TokenBatch]:
    """A text as the net reads it, in batches on its device.

    A decoder's and an encoder's rows are cut from the text as one stream; each row of an encoder stands between the
    start and the separator token, as far as the tokenizer has them. Of an encoder-decoder each line is a source, and
    its target the net's own greedy translation; lines without text are left out.

    Args:
        net: a `Decoder`, `Encoder` or `EncoderDecoder`.
        tokenizer: the net's.
        lines: the text, without ends of lines; no more of them are read than are needed.
        max_tokens: of the text, those of translations included; what comes after is left out. Of the last batch of
            lines none is cut.
        batch_size: rows per batch.
        row_tokens: most tokens of a row; as many as the net has positions for if not given.

    Raises:
        ValueError: there is too little text, a number is out of range, or the net is none of this package's models.
    """
    attentions_of(net)
    if max_tokens < 2:
        raise ValueError(f"max_tokens ({max_tokens}) must be at least 2; 4096 is the default")
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1")
    longest = int(net.max_length)  # type: ignore[arg-type]
    form = SequenceFormat(tokenizer, min(longest, row_tokens or longest))
    if isinstance(net, EncoderDecoder):
        return _translated_batches(net, form, lines, max_tokens, batch_size)
    return _stream_batches(net, form, lines, max_tokens, batch_size)


def _stream_batches(
    net: nn.Module, form: SequenceFormat, lines: Iterable[str], max_tokens: int, batch_size: int
) -> Iterator[TokenBatch]:
    tokens = form.encode([_beginning(lines, max_tokens * CHARACTERS_PER_TOKEN)])[0].ids[:max_tokens]
    before, after = (form.start, [form.end]) if isinstance(net, Encoder) else ([], [])
    room = form.max_length - len(before) - len(after)
    least = 1 if after else 2
    if len(tokens) < least:
        raise ValueError(f"the text has {len(tokens)} tokens; give one of at least {least}")
    rows = [[*before, *tokens[i : i + room], *after] for i in range(0, len(tokens), room)]
    for i in range(0, len(rows), batch_size):
        yield TokenBatch(*_on_device(net, rows[i : i + batch_size]))


def _beginning(lines: Iterable[str], characters: int) -> str:
    kept = []
    for line in lines:
        kept.append(line[:characters])
        characters -= len(line) + 1
        if characters <= 0:
            break
    text = "\n".join(kept)
    return text if text.strip() else ""


def _translated_batches(
    net: EncoderDecoder, form: SequenceFormat, lines: Iterable[str], max_tokens: int, batch_size: int
) -> Iterator[TokenBatch]:
    sentences = (line for line in lines if not is_empty(line))
    count = 0
    while count < max_tokens:
        some = list(islice(sentences, batch_size))
        if not some:
            break
        sources = [source.tokens for source in encode_sources(some, form)]
        tokens, padding = _on_device(net, sources)
        with in_eval(net):
            found = beam_search(net, tokens, padding, start_token=form.end, end_token=form.end, beam_size=1)
        targets = [[form.end, *best[0].tokens][: form.max_length] for best in found]
        target_tokens, target_padding = _on_device(net, targets)
        yield TokenBatch(tokens, padding, target_tokens, target_padding)
        count += sum(map(len, sources)) + sum(map(len, targets))
    if not count:
        raise ValueError("the text is empty; give at least one sentence to translate")


def _on_device(net: nn.Module, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    device = next(net.parameters()).device
    tokens, real = pad(rows)
    return tokens.to(device), None if real.all() else real.to(device)


@contextmanager
def in_eval(net: nn.Module) -> Iterator[None]:
    """The net is in eval mode meanwhile."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
