"""Finished runs as they lie in their folders: what each was, and whether two may be compared."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mhe_lightning.callbacks.metrics_csv import METRICS
from mhe_lightning.callbacks.run_record import CONFIG, RESULTS, VERB_OF, read_results
from mhe_lightning.checkpoint import step_of
from mhe_lightning.comparison.results import Curve, Metric
from mhe_lightning.errors import UserError
from mhe_lightning.run import differences
from mhe_lightning.sweep import MANIFEST, read_manifest, task_of

CATEGORIES = ("data", "tokenizer", "budget", "versions", "settings", "evaluation", "mode")
"""What runs that are compared have in common, unless a user allows otherwise."""

_BUDGET_OF_DATA = ("batch_size", "batch_tokens", "block_length", "max_length")
_NOT_DATA = ("seed", "tokenizer", "cache_dir", "num_workers", "verify_shards", "eval_batch_size")
_NOT_SETTINGS = (
    "max_steps",
    "accumulate_grad_batches",
    "default_root_dir",
    "logger",
    "callbacks",
    "plugins",
    "profiler",
    "enable_progress_bar",
    "enable_model_summary",
    "val_check_interval",
    "log_every_n_steps",
)
_SAME_VARIANT = ("dropout", "bias", "embedding_std", "form")
"""Arguments of an attention that make no other variant of it."""

_ATTENTIONS = ("attention", "encoder_attention", "decoder_attention", "cross_attention")


@dataclass(frozen=True)
class FinishedRun:
    """A training that has reached its last step.

    Args:
        path: its folder.
        attention: name of its attention, as its sweep has it, or made from its class.
        seed: of everything that was drawn.
        mode: what its sweep made equal; "equal_architecture" outside of one.
        spend: where parameters or FLOPs that its attention saves went; None in "equal_architecture".
        sizes: what that changed in the net, option → value.
        settings: its point of the sweep's grid, option → value.
        config: of the run.
        results: what it left in ``results.json``.
    """

    path: Path
    attention: str
    seed: int
    mode: str
    spend: str | None
    sizes: Mapping[str, int]
    settings: Mapping[str, Any]
    config: dict[str, Any]
    results: dict[str, Any]

    @property
    def task(self) -> str:
        """What was trained on, such as "glue-sst2" or "wikitext-2-v1"."""
        data = self.results.get("data", {})
        name = data.get("label") or data.get("subset") or str(data.get("path", "")).rstrip("/").rpartition("/")[2]
        return str(name or self.config["data"]["class_path"].rpartition(".")[2])

    @property
    def metric(self) -> Metric:
        """What models of its task are compared by."""
        task = task_of(self.config)
        return Metric(task.score, task.higher_is_better, task.score_unit)

    def has_score(self, split: str) -> bool:
        """Whether it was scored on "val" or "test"."""
        return f"{split}/{self.metric.name}" in self._scores(split)

    def score(self, split: str) -> float:
        """As recorded: of the last `test`; of validation, that at the end of training or of the last `validate`.

        Raises:
            UserError: there is none.
        """
        key = f"{split}/{self.metric.name}"
        scored, trained = self._evaluation(split).get("data", {}).get("init_args", {}), self.config["data"]["init_args"]
        if scored.get("task") != trained.get("task") and scored:
            verb = VERB_OF[split]
            raise UserError(
                f"the last `{verb}` of {self.path}, a run of {trained.get('task')}, was on {scored.get('task')}; run "
                f"`{verb}` on {trained.get('task')} again"
            )
        if key not in self._scores(split):
            raise UserError(f"{self.path} has no {key}; run `{VERB_OF[split]}` on it, or compare another --split")
        return float(self._scores(split)[key])

    def _scores(self, split: str) -> Mapping[str, float]:
        found: Mapping[str, float] = self._evaluation(split).get("metrics") or self.results.get("metrics", {})
        return found

    def _evaluation(self, split: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.results.get("evaluations", {}).get(VERB_OF[split], {})
        return found

    def facts(self, split: str, sized: Iterable[str] = ()) -> dict[str, Any]:
        """What it must have in common with runs that it is compared with, by category; not the options ``sized``."""
        config, data = deepcopy(self.config), dict(self.results.get("data", {}))
        tokenizer = {key: data.pop(key, None) for key in ("tokenizer_sha256", "vocab_size")}
        for key in ("epochs", *_BUDGET_OF_DATA):  # those of the budget are in the config, too
            data.pop(key, None)
        for key in (*self.sizes, *self.settings, *sized):
            _remove(config, key)
        model, own = config["model"], config["data"].get("init_args", {})
        net = model["init_args"]["net"]["init_args"]
        specs = {key: net.pop(key, None) for key in _ATTENTIONS}
        common = {
            key: {name: spec.get("init_args", {}).get(name) for name in ("dropout", "bias")}
            for key, spec in specs.items()
            if spec is not None
        }
        if "corpus_sha256" in data:  # then where it lies does not matter
            data.pop("path", None)
            for key in ("path", "tokenizer", "validation_path", "test_path"):
                own.get("corpus", {}).pop(key, None)
        trainer = config["trainer"]
        budget = {f"data.{key}": own.pop(key) for key in _BUDGET_OF_DATA if key in own}
        budget |= {f"trainer.{key}": trainer.get(key) for key in ("max_steps", "accumulate_grad_batches")}
        for key in _NOT_DATA:
            own.pop(key, None)
        evaluation = self._evaluation(split)
        return {
            "data": {"data": config["data"], "found": data},
            "tokenizer": tokenizer,
            "budget": {**budget, "steps": self.results.get("steps")},
            "versions": {**self.results.get("versions", {}), "git_commit": self.results.get("git_commit")},
            "settings": {
                "model": model,
                "trainer": {key: value for key, value in trainer.items() if key not in _NOT_SETTINGS},
                "attention": common,
                "init_from": self._pretrained(),
                "world_size": self.results.get("world_size"),
            },
            "evaluation": {
                "checkpoint": self._checkpoint(split),
                "signatures": evaluation.get("signatures"),
                "data": {
                    key: there
                    for key, _, there in differences(self.config["data"], evaluation.get("data", self.config["data"]))
                    if key.rpartition(".")[2] not in (*_NOT_DATA, "batch_size", "batch_tokens")
                },
            },
        }

    def _pretrained(self) -> str | None:
        """What it began with, its own attention and any seed left out of the name."""
        begun = self.config.get("init_from")
        if begun is None:
            return None
        return re.sub(r"seed=?\d+", "{seed}", str(begun).replace(self.attention, "{attention}"))

    def _checkpoint(self, split: str) -> dict[str, Any]:
        """Which of its checkpoints was scored, and how that was chosen or made."""
        path = self._evaluation(split).get("checkpoint")
        if path is None:
            return {"kind": "last", "made": {}}
        kind = Path(path).name.partition("step")[0].rstrip("-") or "last"
        made = {"averaged": ("averaging",), "best": ("checkpoints",)}.get(kind, ())
        step = step_of(Path(path))
        if kind == "last" and step != self.results.get("steps"):
            kind = f"step {step}"
        return {"kind": kind, "made": {key: self.config.get(key) for key in made}}

    def of_its_attention(self) -> dict[str, Any]:
        """What it must have in common with the runs of its attention alone."""
        net = self.config["model"]["init_args"]["net"]["init_args"]
        return {**{key: net[key] for key in _ATTENTIONS if key in net}, **self.sizes, **self.settings}

    def curves(self) -> dict[str, dict[int, float]]:
        """Logged quantity → step → value."""
        path = self.path / METRICS
        found: dict[str, dict[int, float]] = defaultdict(dict)
        if not path.is_file():
            return found
        wanted = ("train/loss", "val/loss", f"val/{self.metric.name}")
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name in wanted:
                    if row.get(name):
                        found[name][int(float(row["step"]))] = float(row[name])
        return found


def find_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs in some folders, each once.

    Args:
        paths: run directories, roots of sweeps, or folders of run directories. Of a sweep with a grid, the runs at
            each attention's chosen point.

    Returns:
        The runs, and what was left out, a sentence each.

    Raises:
        UserError: a folder holds no runs, or a run's record cannot be read.
    """
    found: dict[Path, FinishedRun] = {}
    left_out: list[str] = []
    for path in paths:
        folders = _folders(path, left_out)
        if not folders:
            raise UserError(f"{path} holds no finished runs: there is no {RESULTS} in it or in its folders")
        for folder in folders:
            run = _read(folder)
            if run is None:
                left_out.append(f"{folder.name} is not finished and was left out.")
            else:
                found[folder.resolve()] = run
    return list(found.values()), left_out


