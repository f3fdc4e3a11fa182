"""Variants of an experiment: overlays that name its attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = "attention"


def find_overlays(names: Sequence[str] | None, configs: Sequence[str]) -> dict[str, Path]:
    """The attention overlays of a comparison.

    Args:
        names: paths of YAML files, or the names of some in the folder of overlays; None takes all of them.
        configs: the experiment's config files: the folder is ``attention`` beside one of theirs, or
            ``configs/attention`` in the working directory.

    Returns:
        Name → file; a name is the file's stem.

    Raises:
        ValueError: a name is unknown, or two files have one name.
    """
    folders = [Path(config).parent.parent / FOLDER for config in configs] + [Path("configs") / FOLDER]
    folder = next((f for f in folders if f.is_dir()), None)
    known = {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if names is None:
        if not known:
            raise ValueError("there is no folder configs/attention here; name the attentions, as paths of YAML files")
        return known
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            if name not in known:
                raise ValueError(
                    f"attention {name!r} is none of {', '.join(known) or '(no overlays found)'}; give one of them, or "
                    "the path of a YAML file"
                )
            path = known[name]
        elif not path.is_file():
            raise ValueError(f"attention {name}: there is no such file")
        if found.get(path.stem, path) != path:
            raise ValueError(f"{found[path.stem]} and {path} are both called {path.stem}; rename one")
        found[path.stem] = path
    return found


def config_files(arguments: Sequence[str]) -> list[str]:
    """The values of ``--config`` in a command line."""
    found = []
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c"):
            found += [value] if equals else list(arguments[i + 1 : i + 2])
    return found
