"""`verify-resume`: replay the certificate of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from mhe_lightning.checkpoint import read_checkpoint, run_of
from mhe_lightning.data import verify_certificate
from mhe_lightning.data.sampler import order_from
from mhe_lightning.data.streaming import ENDLESS
from mhe_lightning.errors import UserError
from mhe_lightning.parsing import Parser, as_user_error


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
            raise UserError(f"{path} has no certificate: it is an average, or its data module is not ours")
        order, trained = order_from(states[0]), verify_certificate(states[0])
    except ValueError as error:
        raise as_user_error(error) or error from error
    segments = len(states[0]["segments"])
    epochs = "streamed"
    if order.epoch_length < ENDLESS:
        epochs = f"{trained / order.epoch_length:.3f} epochs of {order.epoch_length} {order.unit}"
    print(
        f"{path}: {trained} {order.unit} trained in the order of seed {states[0]['seed']}, none skipped, none repeated "
        f"({epochs}, {segments} segment{'s' if segments != 1 else ''})"
    )
