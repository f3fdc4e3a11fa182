"""Speed of greedy decoding with every attention against libraries of transformers, and what caches hold.

    python benchmarks/decode.py --threads 2 --out docs/results/decode_cpu.json
    python benchmarks/decode.py --threads 2 --peers --attention mha mhe_add mqa --heads 1 2 4 8 16 32 --shapes 16x256x64
    python benchmarks/decode.py --threads 1 --clock cpu --peers --ways growing static text --ragged --shapes 4x64x128

Each of ``--shapes``, ``BxPxN``, is B prompts of P tokens that are continued by N tokens each; nothing ends earlier.
Nets have random weights, in float32, without dropout. Candidates are `generate` with each of ``--attention``, and the
peers: ``GPT2LMHeadModel`` and ``GPTBigCodeForCausalLM`` (multi-query) of transformers with their caches, and
x-transformers with one head of keys and values and its cache. MHA has GPT-2's weights and must give its tokens; where
rounding decides between two nearly equal logits it may not: at the first token of a row that differs, their distance
must be below ``TIE``, and how many rows differ is reported, as it is of static caches.

Each round times every candidate, one after another; medians and quartiles over the rounds are reported, those of a
ratio over the ratios of each round. Beside the ratio of times stands that of the bytes that a step has to read at the
least: all weights, and the keys and values of half of the new tokens and of the prompts. ``first`` and ``later`` are
the seconds until the first tokens are there, which is reading the prompts, and those of each later step; of ours alone.

``--ways``: ``growing`` and ``static`` are `generate` with KV caches of either kind, ``text`` is `stream_text` over
growing ones, whose tokens are decoded one by one. With ``--ragged`` prompts have a quarter of P to P tokens, padded
on the left. On a GPU static caches are replayed as a CUDA graph, whose capture is a part of what is timed. With
``--clock cpu`` the process's own seconds are taken, which others on the machine disturb less: of one thread, and not of
a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import (
    ATTENTIONS,
    add_freed_memory,
    compared,
    description,
    freed_memory_sentence,
    handle_freed_memory,
    interleaved,
    markdown_table,
    peer,
    quartiles,
    write_results,
)
from tokenizers import Tokenizer
from torch import Tensor, nn

from mhe_lightning.data.embedded import EmbeddedSource
from mhe_lightning.data.tokenizer import end_of_text_id, train_tokenizer
from mhe_lightning.interop.importing import import_checkpoint
from mhe_lightning.models import Decoder
from mhe_lightning.models.generation import stream, stream_text

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WAYS = ("growing", "static", "text")
PEERS = ("gpt2", "gpt_bigcode", "x_transformers")
INSTALL = "pip install transformers x-transformers"
TIE = 1e-4
"""Logits (of size 1) nearer than this are equal up to rounding."""


@dataclass
class Shape:
    """``rows`` prompts of ``prompt`` tokens, continued by ``new`` each."""

    rows: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        rows, prompt, new = map(int, text.split("x"))
        return cls(rows, prompt, new)

    def __str__(self) -> str:
        return f"{self.rows} × ({self.prompt} + {self.new})"


@dataclass
class Candidate:
    """What is timed.

    Args:
        net: the model.
        run: makes the new tokens, (B, N).
        cached: numbers that one layer's cache holds for a token.
        first: seconds until the first tokens, of each run, where they are measured.
        later: seconds of each later step.
        found: the new tokens of the latest run.
    """

    net: nn.Module
    run: Callable[[], Any]
    cached: int
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    found: Any = None

    def __call__(self) -> None:
        self.found = self.run()

    def step_bytes(self, shape: Shape, layers: int) -> int:
        """What a step halfway through the new tokens reads of weights and caches, float32."""
        held = shape.rows * (shape.prompt + shape.new // 2) * self.cached * layers
        return 4 * (sum(parameter.numel() for parameter in self.net.parameters()) + held)


def ours(net: Decoder, way: str, prompts: list[list[int]], options: argparse.Namespace, shape: Shape) -> Candidate:
    clock = CLOCKS[options.clock]

    def run() -> Tensor:
        begun = clock()
        tokens = []
        for row in stream(net, prompts, max_new_tokens=shape.new, temperature=0, static=way == "static"):
            tokens.append(row)
            if len(tokens) == 1:
                candidate.first.append(clock() - begun)
        candidate.later.append((clock() - begun - candidate.first[-1]) / max(shape.new - 1, 1))
        return torch.tensor(tokens).t()

    caches = net.new_caches()
    with torch.no_grad():
        net(torch.zeros(1, 1, dtype=torch.long, device=options.device), caches=caches)
    candidate = Candidate(net, run, caches[0].elements_per_token)
    return candidate


def text(net: Decoder, tokenizer: Tokenizer, prompts: list[list[int]], new: int, cached: int) -> Candidate:
    texts, end = [tokenizer.decode(prompt) for prompt in prompts], end_of_text_id(tokenizer)

    def run() -> None:
        steps = sum(1 for _ in stream_text(net, tokenizer, end, texts, max_new_tokens=new, temperature=0)) - 1
        if steps != new:
            raise RuntimeError(f"the texts ended after {steps} tokens and not {new}; take another size")

    return Candidate(net, run, cached)


def decoder(attention: str, heads: int, options: argparse.Namespace, positions: int) -> Decoder:
    torch.manual_seed(0)
    net = Decoder(
        options.vocab,
        ATTENTIONS[attention],
        width=options.width,
        n_heads=heads,
        n_layers=options.layers,
        max_length=positions,
        dropout=0.0,
    )
    return net.to(options.device).eval()


def hugging_face(name: str, prompts: Tensor, options: argparse.Namespace, shape: Shape) -> Candidate:
    transformers = peer("transformers", INSTALL)
    config_class, model_class = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "gpt_bigcode": (transformers.GPTBigCodeConfig, transformers.GPTBigCodeForCausalLM),
    }[name]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=options.vocab,
        n_positions=shape.prompt + shape.new,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads[0],
        bos_token_id=0,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    net = model_class(config).to(options.device).eval()
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run() -> Tensor:
        found: Tensor = net.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=shape.new,
            min_new_tokens=shape.new,
            **settings,
        )
        return found[:, shape.prompt :]

    return Candidate(net, run, 2 * options.width // (1 if name == "gpt2" else options.heads[0]))


def x_transformers(prompts: Tensor, options: argparse.Namespace, shape: Shape) -> Candidate:
    library = peer("x_transformers", INSTALL)
    torch.manual_seed(0)
    layers = library.Decoder(
        dim=options.width,
        depth=options.layers,
        heads=options.heads[0],
        attn_dim_head=options.width // options.heads[0],
        attn_one_kv_head=True,
        attn_flash=True,
    )
    net = library.TransformerWrapper(
        num_tokens=options.vocab,
        max_seq_len=shape.prompt + shape.new,
        attn_layers=layers,
        tie_embedding=True,
    )
    wrapper = library.AutoregressiveWrapper(net).to(options.device).eval()
    run = torch.no_grad()(lambda: wrapper.generate(prompts, shape.new, temperature=0.0, cache_kv=True))
    return Candidate(net, run, 2 * options.width // options.heads[0])


def copied(gpt2: nn.Module, net: Decoder) -> None:
    """GPT-2's weights into ours."""
    with TemporaryDirectory() as folder:
        gpt2.save_pretrained(folder)  # type: ignore[operator]
        state = import_checkpoint(Path(folder)).state_dict
    net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})


