"""`translate`: standard input, line by line, with a trained encoder–decoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

from tokenizers import Tokenizer

from mhe_lightning.data.examples import pad
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.translation import encode_sources, is_empty
from mhe_lightning.errors import UserError
from mhe_lightning.loading import add_model_arguments, lines_of_stdin, load_trained
from mhe_lightning.models import EncoderDecoder
from mhe_lightning.models.search import check_search
from mhe_lightning.parsing import Parser, as_user_error
from mhe_lightning.tasks.translation import translate

SEARCH = ("beam_size", "length_penalty", "extra_tokens")
"""Options whose defaults are the settings of the run."""


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    try:
        if options.buffer_size < 1:
            raise UserError(f"buffer_size ({options.buffer_size}) must be at least 1")
        net, tokenizer, settings = load_trained(options, EncoderDecoder, "encoder-decoders translate")
        search = {name: settings[name] if options[name] is None else options[name] for name in SEARCH}
        search["n_best"] = options.n_best
        check_search(**search)
        lines = lines_of_stdin("a sentence per line, then Ctrl-D:")
        # someone at a terminal waits for each line; a file is sorted by length, as far as the buffer reaches
        size = 1 if sys.stdin.isatty() else options.buffer_size
        number = 0
        while some := list(islice(lines, size)):
            for found in _translated(net, tokenizer, some, number, options.batch_size, search):
                if options.n_best == 1:
                    print(found[0]["text"])
                else:
                    for best in found:
                        print(f"{number} ||| {best['text']} ||| {best['score']:.6f}")
                number += 1
            sys.stdout.flush()
    except ValueError as error:
        raise as_user_error(error) or error from error


def _translated(
    net: EncoderDecoder, tokenizer: Tokenizer, lines: list[str], first: int, batch_size: int, search: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """The best translations of each line, in the order of the lines, of which the first has the number ``first``."""
    form = SequenceFormat(tokenizer, net.max_length)
    sources = encode_sources(lines, form)
    for number, source in enumerate(sources, first + 1):
        if source.truncated:
            print(f"line {number} is cut to {net.max_length} tokens, the model's max_length", file=sys.stderr)
    longest_first = sorted(range(len(lines)), key=lambda i: -len(sources[i].tokens))
    device = net.token_embedding.weight.device
    found: dict[int, list[dict[str, Any]]] = {}
    for start in range(0, len(lines), batch_size):
        some = longest_first[start : start + batch_size]
        tokens, real = pad([sources[i].tokens for i in some])
        best = translate(
            net,
            tokenizer,
            tokens.to(device),
            None if real.all() else real.to(device),
            [is_empty(lines[i]) for i in some],
            end_token=form.end,
            **search,
        )
        found.update(zip(some, best, strict=True))
    return (found[i] for i in range(len(lines)))


def _parser() -> Parser:
    parser = Parser(
        prog="train.py translate",
        description="Translate standard input, a sentence per line, with a trained encoder-decoder. Each gives a line, "
        "an empty one an empty one.",
    )
    add_model_arguments(parser)
    parser.add_argument("--beam_size", type=int, help="Of the beam search; 1 is greedy (default: the run's).")
    parser.add_argument(
        "--length_penalty", type=float, help="More of it favours longer translations (default: the run's)."
    )
    parser.add_argument(
        "--extra_tokens", type=int, help="Tokens that a translation may have more than its source (default: the run's)."
    )
    parser.add_argument(
        "--n_best", type=int, default=1, help="More than one gives lines 'number ||| translation ||| score'."
    )
    parser.add_argument("--buffer_size", type=int, default=1000, help="Lines that are read before any is translated.")
    return parser
