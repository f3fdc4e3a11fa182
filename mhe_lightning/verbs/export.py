"""`export`: a trained model for other libraries and engines."""

from __future__ import annotations

from pathlib import Path

from mhe_lightning.errors import UserError
from mhe_lightning.interop.exporting import export_to_hf
from mhe_lightning.interop.native import load_native
from mhe_lightning.interop.verification import sample_texts
from mhe_lightning.loading import add_checkpoint_argument, find_checkpoint, lines_of_file
from mhe_lightning.parsing import Parser, as_user_error


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    out = Path(options.out)
    try:
        if not options.tolerance > 0:
            raise UserError(f"tolerance ({options.tolerance}) must be positive; 1e-4 is the default")
        native = load_native(*find_checkpoint(options.run_or_ckpt, options.ckpt_path), options.tokenizer)
        texts = [line for line in lines_of_file(options.text) if line.strip()] if options.text else sample_texts()
        exported = export_to_hf(native, out, texts, options.tolerance)
    except ValueError as error:
        raise as_user_error(error) or error from error
    agreement = exported.agreement
    print(f"exported: {out} ({exported.stock.architecture})")
    print(
        f"equal:    to {agreement.float64:.1e} in float64, {agreement.float32:.1e} in float32, of scores up to "
        f"{agreement.largest:.3g}, on {agreement.texts} texts, {agreement.tokens:,} tokens"
    )
    for note in exported.stock.notes:
        print(f"note:     {note}")


def _parser() -> Parser:
    parser = Parser(
        prog="train.py export",
        description="Write a trained model as other libraries load it, and compare the two before it is left on disk.",
    )
    parser.add_argument("run_or_ckpt", type=str, help="A run directory or a checkpoint file.")
    parser.add_argument("out", type=str, help="The folder to make.")
    add_checkpoint_argument(parser)
    parser.add_argument("--tokenizer", type=str, help="A tokenizer.json (default: the run's).")
    parser.add_argument("--text", type=str, help="Compare on the lines of this file (default: prose of Python's own).")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="The largest difference of scores, in float64, that is let pass."
    )
    return parser
