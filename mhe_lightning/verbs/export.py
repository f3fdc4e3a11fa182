"""`export`: a trained model for other libraries and engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mhe_lightning.errors import UserError
from mhe_lightning.files import require_new
from mhe_lightning.interop.ctranslate2 import export_to_ctranslate2
from mhe_lightning.interop.engine import EngineExport
from mhe_lightning.interop.exporting import export_to_hf
from mhe_lightning.interop.gguf import export_to_gguf
from mhe_lightning.interop.native import Native, load_native
from mhe_lightning.interop.onnx import export_to_onnx
from mhe_lightning.interop.verification import sample_texts
from mhe_lightning.loading import add_checkpoint_argument, find_checkpoint, lines_of_file
from mhe_lightning.parsing import Parser, as_user_error

ENGINES: dict[str, Callable[[Native, Path, Sequence[str], float], EngineExport]] = {
    "ctranslate2": export_to_ctranslate2,
    "gguf": export_to_gguf,
    "onnx": export_to_onnx,
}
"""Formats besides that of transformers."""


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    out = Path(options.out)
    try:
        if not options.tolerance > 0:
            raise UserError(f"tolerance ({options.tolerance}) must be positive; 1e-4 is the default")
        require_new(out)  # before anything is read
        native = load_native(*find_checkpoint(options.run_or_ckpt, options.ckpt_path), options.tokenizer)
        texts = [line for line in lines_of_file(options.text) if line.strip()] if options.text else sample_texts()
        if options.format == "hf":
            lines = _to_hf(native, out, texts, options.tolerance)
        else:
            lines = _to_engine(options.format, native, out, texts, options.tolerance)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        raise as_user_error(error) or error from error
    print("\n".join(lines))


def _to_hf(native: Native, out: Path, texts: Sequence[str], tolerance: float) -> list[str]:
    exported = export_to_hf(native, out, texts, tolerance)
    agreement = exported.agreement
    return [
        f"exported: {out} ({exported.stock.architecture})",
        f"equal:    to {agreement.float64:.1e} in float64, {agreement.float32:.1e} in float32, of scores up to "
        f"{agreement.largest:.3g}, on {agreement.texts} texts, {agreement.tokens:,} tokens",
        *(f"note:     {note}" for note in exported.stock.notes),
    ]


def _to_engine(name: str, native: Native, out: Path, texts: Sequence[str], tolerance: float) -> list[str]:
    exported = ENGINES[name](native, out, texts, tolerance)
    agreement = exported.agreement
    greedy = f"; {agreement.generated:,} greedy tokens are the likeliest" if agreement.generated else ""
    return [
        f"exported: {out} ({exported.content} for {exported.engine})",
        f"equal:    to {agreement.difference:.1e} in float32, of numbers up to {agreement.largest:.3g}, on "
        f"{agreement.texts} texts, {agreement.tokens:,} tokens{greedy}",
        *(f"note:     {note}" for note in exported.notes),
    ]


def _parser() -> Parser:
    parser = Parser(
        prog="train.py export",
        description="Write a trained model as other libraries load it, and compare the two before it is left on disk.",
    )
    parser.add_argument("run_or_ckpt", type=str, help="A run directory or a checkpoint file.")
    parser.add_argument("out", type=str, help="The folder to make.")
    parser.add_argument(
        "--format",
        type=str,
        choices=["hf", *ENGINES],
        default="hf",
        help="hf, for transformers and what reads its folders, such as vLLM; or an engine's own.",
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--tokenizer", type=str, help="A tokenizer.json (default: the run's).")
    parser.add_argument(
        "--text",
        type=str,
        help="Compare on the first 16 lines of this file, up to 64 tokens of each (default: prose of Python's own); "
        "for transformers also on one text as long as the model reads.",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="The largest difference of scores that is let pass, in float64 (hf) or float32.",
    )
    return parser
