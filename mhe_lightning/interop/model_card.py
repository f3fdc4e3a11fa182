"""The README of an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhe_lightning import __version__
from mhe_lightning.accounting import attention_weights, parameters_by_part
from mhe_lightning.callbacks.run_record import CONFIG
from mhe_lightning.interop.native import PLACES, Native
from mhe_lightning.interop.stock import StockModel
from mhe_lightning.interop.verification import Agreement


def model_card(native: Native, stock: StockModel, agreement: Agreement, name: str) -> str:
    """What a model is, what it was trained on, how well it does, and how it is used, as Markdown for the Hub."""
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {stock.pipeline}",
        "tags:",
        "- mhe-lightning",
        f"- {stock.config['model_type']}",
        "---",
        "",
        f"# {name}",
        "",
        f"{in_words(native)}, {came_from(native)} and exported as `{stock.architecture}`, which computes the same.",
        *(f"\n{note}" for note in stock.notes),
        "",
        "## Use",
        "",
        "```python",
        *_usage(stock, name),
        "```",
        "",
        *record(native),
        "## Export",
        "",
        f"Compared with the trained model on {agreement.texts} texts of {agreement.tokens:,} tokens: the largest "
        f"difference of two scores was {agreement.float64:.1e} in float64 and {agreement.float32:.1e} in float32, the "
        f"largest score {agreement.largest:.3g}. Folding cannot be undone: to go on training, keep the native "
        "checkpoint.",
        "",
    ]
    return "\n".join(lines)


def in_words(native: Native) -> str:
    """What a model is, such as "A Decoder with MHE attention (combine add)"."""
    spec = _spec(native)
    others = [f"; {place.replace('_', ' ')}: {_told(spec[place])}" for place in PLACES[1:] if spec.get(place)]
    return f"A {type(native.net).__name__} with {_told(spec['attention'])}{''.join(others)}"


def came_from(native: Native) -> str:
    """Where a model is from, such as "trained with mhe_lightning"."""
    origin = native.origin
    if origin.get("format") == "transformers":
        return f"imported from {origin.get('source', 'a checkpoint')} ({origin.get('architecture')})"
    if origin:
        return f"converted from {origin.get('source', 'a model with multi-head attention')}, not trained since"
    return "trained with mhe_lightning"


def record(native: Native) -> list[str]:
    """What a model consists of, was trained on and scores: sections of Markdown, with an empty line behind them."""
    return [
        "## Parameters",
        "",
        "| part | parameters |",
        "|---|--:|",
        *(f"| {part.replace('_', ' ')} | {count:,} |" for part, count in parameters_by_part(native.net).items()),
        "",
        f"As trained. Attention weights, without biases: {attention_weights(native.net):,}.",
        "",
        "## Training",
        "",
        *_training(native),
        "",
        "## Scores",
        "",
        *_scores(native.results),
        "",
    ]


def _spec(native: Native) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = native.config["model"]["init_args"]["net"]["init_args"]
    return spec


def _told(attention: Any) -> str:
    """An attention's spec in words."""
    arguments = ", ".join(f"{key} {value}" for key, value in attention.get("init_args", {}).items())
    name = attention["class_path"].rpartition(".")[2]
    return f"{name} attention ({arguments})" if arguments else f"{name} attention"


def _usage(stock: StockModel, name: str) -> list[str]:
    lines = [
        f"from transformers import AutoTokenizer, {stock.auto_class}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        f"model = {stock.auto_class}.from_pretrained({name!r})",
    ]
    if stock.generation is not None:
        lines += [
            'inputs = tokenizer(["A text"], return_tensors="pt")',
            "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50), skip_special_tokens=True))",
        ]
    return lines


def _training(native: Native) -> list[str]:
    if native.origin:
        return [f"Not trained here: {came_from(native)}."]
    data = native.config.get("data") or {}
    results = native.results
    lines = [f"- Data: {_data(data)}.", f"- Optimizer steps: {native.steps:,}."]
    if results.get("tokens_seen"):
        lines.append(f"- Tokens seen: {results['tokens_seen']:,}.")
    if "seed" in results:
        lines.append(f"- Seed: {results['seed']}.")
    commit = results.get("git_commit")
    lines.append(f"- Made with mhe_lightning {__version__}" + (f", commit {commit}." if commit else "."))
    lines.append(f"- Command: `python train.py fit --config {CONFIG}`, with the file that lies here.")
    return lines


def _data(spec: Mapping[str, Any]) -> str:
    """What a data module was given that says where its rows came from."""
    arguments = spec.get("init_args", {})
    arguments = {**arguments, **(arguments.get("corpus") or {})}
    found = [str(arguments[key]) for key in ("path", "subset", "task") if arguments.get(key)]
    name = spec.get("class_path", "unknown").rpartition(".")[2]
    return f"{name} of {', '.join(found)}" if found else name


def _scores(results: Mapping[str, Any]) -> list[str]:
    found: dict[str, float] = {k: v for k, v in results.get("metrics", {}).items() if k.startswith("val/")}
    for evaluation in results.get("evaluations", {}).values():
        found.update(evaluation.get("metrics", {}))
    if not found:
        return ["None were recorded."]
    return ["| metric | value |", "|---|--:|", *(f"| {name} | {value:.6g} |" for name, value in found.items())]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file as the Hub's are."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
