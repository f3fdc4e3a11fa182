"""`import`: a GPT-2, BERT or Marian checkpoint of transformers as a run directory."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from mhe_lightning.data.tokenizer import vocabulary_size
from mhe_lightning.files import require_new
from mhe_lightning.interop.import_tokenizer import FILES
from mhe_lightning.interop.importing import Imported, import_checkpoint
from mhe_lightning.interop.reading import locate
from mhe_lightning.parsing import Parser, as_user_error
from mhe_lightning.weights_only import write_weights


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    out = Path(options.out)
    try:
        require_new(out)  # before anything is fetched or read
        found = import_checkpoint(locate(options.source, FILES))
        origin = {**found.origin, "source": options.source}
        written = write_weights(
            out,
            config=found.config,
            state_dict=found.state_dict,
            tokenizer_json=found.tokenizer_json,
            origin=origin,
        )
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        raise as_user_error(error) or error from error
    print("\n".join(report(found)))
    print(f"written:    {written}")


def report(found: Imported) -> list[str]:
    """Lines on what was imported, and on what was not."""
    model = found.config["model"]
    task = model["class_path"].rpartition(".")[2]
    net = model["init_args"]["net"]["class_path"].rpartition(".")[2]
    objective = "without a task" if task == "Task" else f"of the task {task}"
    parts = {part: count for part, count in found.parameters.items() if part not in ("total", "without_embeddings")}
    counts = ", ".join(f"{count:,} {part.replace('_', ' ')}" for part, count in parts.items() if count)
    lines = [
        f"class:      {found.architecture} → {net} with MHA, {objective}",
        f"parameters: {found.parameters['total']:,}: {counts}",
        f"tokenizer:  {_tokenizer(found)}",
    ]
    for why in dict.fromkeys(found.left.values()):
        names = [name for name, reason in found.left.items() if reason == why]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"left out:   {', '.join(names[:4])}{more}: {why}")
    return lines + [f"note:       {note}" for note in found.notes]


def _tokenizer(found: Imported) -> str:
    if found.tokenizer_json is None:
        return "none"
    return f"{vocabulary_size(Tokenizer.from_str(found.tokenizer_json)):,} tokens"


def _parser() -> Parser:
    parser = Parser(
        prog="train.py import",
        description="Turn a GPT-2, BERT or Marian checkpoint of transformers into a run directory, for the verbs that "
        "take a trained model and for `fit --init_from`. Weights are read from safetensors alone; no code is run.",
    )
    parser.add_argument("source", type=str, help="A folder that save_pretrained wrote, or a model's name on the Hub.")
    parser.add_argument("out", type=str, help="The run directory to write, which must not exist.")
    return parser
