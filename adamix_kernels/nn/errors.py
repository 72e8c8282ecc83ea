"""The error of a computation that would not be private, or not as it is meant to be."""

from __future__ import annotations


class PrivacyError(RuntimeError):
    """A parameter, a module or a loop that the engine cannot make private; the message names it and the remedy."""
