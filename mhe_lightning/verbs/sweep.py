"""`sweep`: variants × seeds × a grid of an experiment, trained one after another and scored."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mhe_lightning import sweep as engine
from mhe_lightning.errors import UserError
from mhe_lightning.experiment import Experiments
from mhe_lightning.parsing import as_user_error
from mhe_lightning.sweep import Children, Config, Numbered, Run, Stopped, Sweep
from mhe_lightning.variants import config_files, find_overlays
from mhe_lightning.verbs.passing import PassingParser, add_variant_arguments

DESCRIPTION = """\
Train variants of an experiment, attentions × seeds × a grid, one after another, and score them. All see the same data
in the same order for the same number of steps, and get the same grid; its points are chosen on the validation split.

Options that are not listed here are those of `fit`, and are passed on to every run: --config, --trainer.max_steps 100,
--model.lr 1e-3. In their values {attention} and {seed} stand for those of the run.

The same command goes on with a sweep that was stopped or killed: finished runs are skipped, the others continue from
their newest checkpoints. Attentions and seeds may be added to it."""

EXAMPLES = """\
examples:
  train.py sweep --config configs/experiment/small_wikitext2.yaml --attentions mha mhe_add sha --seeds 1 2 3 \\
      --root runs/sweeps/wikitext2
  … --grid model.lr=1e-3,2e-3 --grid data.batch_size=16,32
  … --mode equal_parameters --spend feed_forward
  … --init_from 'runs/sweeps/books/{attention}-seed{seed}'
  … --slurm > sweep.sh

