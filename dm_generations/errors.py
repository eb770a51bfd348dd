"""Errors that a user can cause, and that the command line prints as one line."""


class UserError(Exception):
    """Base of every error raised on purpose; its text says what, where and what to do, in one line."""
