"""Errors a user can act on: what was wrong, what was expected, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input. The command line prints it without a traceback and exits with code 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice closest to ``word`` as a hint for an error message, or the whole list when nothing is close."""
    options = sorted(choices)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(options[:12])
    return f"valid: {shown}{', …' if len(options) > 12 else ''}"


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
