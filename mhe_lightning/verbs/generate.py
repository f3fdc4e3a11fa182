"""`generate`: continue texts with a trained decoder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from mhe_lightning import run
from mhe_lightning.checkpoint import config_of, read_checkpoint, run_of
from mhe_lightning.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size
from mhe_lightning.models import Decoder
from mhe_lightning.models.generation import generate_text
from mhe_lightning.verbs import UserError
from mhe_lightning.verbs.parsing import Parser, as_user_error


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    try:
        folder, path = run_of(Path(options.run_or_ckpt))
        checkpoint = read_checkpoint(path)
        net = load_net(checkpoint)
        if not isinstance(net, Decoder):
            raise UserError(f"{path} holds a {type(net).__name__}; only decoders generate text")
        tokenizer = load_tokenizer(options.tokenizer or folder / run.TOKENIZER)
        if options.batch_size < 1:
            raise UserError(f"batch_size ({options.batch_size}) must be at least 1")
        prompts = options.prompt or _lines_of_stdin()
        longest = 1 + max(len(tokenizer.encode(p, add_special_tokens=False).ids) for p in prompts)
        new = options.max_new_tokens
        if new is None:
            new = max(1, min(200, net.max_length - longest))
        if vocabulary_size(tokenizer) > net.vocab_size:
            raise UserError(
                f"the tokenizer has {vocabulary_size(tokenizer)} tokens but the model {net.vocab_size}; "
                "use the one that it was trained with"
            )
        settings = {key: options[key] for key in ("temperature", "top_k", "top_p", "seed")}
        if options.greedy:
            settings["temperature"] = 0.0
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            texts = generate_text(
                net, tokenizer, end_of_text_id(tokenizer), batch, max_new_tokens=new, first=start, **settings
            )
            for prompt, text in zip(batch, texts, strict=True):
                print(prompt + text, flush=True)
    except ValueError as error:
        raise as_user_error(error) or error from error


def _lines_of_stdin() -> list[str]:
    if sys.stdin.isatty():
        print("a prompt per line, then Ctrl-D:", file=sys.stderr)
    try:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()] or [""]
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text; convert it with iconv") from error


def load_net(checkpoint: dict[str, Any]) -> nn.Module:
    """The net of a checkpoint, built from its config, with its weights, in eval mode."""
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    spec = config_of(checkpoint)["model"]["init_args"]["net"]
    spec.setdefault("init_args", {})["vocab_size"] = weights["token_embedding.weight"].shape[0]
    parser = Parser()
    parser.add_subclass_arguments(nn.Module, "net")
    net: nn.Module = parser.instantiate(parser.parse_object({"net": spec})).net
    net.load_state_dict(weights)
    return net.eval()


def _parser() -> Parser:
    parser = Parser(
        prog="train.py generate",
        description="Continue texts with a trained decoder. Without --prompt, every line of standard input is one.",
    )
    parser.add_argument("run_or_ckpt", type=str, help="A run directory (its newest checkpoint) or a checkpoint file.")
    parser.add_argument("--prompt", type=str, nargs="+", help="Texts to continue; quote each.")
    parser.add_argument("--max_new_tokens", type=int, help="Tokens to add to each (default: 200, or what fits).")
    parser.add_argument("--temperature", type=float, default=0.8, help="Divides the logits; 0 is greedy.")
    parser.add_argument("--top_k", type=int, default=None, help="Sample from the k most likely tokens only.")
    parser.add_argument("--top_p", type=float, default=None, help="Sample from the likeliest tokens of mass p only.")
    parser.add_argument("--greedy", action="store_true", help="Take the most likely token; as --temperature 0.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sampling; each prompt has its own stream.")
    parser.add_argument("--batch_size", type=int, default=16, help="Prompts that are continued together.")
    parser.add_argument("--tokenizer", type=str, help="A tokenizer.json (default: the run's).")
    return parser
