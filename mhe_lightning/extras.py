"""Optional libraries, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional library.

    Args:
        module: such as "matplotlib.figure".
        extra: of this package, which installs it.
        purpose: what it is needed for, after "to".

    Raises:
        ValueError: it cannot be imported; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{module.partition('.')[0]} must be installed to {purpose} but cannot be imported ({error}); "
            f"run pip install 'mhe-lightning[{extra}]'"
        ) from error
