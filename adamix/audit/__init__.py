"""Measures the guarantee: canaries, the size and freshness of the noise, the sampler; through the public interfaces."""

from adamix.audit.audit import Report, Row, audit
from adamix.audit.bounds import Bound, Game, bound
from adamix.audit.checks import Check

__all__ = ["Bound", "Check", "Game", "Report", "Row", "audit", "bound"]
