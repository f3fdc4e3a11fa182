"""`consolidate`: the weights of a finished run, averaged over its last checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from mhe_lightning import run
from mhe_lightning.averaging import average_checkpoints, averaged_path, last_checkpoints, write_average
from mhe_lightning.checkpoint import AtomicCheckpointIO, run_of, step_of
from mhe_lightning.errors import UserError
from mhe_lightning.parsing import Parser, as_user_error


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    folder = Path(options.run)
    out = None if options.out is None else Path(options.out)
    try:
        if options.average < 1:
            raise UserError(f"average ({options.average}) must be at least 1, which is the newest checkpoint alone")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; give the run directory, which has it in checkpoints/")
        run_of(folder)
        in_run = out is None or folder.resolve() in out.resolve().parents
        with run.lock(folder) if in_run else nullcontext():
            steps, written = _consolidate(folder / "checkpoints", options.average, out)
    except ValueError as error:
        raise as_user_error(error) or error from error
    print(f"steps:    {', '.join(map(str, steps))}")
    print(f"averaged: {written} ({written.stat().st_size / 2**20:.1f} MiB)")


def _consolidate(folder: Path, count: int, out: Path | None) -> tuple[list[int], Path]:
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
    if out.exists():
        raise UserError(f"{out} exists; remove it, or choose another --out")
    if out.resolve().parent == folder.resolve():  # by its name `auto` might take it for one to go on from
        raise UserError(
            f"{folder} is for the run's own checkpoints; leave --out out for {default.name}, or put it elsewhere"
        )
    AtomicCheckpointIO().save_checkpoint(average_checkpoints(paths), out)
    return steps, out


def _parser() -> Parser:
    parser = Parser(
        prog="train.py consolidate",
        description="Write the weights of a run without the state of its optimizer, averaged over its last "
        "checkpoints: to use with --ckpt_path averaged, `generate` and --init_from, not to go on from.",
    )
    parser.add_argument("run", type=str, help="A run directory.")
    parser.add_argument("--average", type=int, default=1, help="How many of its newest checkpoints to average.")
    parser.add_argument(
        "--out",
        type=str,
        help="A new file (default: averaged-step=….ckpt in the run's checkpoints/, in the place of an earlier one).",
    )
    return parser
