"""The file that says which sweep a folder holds, so that another one is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mhe_lightning.experiment import Experiments
from mhe_lightning.files import write_text
from mhe_lightning.run import differences
from mhe_lightning.sweep.configs import config_differences, resolve, told
from mhe_lightning.sweep.options import parsed, substituted
from mhe_lightning.sweep.runs import Run, Sweep

MANIFEST = "sweep.json"
FORMAT_VERSION = 1


def claim(sweep: Sweep, experiments: Experiments, runs: Sequence[Run]) -> dict[str, Any]:
    """The manifest of the sweep's root with this sweep in it, to be written.

    Args:
        sweep: what is compared.
        experiments: reads configs.
        runs: of this sweep.

    Returns:
        The manifest: ``format_version``, what the sweep was given, the experiment's resolved ``config``, ``runs`` by
        name, and the grid point that was ``chosen`` for each attention, once it is known.

    Raises:
        ValueError: the root holds a sweep that differs in more than attentions, seeds and what is scored.
    """
    old = read_manifest(sweep.root)
    new = _manifest(sweep, experiments, runs, old)
    if old is not None:
        _refuse_other(sweep.root, old, new)
        new["attentions"] = {**old["attentions"], **new["attentions"]}
        new["runs"] = {**old["runs"], **new["runs"]}
        new["chosen"] = old["chosen"]
        for key in ("score", "split"):
            if new[key] != old[key]:
                print(f"{key}: was {old[key]}, now {new[key]}", flush=True)
    return new


def _manifest(
    sweep: Sweep, experiments: Experiments, runs: Sequence[Run], old: Mapping[str, Any] | None
) -> dict[str, Any]:
    sized = sweep.mode != "equal_architecture"
    seeds = sweep.all_seeds(old)
    # the same substitutes as in the first call: what has grown since comes after
    attention = next(iter(old["attentions"] if old else sweep.attentions))
    return {
        "format_version": FORMAT_VERSION,
        "mode": sweep.mode,
        "spend": sweep.spend if sized else None,
        "reference": sweep.reference.stem if sized and sweep.reference else None,
        "grid": {key: list(values) for key, values in sweep.grid.items()},
        "score": sweep.score,
        "split": sweep.split,
        "attentions": {name: _overlay(path) for name, path in sweep.attentions.items()},
        "seeds": seeds,
        "arguments": list(sweep.arguments),
        "config": resolve(experiments, substituted(sweep.arguments, attention, seeds[0])),
        "runs": {
            run.name: {
                "attention": run.attention,
                "seed": run.seed,
                "settings": {key: parsed(value) for key, value in run.settings.items()},
                "sizes": dict(run.sizes),
            }
            for run in runs
        },
        "chosen": {},
    }


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a sweep; None if ``root`` holds none.

    Raises:
        ValueError: it cannot be read.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another --root, or restore the file") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this version of mhe_lightning reads {FORMAT_VERSION}")
    return manifest


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a sweep, completely or not at all, unless it is there already."""
    if manifest != read_manifest(root):
        write_text(root / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def record_choice(root: Path, chosen: Mapping[str, Mapping[str, str]]) -> None:
    """Put each attention's grid point into the manifest of a sweep."""
    manifest = read_manifest(root)
    assert manifest is not None, "a sweep claims its root before it runs"
    values = {name: {key: parsed(value) for key, value in point.items()} for name, point in chosen.items()}
    write_manifest(root, {**manifest, "chosen": {**manifest["chosen"], **values}})


def _refuse_other(root: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    found = []
    for key in ("mode", "spend", "reference", "grid"):
        found += differences(old[key], new[key], key)
    for key in ("attentions", "runs"):
        common = [name for name in new[key] if name in old[key]]
        for name in common:
            found += differences(old[key][name], new[key][name], f"{key}.{name}")
    found += config_differences(old["config"], new["config"])
    # what depends on the attention or the seed is not in a config of one of each
    was, now = ([a for a in m["arguments"] if "{attention}" in a or "{seed}" in a] for m in (old, new))
    found += differences(was, now, "arguments")
    if found:
        raise ValueError(
            f"{root} holds another sweep: {told(found)}; choose another --root (attentions and seeds may be added)"
        )


def _overlay(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
