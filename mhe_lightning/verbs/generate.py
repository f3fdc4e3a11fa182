"""`generate`: continue texts with a trained decoder."""

from __future__ import annotations

from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.loading import add_model_arguments, lines_of_stdin, load_trained
from mhe_lightning.models import Decoder
from mhe_lightning.models.generation import generate_text, stream_text
from mhe_lightning.parsing import Parser, as_user_error


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    try:
        net, tokenizer, _ = load_trained(options, Decoder, "decoders generate text")
        lines = lines_of_stdin("a prompt per line, then Ctrl-D:")
        prompts = options.prompt or [line for line in lines if line.strip()] or [""]
        longest = 1 + max(len(tokenizer.encode(p, add_special_tokens=False).ids) for p in prompts)
        new = options.max_new_tokens
        if new is None:
            new = max(1, min(200, net.max_length - longest))
        settings = {key: options[key] for key in ("temperature", "top_k", "top_p", "seed", "static")}
        settings |= {"max_new_tokens": new, "stop": options.stop or ()}
        if options.greedy:
            settings["temperature"] = 0.0
        model = (net, tokenizer, end_of_text_id(tokenizer))
        if len(prompts) == 1:
            waiting = prompts[0]  # printed with the first piece, so not where the settings are refused
            for (piece,) in stream_text(*model, prompts, **settings):
                if waiting + piece:
                    print(waiting + piece, end="", flush=True)
                waiting = ""
            print(flush=True)
            return
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            texts = generate_text(*model, batch, first=start, **settings)
            for prompt, text in zip(batch, texts, strict=True):
                print(prompt + text, flush=True)
    except ValueError as error:
        raise as_user_error(error) or error from error


def _parser() -> Parser:
    parser = Parser(
        prog="train.py generate",
        description="Continue texts with a trained decoder. Without --prompt, every line of standard input is one. "
        "The text of a single prompt is printed as it comes, those of several when they are whole.",
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", type=str, nargs="+", help="Texts to continue; quote each.")
    parser.add_argument("--max_new_tokens", type=int, help="Tokens to add to each (default: 200, or what fits).")
    parser.add_argument("--temperature", type=float, default=0.8, help="Divides the logits; 0 is greedy.")
    parser.add_argument("--top_k", type=int, default=None, help="Sample from the k most likely tokens only.")
    parser.add_argument("--top_p", type=float, default=None, help="Sample from the likeliest tokens of mass p only.")
    parser.add_argument("--greedy", action="store_true", help="Take the most likely token; as --temperature 0.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sampling; each prompt has its own stream.")
    parser.add_argument("--stop", type=str, nargs="+", help="End a text before the first of these in what is new.")
    parser.add_argument(
        "--static",
        type=bool,
        help="KV caches of fixed shapes, for CUDA graphs (default: on a GPU; false is slower there).",
    )
    return parser
