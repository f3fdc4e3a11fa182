"""The errors that are told in a few lines."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right: printed in a few lines without a traceback; exit code 2."""


class RunError(Exception):
    """What ended a run that was set up well: printed in a few lines without a traceback; exit code 1."""
