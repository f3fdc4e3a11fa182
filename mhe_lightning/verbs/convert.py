"""`convert`: a trained model with multi-head attention as one with another attention."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from tokenizers import Tokenizer
from torch import nn

from mhe_lightning import run
from mhe_lightning.accounting import attention_weights
from mhe_lightning.checkpoint import RECORD, config_of, read_checkpoint
from mhe_lightning.data.embedded import EmbeddedSource
from mhe_lightning.errors import UserError
from mhe_lightning.files import require_new
from mhe_lightning.interop.calibration import texts_as_batches
from mhe_lightning.interop.conversion import LayerReport, convert_net
from mhe_lightning.interop.native import PLACES
from mhe_lightning.interop.solving import RIDGE
from mhe_lightning.loading import add_checkpoint_argument, find_checkpoint, lines_of_file, load_tokenizer_of
from mhe_lightning.nets import build_net, load_net, net_parser
from mhe_lightning.parsing import Parser, as_user_error
from mhe_lightning.variants import find_overlays
from mhe_lightning.weights_only import ORIGIN, write_weights

Spec = dict[str, Any]

HEADER = "place    layer  scores  values  output → fitted  seconds"


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    out = Path(options.out)
    try:
        require_new(out)
        if not 0 < options.ridge < math.inf:
            raise UserError(f"ridge ({options.ridge}) must be positive; {RIDGE} is the default")
        overlay = _overlay(options.to)
        folder, path = find_checkpoint(options.run_or_ckpt, options.ckpt_path)
        checkpoint = read_checkpoint(path)
        source = load_net(checkpoint)
        tokenizer = load_tokenizer_of(source, options.tokenizer or folder / run.TOKENIZER)
        config = config_of(checkpoint)
        config["model"]["init_args"]["net"] = converted_spec(config["model"]["init_args"]["net"], overlay)
        target = build_net(config["model"]["init_args"]["net"], source.vocab_size)  # type: ignore[arg-type]
        calibration, layers = _convert(source, target, tokenizer, options)
        kept = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("net.") and k != "tokens_seen"}
        written = write_weights(
            out,
            config=config,
            state_dict={**kept, **{f"net.{name}": value for name, value in target.state_dict().items()}},
            tokenizer_json=tokenizer.to_str(),
            origin={
                "format": "mhe_lightning",
                "source": str(path),
                "source_origin": checkpoint[RECORD].get(ORIGIN),
                "to": overlay,
                "calibration": calibration,
                "layers": [asdict(layer) for layer in layers],
            },
        )
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        raise as_user_error(error) or error from error
    print(saving(source, target))
    print(f"written:    {written}; train it further with `fit --init_from {out}`")


def _convert(
    source: nn.Module, target: nn.Module, tokenizer: Tokenizer, options: Namespace
) -> tuple[dict[str, Any], list[LayerReport]]:
    """Convert ``source`` into ``target`` on the texts asked for; what was calibrated with, and how near it came."""
    texts = calibration_texts(options.calibration, options.texts)
    batches = texts_as_batches(
        source, tokenizer, texts, count=options.texts, max_tokens=options.max_tokens, batch_size=options.batch_size
    )
    tokens = sum(int(b.tokens.numel() if b.padding is None else b.padding.sum()) for b in batches)
    print(f"calibration: {len(texts)} texts, {tokens:,} tokens; errors are squared, as shares of what there is")
    print(HEADER)
    layers = convert_net(source, target, batches, ridge=options.ridge, progress=_show)
    came_from = options.calibration or EmbeddedSource.name
    return {"texts": len(texts), "tokens": tokens, "from": came_from, "ridge": options.ridge}, layers


def converted_spec(net: Spec, overlay: Spec) -> Spec:
    """A net's spec with another attention in all its places, resolved as `fit` writes it.

    Dropout and biases stay as they are where the overlay does not say otherwise.

    Raises:
        UserError: an argument is unknown or its value refused.
    """
    arguments = dict(net["init_args"])
    for place in PLACES:
        if (old := arguments.get(place)) is not None:
            given = old.get("init_args", {}) if isinstance(old, dict) else {}
            kept = {k: v for k, v in given.items() if k in ("dropout", "bias")}
            arguments[place] = {**overlay, "init_args": {**kept, **overlay.get("init_args", {})}}
    parser = net_parser()
    # the size of the vocabulary is the data's to say, and no part of a config
    parsed = parser.parse_object({"net": {**net, "init_args": {**arguments, "vocab_size": 1}}})
    resolved: Spec = yaml.safe_load(parser.dump(parsed, skip_unset=False))["net"]
    if "vocab_size" not in net["init_args"]:
        del resolved["init_args"]["vocab_size"]
    else:
        resolved["init_args"]["vocab_size"] = net["init_args"]["vocab_size"]
    return resolved


def calibration_texts(path: str | None, count: int) -> list[str]:
    """``count`` texts, evenly from all lines of a file, or documents of the embedded corpus; all, if there are fewer.

    Raises:
        UserError: the count is out of range, or there is no text.
    """
    if count < 1:
        raise UserError(f"texts ({count}) must be at least 1")
    found = [piece.text for piece in EmbeddedSource().pieces("train")] if path is None else lines_of_file(path)
    found = [text for text in found if text.strip()]
    if not found:
        raise UserError(f"{path} holds no text; give one with a text on each line")
    return [found[i * len(found) // count] for i in range(count)] if count < len(found) else found


def saving(source: nn.Module, target: nn.Module) -> str:
    """A line on the parameters of all attentions, before and after."""
    before, after = attention_weights(source), attention_weights(target)
    whole, whole_after = (sum(p.numel() for p in net.parameters()) for net in (source, target))
    return (
        f"parameters: {whole:,} → {whole_after:,}; of attentions, without biases, {before:,} → {after:,} "
        f"({1 - after / before:.1%} saved)"
    )


def _show(layer: LayerReport) -> None:
    errors = f"{layer.scores:6.3f}  {layer.values:6.3f}  {layer.output:6.3f} → {layer.fitted:6.3f}"
    print(f"{layer.place:7}  {layer.layer:5}  {errors}  {layer.seconds:7.1f}", flush=True)


def _overlay(name: str) -> Spec:
    (path,) = find_overlays([name], []).values()
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(spec, dict) or "class_path" not in spec:
        raise UserError(f"{path} names no attention; it needs a class_path, as configs/attention/mhe_mul.yaml has")
    return spec


def _parser() -> Parser:
    parser = Parser(
        prog="train.py convert",
        description="Turn a trained model with multi-head attention into one with another attention, fitted to what "
        "each layer sees of some texts. The result is near to the model, not equal: train it further with `fit "
        "--init_from OUT`, best by distillation (mhe_lightning.tasks.Distillation).",
    )
    parser.add_argument("run_or_ckpt", type=str, help="A run directory or a checkpoint file.")
    parser.add_argument("out", type=str, help="The run directory to write, which must not exist.")
    parser.add_argument(
        "--to", type=str, required=True, help="The attention: a name in configs/attention, or a YAML file."
    )
    parser.add_argument(
        "--calibration",
        type=str,
        help="A file with a text on each line, of the kind that the model is for (default: "
        "Python's own documentation).",
    )
    parser.add_argument(
        "--texts", type=int, default=512, help="How many texts, taken evenly from all; more are better, and slower."
    )
    parser.add_argument("--max_tokens", type=int, default=128, help="Tokens of a text; the rest of it is cut off.")
    parser.add_argument("--batch_size", type=int, default=16, help="Texts that go through the model together.")
    parser.add_argument(
        "--ridge", type=float, default=RIDGE, help="How much of the data's variance is taken for chance."
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--tokenizer", type=str, help="A tokenizer.json (default: the run's).")
    return parser
