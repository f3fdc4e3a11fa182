"""`consolidate`: a run as one file: the average of its last weights, or all that training goes on from."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

from mhe_lightning import run
from mhe_lightning.averaging import average_checkpoints, averaged_path, last_checkpoints, write_average
from mhe_lightning.checkpoint import (
    SUFFIX,
    AtomicCheckpointIO,
    newest_checkpoint,
    read_checkpoint,
    run_of,
    step_of,
)
from mhe_lightning.errors import UserError
from mhe_lightning.parsing import Parser, as_user_error


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    folder = Path(options.run)
    out = None if options.out is None else Path(options.out)
    try:
        if options.average < 1:
            raise UserError(f"average ({options.average}) must be at least 1, which is the newest checkpoint alone")
        if options.keep_optimizer and options.average > 1:
            raise UserError(
                f"average ({options.average}) must be 1 with keep_optimizer: an optimizer goes on from one checkpoint"
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; give the run directory, which has it in checkpoints/")
        run_of(folder)
        in_run = out is None or folder.resolve() in out.resolve().parents
        with run.lock(folder) if in_run else nullcontext():
            consolidate = _as_one_file if options.keep_optimizer else partial(_average, count=options.average)
            steps, written = consolidate(folder / "checkpoints", out=out)
    except ValueError as error:
        raise as_user_error(error) or error from error
    print(f"steps:    {', '.join(map(str, steps))}")
    print(
        f"{'one file' if options.keep_optimizer else 'averaged'}: {written} ({written.stat().st_size / 2**20:.1f} MiB)"
    )


def _as_one_file(folder: Path, out: Path | None) -> tuple[list[int], Path]:
    """Write the newest checkpoint in ``folder``, whoever wrote it, as one process writes it."""
    newest = newest_checkpoint(folder)
    assert newest is not None  # `run_of` has found one
    step = step_of(newest)
    out = folder.parent / f"whole-step={step:08d}{SUFFIX}" if out is None else out
    _check_new(out, folder)
    AtomicCheckpointIO().save_checkpoint(read_checkpoint(newest), out)
    return [step], out


def _average(folder: Path, count: int, out: Path | None) -> tuple[list[int], Path]:
    """Write the average of the newest ``count`` checkpoints in ``folder``; their steps, and where it is."""
    paths = last_checkpoints(folder, count)
    if len(paths) < count:
        raise UserError(
            f"average ({count}) must be at most {len(paths)}, the complete checkpoints in {folder}; a run that is "
            f"trained with --checkpoints.keep {count} has more"
        )
    steps = [step_of(path) for path in paths]
    default = averaged_path(folder, steps[-1])
    if out is None or out.resolve() == default.resolve():
        return steps, write_average(folder, paths)
    _check_new(out, folder)
    AtomicCheckpointIO().save_checkpoint(average_checkpoints(paths), out)
    return steps, out


def _check_new(out: Path, folder: Path) -> None:
    """Refuse to write where something is, or where a run keeps its own."""
    if out.exists():
        raise UserError(f"{out} exists; remove it, or choose another --out")
    if out.resolve().parent == folder.resolve():  # by its name `auto` might take it for one to go on from
        raise UserError(f"{folder} is for the run's own checkpoints; leave --out out, or put it elsewhere")


def _parser() -> Parser:
    parser = Parser(
        prog="train.py consolidate",
        description="Write the weights of a run without the state of its optimizer, averaged over its last "
        "checkpoints: to use with --ckpt_path averaged, `generate` and --init_from, not to go on from. Or, with "
        "--keep_optimizer, all of a checkpoint that several processes wrote, in one file.",
    )
    parser.add_argument("run", type=str, help="A run directory.")
    parser.add_argument("--average", type=int, default=1, help="How many of its newest checkpoints to average.")
    parser.add_argument(
        "--keep_optimizer",
        type=bool,
        default=False,
        help="Write all of the newest checkpoint, so that `fit` on one device can go on from the file.",
    )
    parser.add_argument(
        "--out",
        type=str,
        help="A new file (default: averaged-step=….ckpt in the run's checkpoints/, in the place of an earlier one; "
        "whole-step=….ckpt in the run with --keep_optimizer).",
    )
    return parser
