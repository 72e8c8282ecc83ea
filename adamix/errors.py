"""The one exception type that means "the input is wrong", so that callers and the CLI can tell it from a bug."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message names the argument, what was given and what to do. One line."""
