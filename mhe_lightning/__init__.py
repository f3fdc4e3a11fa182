"""Transformer attention compared, trained and shipped. See ``mhe_lightning.attention`` and the `mhe` command."""

__version__ = "0.1.0"
