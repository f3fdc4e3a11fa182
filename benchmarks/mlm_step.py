"""Training speed and memory of a small BERT-like encoder, against Hugging Face's BertForMaskedLM of the same size.

    python benchmarks/mlm_step.py --dropout 0.1 0.1 0 --attention_dropout 0 0.1 0 --out docs/results/mlm_step_cpu.json

needs ``pip install transformers``. A step is forward, backward, AdamW and zero_grad in float32, on the same tokens and
masks for every model. BERT is called as it is commonly trained, ``model(tokens, labels=labels)`` with SDPA; the encoder
here computes logits at the masked positions only. First the encoder's weights (MHA, without dropout) are copied into
BERT, and loss and gradients must agree: the two are the same function.

Memory: each model trains a few steps in a new process; counted is the highest resident memory above what the process
held before, with everything imported and one step of a tiny model done (Linux only). Time: each round times a few steps
of every model in one process, in an order that is reversed from round to round; medians and quartiles over the rounds
are reported, those of a ratio over the ratios of each round.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ATTENTIONS, machine, write_results
from torch import Tensor, nn

from mhe_lightning.models import Encoder
from mhe_lightning.models.heads import MaskedTokenHead
from mhe_lightning.models.loss import IGNORE

BERT = "bert"
MASK = 103
WARM_UP = 1  # rounds: the first allocates
TINY = {"width": 8, "heads": 2, "layers": 1, "feed_forward": 16, "length": 8, "rows": 2, "vocab": 200}
MAX_DIFFERENCE = {"loss": 1e-5, "gradient": 1e-4}  # relative

BERT_NAMES = {
    "net.token_embedding": "bert.embeddings.word_embeddings",
    "net.position_embedding": "bert.embeddings.position_embeddings",
    "net.segment_embedding": "bert.embeddings.token_type_embeddings",
    "net.norm": "bert.embeddings.LayerNorm",
    "net.blocks": "bert.encoder.layer",
    "attention.w_q": "attention.self.query",
    "attention.w_k": "attention.self.key",
    "attention.w_v": "attention.self.value",
    "attention.w_o": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm",
    "feed_forward.w_1": "intermediate.dense",
    "feed_forward.w_2": "output.dense",
    "norm_2": "output.LayerNorm",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.bias": "cls.predictions.bias",
}


class MaskedLM(nn.Module):
    """Our encoder and its head; returns the mean loss over masked tokens, as BERT does."""

    def __init__(self, attention: str, options: argparse.Namespace, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.net = Encoder(
            options.vocab,
            partial(ATTENTIONS[attention], dropout=attention_dropout),
            width=options.width,
            n_heads=options.heads,
            n_layers=options.layers,
            max_length=options.length,
            ff_width=options.feed_forward,
            dropout=dropout,
        )
        self.head = MaskedTokenHead(width=options.width, vocab_size=options.vocab)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        kept = (targets.flatten() != IGNORE).nonzero().flatten()
        hidden = self.net(tokens, kept=kept)
        return self.head.loss(hidden, self.net.token_embedding.weight, targets.flatten()[kept]) / len(kept)


class Bert(nn.Module):
    """Hugging Face's BERT, called as its users do."""

    def __init__(self, options: argparse.Namespace, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        transformers = import_transformers()
        config = transformers.BertConfig(
            vocab_size=options.vocab,
            hidden_size=options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=options.feed_forward,
            max_position_embeddings=options.length,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=attention_dropout,
            attn_implementation="sdpa",
        )
        self.model = transformers.BertForMaskedLM(config).train()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens, labels=targets).loss
        return loss