@torch.no_grad()
def check_same(net: Decoder, prompts: Tensor, own: Tensor, theirs: Tensor) -> int:
    """How many rows differ, where two logits are equal up to rounding.

    Raises:
        RuntimeError: they differ elsewhere.
    """
    differing = (own != theirs).any(1).nonzero().flatten().tolist()
    for row in differing:
        place = int((own[row] != theirs[row]).int().argmax())
        before = torch.cat([prompts[row], own[row, :place]])[None]
        logits = net.logits(net(before.to(net.head.weight.device), last=1))[0, 0]
        distance = float(logits[own[row, place]] - logits[theirs[row, place]])
        if abs(distance) > TIE:
            raise RuntimeError(f"row {row} differs from GPT-2's at new token {place} by {distance} in the logits")
    return len(differing)


def differing(name: str, candidates: dict[str, Candidate], prompts: list[list[int]]) -> dict[str, int]:
    """How many rows differ from those of GPT-2, or of growing caches, where they should not but for rounding."""
    own, growing = candidates[name], candidates.get(name.replace("static", "growing"))
    if name == "mha" and "gpt2" in candidates:
        assert isinstance(own.net, Decoder)
        theirs = candidates["gpt2"].found.cpu()
        return {"rows_unlike_gpt2": check_same(own.net, torch.tensor(prompts), own.found, theirs)}
    if "static" in name and growing is not None:
        return {"rows_unlike_growing": int((own.found != growing.found).any(1).sum())}
    return {}


def candidates_of(shape: Shape, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, Candidate]:
    found: dict[str, Candidate] = {}
    if options.peers:
        same = torch.tensor(prompts, device=options.device)
        for name in options.peers:
            found[name] = (
                x_transformers(same, options, shape)
                if name == "x_transformers"
                else hugging_face(name, same, options, shape)
            )
    for attention in options.attention:
        for heads in options.heads:
            # text is decoded, and encoded again, perhaps to more tokens
            net = decoder(attention, heads, options, (2 if "text" in options.ways else 1) * shape.prompt + shape.new)
            if attention == "mha" and "gpt2" in found and len(options.heads) == 1 and "text" not in options.ways:
                copied(found["gpt2"].net, net)
            for way in options.ways:
                name = attention + (f" {way}" if len(options.ways) > 1 else "")
                name += f" n={heads}" if len(options.heads) > 1 else ""
                found[name] = ours(net, "growing" if way == "text" else way, prompts, options, shape)
                if way == "text":
                    found[name] = text(net, options.tokenizer, prompts, shape.new, found[name].cached)
    return found


