"""`verify-resume`: replay the certificate of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from mhe_lightning.checkpoint import read_checkpoint, run_of
from mhe_lightning.data import verify_certificate
from mhe_lightning.data.streaming import ENDLESS
from mhe_lightning.verbs import UserError
from mhe_lightning.verbs.parsing import Parser, as_user_error


def main(verb: str, args: list[str]) -> None:
    parser = Parser(
        prog="train.py verify-resume",
        description="Prove from a checkpoint's hash chain that no training row was skipped or repeated.",
    )
    parser.add_argument("run_or_ckpt", type=str, help="A run directory (its newest checkpoint) or a checkpoint file.")
    options = parser.parse_args(args)
    try:
        _, path = run_of(Path(options.run_or_ckpt))
        states = [
            state
            for state in read_checkpoint(path).values()
            if isinstance(state, dict) and "segments" in state and "consumed" in state
        ]
        if not states:
            raise UserError(f"{path} has no certificate: its data module is not one of mhe_lightning's")
        rows = verify_certificate(states[0])
    except ValueError as error:
        raise as_user_error(error) or error from error
    n_rows, segments = states[0]["n_rows"], len(states[0]["segments"])
    epochs = f"{rows / n_rows:.3f} epochs of {n_rows} rows" if n_rows < ENDLESS else "streamed"
    print(
        f"{path}: {rows} rows trained in the order of seed {states[0]['seed']}, none skipped, none repeated "
        f"({epochs}, {segments} segment{'s' if segments != 1 else ''})"
    )