class Trained:
    """A model with its optimizer and the times of its steps."""

    def __init__(self, name: str, options: argparse.Namespace, dropout: float, attention_dropout: float) -> None:
        torch.manual_seed(0)
        self.model = make(name, options, dropout, attention_dropout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.seconds: list[float] = []  # per step, one number per round

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        self.model(tokens, targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def round(self, tokens: Tensor, targets: Tensor, steps: int) -> None:
        begun = time.perf_counter()
        for _ in range(steps):
            self.step(tokens, targets)
        self.seconds.append((time.perf_counter() - begun) / steps)


def make(name: str, options: argparse.Namespace, dropout: float, attention_dropout: float) -> nn.Module:
    if name == BERT:
        return Bert(options, dropout, attention_dropout)
    return MaskedLM(name, options, dropout, attention_dropout)


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise SystemExit("the comparison needs Hugging Face's BERT: pip install transformers") from None
    return transformers


def make_batch(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random tokens, some of them masked, and targets: the tokens under the masks, -100 elsewhere; (B, T) each."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.length)
    tokens = torch.randint(1, options.vocab, shape, generator=generator)  # BERT takes 0 for padding
    masked = torch.rand(shape, generator=generator).flatten().argsort()[: round(options.masked * tokens.numel())]
    targets = torch.full_like(tokens, IGNORE)
    targets.view(-1)[masked] = tokens.view(-1)[masked]
    tokens.view(-1)[masked] = MASK
    return tokens, targets


def check_same_function(options: argparse.Namespace) -> dict[str, float]:
    """Relative differences of loss and gradient to BERT with the same weights.

    Raises:
        RuntimeError: the models differ.
    """
    batch = make_batch(options)
    ours, bert = make("mha", options, 0.0, 0.0), Bert(options, 0.0, 0.0)
    theirs = dict(bert.model.named_parameters())
    pairs = [(parameter, theirs.pop(bert_name(name))) for name, parameter in ours.named_parameters()]
    if theirs:
        raise RuntimeError(f"parameters that BERT alone has: {', '.join(theirs)}")
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    loss, reference = ours(*batch), bert(*batch)
    loss.backward()
    reference.backward()
    squares = torch.tensor([[(a.grad - b.grad).square().sum(), b.grad.square().sum()] for a, b in pairs]).sum(0)
    difference = {
        "loss": abs(loss.item() - reference.item()) / reference.item(),
        "gradient": (squares[0] / squares[1]).sqrt().item(),
    }
    for name, value in difference.items():
        if not value <= MAX_DIFFERENCE[name]:
            raise RuntimeError(f"{name}: {value:.2e} from BERT's, at most {MAX_DIFFERENCE[name]:.0e} allowed")
    return difference


def bert_name(name: str) -> str:
    for ours, theirs in BERT_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def measure_memory(name: str, options: argparse.Namespace, dropout: float, attention_dropout: float) -> dict[str, Any]:
    """Peak of training a model, in MiB above what this process, a new one, holds before the model is made."""
    torch.set_num_threads(options.threads)
    tiny = argparse.Namespace(**{**vars(options), **TINY})
    Trained(name, tiny, dropout, attention_dropout).step(*make_batch(tiny))  # loads what is loaded at first use
    gc.collect()
    before = _resident("VmRSS")
    batch = make_batch(options)
    trained = Trained(name, options, dropout, attention_dropout)
    for _ in range(options.memory_steps):
        trained.step(*batch)
    # not getrusage's ru_maxrss, which a new process takes over from the one that started it
    peak = _resident("VmHWM") - before
    kept = 3 * sum(p.numel() * p.element_size() for p in trained.model.parameters()) / 2**20  # AdamW keeps two moments
    return {
        "before_mib": round(before, 1),
        "peak_mib": round(peak, 1),
        "weights_and_optimizer_mib": round(kept, 1),
        "peak_above_these_mib": round(peak - kept, 1),
    }


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory_of_all(options: argparse.Namespace, dropout: float, attention_dropout: float) -> dict[str, dict[str, Any]]:
    rows = {}
    for name in (BERT, *options.attentions):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as new_process:
            row = new_process.submit(measure_memory, name, options, dropout, attention_dropout).result()
        rows[name] = row
        row["peak_ratio_to_bert"] = round(row["peak_mib"] / rows[BERT]["peak_mib"], 3)
        print(f"  {name:8s} {row['peak_mib']:7.0f} MiB  {row['peak_ratio_to_bert']:.3f} × BERT", flush=True)
    return rows


def time_of_all(options: argparse.Namespace, dropout: float, attention_dropout: float) -> dict[str, dict[str, Any]]:
    batch = make_batch(options)
    models = {name: Trained(name, options, dropout, attention_dropout) for name in (BERT, *options.attentions)}
    order = list(models.values())
    for _ in range(WARM_UP + options.rounds):
        for model in order:
            model.round(*batch, steps=options.steps)
        order.reverse()
    per_step = options.rows * options.length
    bert = models[BERT].seconds[WARM_UP:]
    rows = {}
    for name, model in models.items():
        seconds = model.seconds[WARM_UP:]
        low, median, high = statistics.quantiles(seconds, n=4)
        ratios = statistics.quantiles([b / s for b, s in zip(bert, seconds, strict=True)], n=4)
        rows[name] = {
            "step_seconds": round(median, 4),
            "tokens_per_second": round(per_step / median, 1),
            "quartiles": [round(per_step / high, 1), round(per_step / low, 1)],
            "ratio_to_bert": round(ratios[1], 3),
            "ratio_quartiles": [round(ratios[0], 3), round(ratios[2], 3)],
        }
        spread = f"{ratios[0]:.2f} to {ratios[2]:.2f}"
        print(f"  {name:8s} {per_step / median:7.0f} tokens/s  {ratios[1]:.2f} × BERT ({spread})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, meaning in (
        ("width", 512, ""),
        ("heads", 8, ""),
        ("layers", 4, ""),
        ("feed_forward", 2048, ""),
        ("length", 256, "tokens of a row"),
        ("rows", 8, ""),
        ("vocab", 30522, ""),
        ("rounds", 20, "after one that is not counted; 0 leaves out the times"),
        ("steps", 1, "of each model in a round"),
        ("memory_steps", 3, "in the measurement of memory; 0 leaves it out"),
        ("threads", os.cpu_count() or 1, "all cores if not given"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=meaning)
    parser.add_argument("--masked", type=float, default=0.15, help="share of masked tokens")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.1], help="of hidden states; one run for each")
    parser.add_argument("--attention_dropout", type=float, nargs="+", default=[0.0], help="of the same runs")
    parser.add_argument(
        "--attentions", nargs="+", choices=ATTENTIONS, default=["mha", "mhe_add", "mhe_mul", "mqa", "sha"]
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if len(options.dropout) != len(options.attention_dropout):
        parser.error("--dropout and --attention_dropout need the same number of values, one of each per run")
    if options.rounds == 1:
        parser.error("--rounds must be at least 2 to give quartiles, or 0")
    versions = {"transformers": import_transformers().__version__}
    torch.set_num_threads(options.threads)
    difference = check_same_function(options)
    print("relative difference to BERT:", ", ".join(f"{name} {value:.1e}" for name, value in difference.items()))
    runs = []
    for dropout, attention_dropout in zip(options.dropout, options.attention_dropout, strict=True):
        print(f"dropout {dropout}, of attention {attention_dropout}, {torch.get_num_threads()} threads", flush=True)
        rows: dict[str, dict[str, Any]] = {name: {} for name in (BERT, *options.attentions)}
        for measured, wanted in ((memory_of_all, options.memory_steps), (time_of_all, options.rounds)):
            for name, row in measured(options, dropout, attention_dropout).items() if wanted else ():
                rows[name].update(row)
        runs.append({"dropout": dropout, "attention_dropout": attention_dropout, "models": rows})
    if options.out:
        threads = {"torch_threads": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
        write_results(
            options.out, options, {**machine(), **versions, **threads}, difference_to_bert=difference, runs=runs
        )


if __name__ == "__main__":
    main()