def refuse_differences(runs: Sequence[FinishedRun], split: str, reference: str, allowed: Iterable[str]) -> list[str]:
    """Say in what runs of one task differ besides their attention, and refuse to go on unless it is allowed.

    Args:
        runs: of one task.
        split: whose scores are compared.
        reference: the attention whose runs belong to any mode.
        allowed: some of `CATEGORIES`.

    Returns:
        A sentence for each allowed difference.

    Raises:
        UserError: a difference that is not allowed, named.
    """
    # the size of one run says nothing about that of others, but those without one must agree
    first, notes = next((run for run in runs if not run.sizes), runs[0]), []
    found: dict[str, str] = {}
    of_attention: dict[str, FinishedRun] = {}
    for run in runs:
        facts = first.facts(split, run.sizes)
        for category, theirs in run.facts(split, first.sizes).items():
            for key, one, other in differences(facts[category], theirs):
                found.setdefault(category, f"{key} is {one!r} in {first.path} and {other!r} in {run.path}")
        twin = of_attention.setdefault(run.attention, run)
        for key, one, other in differences(twin.of_its_attention(), run.of_its_attention()):
            found.setdefault("settings", f"{key} is {one!r} in {twin.path} and {other!r} in {run.path}")
    seen: dict[int, FinishedRun] = {}
    for run in (
        runs if not any(_changes_budget(run) for run in runs) else ()
    ):  # batches that are filled by tokens differ from seed to seed
        other = seen.setdefault(run.seed, run)
        if run.results.get("tokens_seen") != other.results.get("tokens_seen"):
            tokens = (
                f"{other.results.get('tokens_seen')} in {other.path} and {run.results.get('tokens_seen')} in {run.path}"
            )
            found.setdefault("budget", f"tokens_seen is {tokens}")
    modes = {(run.mode, run.spend): run for run in runs if run.attention != reference}
    if len(modes) > 1:
        (one, a), (two, b) = list(modes.items())[:2]
        told = [" by ".join(filter(None, mode)) for mode in (one, two)]
        found["mode"] = f"{a.path} is of a sweep of {told[0]}, {b.path} of one of {told[1]}"
    for category, what in found.items():
        if category not in allowed:
            raise UserError(f"the runs differ in {category}: {what}; compare them all the same with --allow {category}")
        notes.append(f"Runs differ in {category}, which was allowed: {what}.")
    return notes