def measured(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    lengths = [shape.prompt // (1 + row % 4) if options.ragged else shape.prompt for row in range(shape.rows)]
    prompts = [torch.randint(options.vocab, (length,)).tolist() for length in lengths]
    if "text" in options.ways:
        prompts = [options.ids[row * length : (row + 1) * length] for row, length in enumerate(lengths)]
    candidates = candidates_of(shape, prompts, options)
    seconds = interleaved(candidates, rounds=options.rounds, clock=CLOCKS[options.clock])
    reference = options.reference or next(iter(candidates))
    rows = compared(seconds, reference)
    read = {name: candidate.step_bytes(shape, options.layers) for name, candidate in candidates.items()}
    for name, candidate in candidates.items():
        rows[name].update(
            cached_numbers_per_token=candidate.cached * options.layers,
            bytes_per_step=read[name],
            bytes_ratio=round(read[reference] / read[name], 3),
            **differing(name, candidates, prompts),
            **{
                part: quartiles(getattr(candidate, part)[-options.rounds :])
                for part in ("first", "later")
                if getattr(candidate, part)
            },
        )
    return {"reference": reference, "candidates": rows}


def table(shape: Shape, found: dict[str, Any]) -> str:
    reference = found["reference"]
    head = ["", "s", f"× {reference}", "quartiles", "bytes ratio", "cached per token", "first token, s", "later, ms"]
    lines = []
    for name, row in found["candidates"].items():
        ratio = row[f"times_{reference}"]
        first, later = (row[part]["median"] if part in row else None for part in ("first", "later"))
        lines.append(
            [
                name,
                f"{row['seconds']['median']:.3g}",
                f"{ratio['median']:.2f}",
                "–".join(f"{x:.2f}" for x in ratio["quartiles"]),
                f"{row['bytes_ratio']:.2f}",
                row["cached_numbers_per_token"],
                "" if first is None else f"{first:.3g}",
                "" if later is None else f"{1e3 * later:.3g}",
            ]
        )
    unlike = [
        f"{name}: {count} of {shape.rows} {key.replace('_', ' ')}\n"
        for name, row in found["candidates"].items()
        for key, count in row.items()
        if key.startswith("rows_unlike")
    ]
    return f"{shape}\n\n{markdown_table(head, lines)}\n{''.join(unlike)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 512), ("layers", 4), ("vocab", 30522), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--heads", type=int, nargs="+", default=[8])
    parser.add_argument("--shapes", nargs="+", default=["16x256x128", "32x1024x64"], help="prompts x tokens x new ones")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["mha", "mhe_add", "mhe_mul", "mqa"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["growing"])
    parser.add_argument("--ragged", action="store_true", help="prompts of different lengths")
    parser.add_argument("--reference", help="the candidate that others are compared to; the first if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    add_freed_memory(parser)
    parser.add_argument("--out", type=Path, help="JSON file to write, and a Markdown table beside it")
    options = parser.parse_args()
    if options.peers and (options.ragged or len(options.heads) > 1):
        parser.error("--ragged and several --heads are of ours alone; give --peers without a name")
    torch.set_num_threads(options.threads)
    handle_freed_memory(options.freed_memory)
    if "text" in options.ways:
        texts = [piece.text for piece, _ in zip(EmbeddedSource().pieces("train"), range(2000), strict=False)]
        options.tokenizer = train_tokenizer(texts, "bpe", options.vocab)
        options.vocab, options.ids = options.tokenizer.get_vocab_size(), options.tokenizer.encode(" ".join(texts)).ids
    about = description(*(package for package in ("transformers", "x-transformers") if options.peers))
    results, tables = {}, []
    for shape in map(Shape.parse, options.shapes):
        results[str(shape)] = measured(shape, options)
        tables.append(table(shape, results[str(shape)]))
        print(tables[-1])
    if options.out:
        for name in ("tokenizer", "ids"):
            vars(options).pop(name, None)
        write_results(options.out, options, about, shapes=results)
        told = (
            f"medians over {options.rounds} rounds after one that is not counted{freed_memory_sentence(vars(options))}"
        )
        lines = [f"{told}\n", *(f"{key}: {value}\n" for key, value in about.items())]
        options.out.with_suffix(".md").write_text("\n".join([*tables, "".join(lines)]), encoding="utf-8")


if __name__ == "__main__":
    main()
