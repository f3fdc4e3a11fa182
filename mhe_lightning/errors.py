"""The error that a user can put right."""


class UserError(Exception):
    """Something that the user can put right: printed in a few lines without a traceback; exit code 2."""