def _changes_budget(run: FinishedRun) -> bool:
    """Whether its sweep's grid varies how much is trained on."""
    keys = (*_BUDGET_OF_DATA, "max_steps", "accumulate_grad_batches")
    return any(option.rpartition(".")[2] in keys for option in run.settings)


def mean_curves(runs: Sequence[FinishedRun]) -> list[Curve]:
    """The curves of runs that differ by their seed, averaged at the steps that all have."""
    each = [run.curves() for run in runs]
    names = [name for name in each[0] if all(name in curves for curves in each)]
    found = []
    for name in names:
        steps = sorted(set.intersection(*(set(curves[name]) for curves in each)))
        values = [sum(curves[name][step] for curves in each) / len(each) for step in steps]
        found.append(Curve(name, steps, values))
    return found


def attention_name(net: Mapping[str, Any]) -> str:
    """The name of a net's attention by its class and what makes a variant of it; of each place if they differ."""
    places = [net.get(f"{place}_attention") or net["attention"] for place in ("encoder", "decoder", "cross")]
    names = [_name_of(spec) for spec in places]
    return names[0] if len(set(names)) == 1 else "/".join(names)


def _name_of(spec: Mapping[str, Any]) -> str:
    name = str(spec["class_path"]).rpartition(".")[2].lower()
    own = {k: v for k, v in spec.get("init_args", {}).items() if k not in _SAME_VARIANT}
    return "_".join([name, *(str(value) for value in own.values() if value is not None)])


def _folders(path: Path, left_out: list[str]) -> list[Path]:
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        assert manifest is not None
        chosen = manifest["chosen"]
        folders = []
        for name, entry in manifest["runs"].items():
            if manifest["grid"] and entry["attention"] not in chosen:
                raise UserError(
                    f"{path}: no point of the grid is chosen for {entry['attention']} yet; run the sweep on"
                )
            if manifest["grid"] and entry["settings"] != chosen[entry["attention"]]:
                continue
            if (path / name).is_dir():
                folders.append(path / name)
            else:
                left_out.append(f"{name} has not begun and was left out.")
        return folders
    if (path / RESULTS).is_file():
        return [path]
    return sorted(folder.parent for folder in path.glob(f"*/{RESULTS}"))


def _read(folder: Path) -> FinishedRun | None:
    try:
        results = read_results(folder)
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if results.get("steps") != config["trainer"]["max_steps"] or "finished" not in results:
            return None
        seed, attention = results["seed"], attention_name(config["model"]["init_args"]["net"]["init_args"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())  # YAML's are of several lines
        raise UserError(f"{folder}: its record cannot be read ({what}); restore it, or leave the run out") from error
    manifest = read_manifest(folder.parent) or {}
    entry = manifest.get("runs", {}).get(folder.name)
    if entry is None:
        entry = {"attention": attention}
        manifest = {}
    return FinishedRun(
        path=folder,
        attention=entry["attention"],
        seed=seed,
        mode=manifest.get("mode", "equal_architecture"),
        spend=manifest.get("spend"),
        sizes=entry.get("sizes", {}),
        settings=entry.get("settings", {}),
        config=config,
        results=results,
    )


def _remove(config: dict[str, Any], option: str) -> None:
    """Take an option such as ``model.net.ff_width`` out of a config, where ``init_args`` are not written."""
    *path, last = option.split(".")
    place: Any = config
    for key in path:
        place = place.get(key) if key in place else place.get("init_args", {}).get(key)
        if not isinstance(place, dict):
            return
    place.pop(last, None)
    if isinstance(place.get("init_args"), dict):
        place["init_args"].pop(last, None)
