"""Errors that a user can cause, and that the command line prints as one line."""


class UserError(Exception):
    """Base of every error raised on purpose; its text says what, where and what to do, in one line."""


def one_line(error: BaseException) -> str:
    """What another library's error says, for a part of such a text: at most 200 characters."""
    return " ".join(str(error).split())[:200]
