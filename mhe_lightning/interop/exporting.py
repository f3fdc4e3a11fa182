"""From a trained model to a folder that other libraries load, proven equal before it is left on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mhe_lightning.callbacks.run_record import CONFIG
from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.extras import require
from mhe_lightning.files import build_new_folder, require_new
from mhe_lightning.interop.hf_decoder import stock_decoder
from mhe_lightning.interop.hf_encoder import stock_encoder
from mhe_lightning.interop.hf_encoder_decoder import stock_encoder_decoder
from mhe_lightning.interop.hf_tokenizer import stock_tokenizer
from mhe_lightning.interop.model_card import model_card, write_json
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.stock import NoStockClassError, StockModel
from mhe_lightning.interop.verification import Agreement, verify
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was exported, and how far it agrees with our model."""

    stock: StockModel
    agreement: Agreement


def stock_model(native: Native) -> StockModel:
    """The model as a class of Hugging Face transformers that computes the same.

    Raises:
        NoStockClassError: there is none; the message says why.
    """
    net, head = native.net, native.head
    end = end_of_text_id(native.tokenizer)
    padding = end if native.padding is None else native.padding
    if isinstance(net, Decoder):
        if head is not None:
            raise NoStockClassError(
                "a decoder with a classifier of its own has no stock class: GPT-2's has no layer before its scores; "
                "export the decoder that it was finetuned from, or finetune an Encoder"
            )
        return stock_decoder(net, end_of_text=end)
    if isinstance(net, EncoderDecoder):
        return stock_encoder_decoder(net, end_token=end, padding=padding)
    if isinstance(net, Encoder):
        return stock_encoder(net, head, problem=native.problem, labels=native.labels, padding=padding)
    raise NoStockClassError(f"{type(net).__name__} has no stock class; Decoder, Encoder and EncoderDecoder have")


def export_to_hf(native: Native, out: Path, texts: Sequence[str], tolerance: float) -> Exported:
    """Write a model as Hugging Face transformers loads it, and compare the two; what differs is not left on disk.

    Args:
        native: our model.
        out: the folder to make.
        texts: to compare on.
        tolerance: the largest difference of scores, in float64, that is let pass.

    Raises:
        NoStockClassError: no class of transformers computes what the model does.
        NotEqualError: what was written does not.
        ValueError: the folder is there already, or transformers or safetensors is not installed.
    """
    require("transformers", "hf", "check what is exported")
    require("safetensors", "hf", "export a model")
    require_new(out)
    stock = stock_model(native)
    found: list[Agreement] = []

    def build(folder: Path) -> None:
        write_hf(native, stock, folder)
        agreement = verify(native, stock, folder, texts, tolerance)
        (folder / "README.md").write_text(model_card(native, stock, agreement, out.resolve().name), encoding="utf-8")
        found.append(agreement)

    build_new_folder(out, build)
    return Exported(stock, found[0])


def write_hf(native: Native, stock: StockModel, folder: Path) -> None:
    """Write what transformers loads into a folder: config, weights, tokenizer, and how to generate."""
    from safetensors.torch import save_file

    text, tokenizer_config = stock_tokenizer(native.tokenizer, native.net, native.max_length)
    dtype = str(next(iter(stock.tensors.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", {"architectures": [stock.architecture], "torch_dtype": dtype, **stock.config})
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if stock.generation is not None:
        write_json(folder / "generation_config.json", stock.generation)
    (folder / CONFIG).write_text(yaml.safe_dump(dict(native.config), sort_keys=False), encoding="utf-8")
    save_file(dict(stock.tensors), folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes a file that its owner alone can read
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)