Exit codes: 0 done, 1 some runs failed, 2 bad options, 130 or 143 stopped by Ctrl-C or SIGTERM."""


def main(verb: str, args: list[str]) -> None:
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    try:
        grid = engine.parse_grid([text for texts in options.grid for text in texts])
        configs = config_files(rest)
        overlays = find_overlays(options.attentions, configs)
        reference = None
        if options.mode != "equal_architecture":
            (reference,) = find_overlays([options.reference], configs).values()
        sweep = Sweep(
            root=Path(options.root),
            arguments=tuple(rest),
            attentions=overlays,
            seeds=tuple(options.seeds),
            grid=grid,
            mode=options.mode,
            spend=options.spend,
            reference=reference,
            score=options.score,
            split=options.split,
        )
        _run(sweep, options, args)
    except UserError as error:
        raise UserError(f"{error}{parser.hint(str(error))}") from error
    except ValueError as error:
        raise as_user_error(error) or error from error


def _run(sweep: Sweep, options: argparse.Namespace, args: Sequence[str]) -> None:
    experiments = Experiments()
    earlier = engine.read_manifest(sweep.root)
    runs = engine.make_runs(sweep, experiments, sweep.all_seeds(earlier))
    asked = [run for run in runs if run.seed in sweep.seeds]
    # runs of earlier calls with other seeds count when a point of the grid is chosen
    runs = [run for run in runs if run in asked or (earlier is not None and run.name in earlier["runs"])]
    if options.task is not None:
        if not 1 <= options.task <= len(asked):
            raise UserError(f"task ({options.task}) must be from 1 to {len(asked)}, the number of runs")
        runs = [asked[options.task - 1]]
    configs: dict[str, Config] = {run.name: engine.resolve(experiments, run.arguments) for run in runs}
    looks = options.dry_run or options.slurm
    manifest = engine.claim(sweep, experiments, asked)
    for run in runs:
        engine.check_config(configs[run.name], sweep)
        engine.refuse_other_run(sweep.root / run.name, configs[run.name])
        if not looks:
            engine.check_beginning(configs[run.name])
    if not options.dry_run and manifest != earlier:  # tasks of an array find it written
        engine.write_manifest(sweep.root, manifest)
    if options.slurm:
        own = [arg for arg in args if arg != "--slurm"]
        print(engine.slurm_script(own, root=sweep.root, n_runs=len(asked), folder=Path.cwd()), end="")
    elif options.dry_run:
        _tell(sweep, asked, configs)
    else:
        numbers = [n for n in engine.numbered(asked) if n.run in runs]
        _work(sweep, numbers, runs, configs, scores=options.task is None)


def _tell(sweep: Sweep, runs: Sequence[Run], configs: dict[str, Config]) -> None:
    for number in engine.numbered(runs):
        run = number.run
        print(f"{number.place} {run.name}  ({engine.state_of(sweep.root / run.name, configs[run.name])})")
        own = [
            a for a in run.arguments[len(sweep.arguments) :] if not a.startswith(("--name=", "--trainer.default_root"))
        ]
        changed = [new for new, old in zip(run.arguments, sweep.arguments, strict=False) if new != old]
        print(f"    {' '.join([*changed, *own])}")


def _work(
    sweep: Sweep, asked: Sequence[Numbered], runs: Sequence[Run], configs: dict[str, Config], *, scores: bool
) -> None:
    launch = Children()
    try:
        with launch.passing_signals():
            failed = engine.train(sweep, asked, configs, launch)
            if scores:
                failed += _score(sweep, runs, configs, launch)
    except Stopped as stopped:
        print("stopped: the same command goes on from here, and skips what is finished", file=sys.stderr)
        sys.exit(130 if stopped.number == signal.SIGINT else 143)
    if failed:
        print(
            f"{len(failed)} failed: {', '.join(failed)}; the same command tries these again, and skips what is "
            "finished",
            file=sys.stderr,
        )
    if scores:
        print(f"compare: python train.py compare {sweep.root}")
    if failed:
        sys.exit(1)


def _score(sweep: Sweep, runs: Sequence[Run], configs: dict[str, Config], launch: engine.Launch) -> list[str]:
    """Choose each attention's point of the grid, and test its runs."""
    chosen = engine.choose(sweep, runs, configs)
    engine.record_choice(sweep.root, chosen)
    if sweep.grid:
        for attention in sweep.attentions:
            point = chosen.get(attention)
            told = (
                "when all its runs are finished" if point is None else ", ".join(f"{k}={v}" for k, v in point.items())
            )
            print(f"chosen for {attention}: {told}", flush=True)
    if sweep.split == "val" or sweep.score == "none":
        return []
    tested = [
        run
        for run in runs
        if engine.is_finished(sweep.root / run.name, configs[run.name])
        and (not sweep.grid or run.settings == chosen.get(run.attention))
    ]
    return engine.score(sweep, engine.numbered(tested), configs, launch)


def _parser() -> PassingParser:
    parser = PassingParser(
        "sweep",
        usage="train.py sweep --config FILE --seeds N [N …] --root FOLDER [options] [options of fit]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_variant_arguments(parser)
    parser.add_argument("--seeds", nargs="+", type=int, required=True, metavar="N", help="A run for each.")
    parser.add_argument("--root", required=True, metavar="FOLDER", help="Where the runs and sweep.json are kept.")
    parser.add_argument(
        "--grid",
        nargs="+",
        action="append",
        default=[],
        metavar="OPTION=VALUE,VALUE",
        help="Try all combinations; for each attention the one with the best mean score on the validation split at "
        "the end of training is chosen, and it alone is tested.",
    )
    parser.add_argument(
        "--score",
        choices=[*engine.CHECKPOINTS, "none"],
        default="last",
        help="The checkpoint that is tested at the end (default: last); none tests nothing.",
    )
    parser.add_argument(
        "--split",
        choices=["test", "val"],
        default="test",
        help="Where variants are scored (default: test); val, for data without labels for testing, takes the scores "
        "at the end of training.",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry_run", action="store_true", help="Print the runs and what each sets, and run nothing.")
    how.add_argument(
        "--slurm",
        action="store_true",
        help="Print a script that submits a SLURM array, a task per run, and a job that scores; submit nothing.",
    )
    how.add_argument("--task", type=int, metavar="I", help="Train the I-th run alone, from 1, as the array does.")
    return parser
