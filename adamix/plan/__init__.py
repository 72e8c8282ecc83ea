"""Planning: what a private training step would take on one machine or many, before there is one."""

from adamix.plan.accounting import Accounting, account
from adamix.plan.estimate import Communication, Estimate, Job, Memory, Time
from adamix.plan.models import SHAPES, Work, resolve
from adamix.plan.rates import PRESETS, Rates, preset
from adamix.plan.steps import Setting

__all__ = [
    "PRESETS",
    "SHAPES",
    "Accounting",
    "Communication",
    "Estimate",
    "Job",
    "Memory",
    "Rates",
    "Setting",
    "Time",
    "Work",
    "account",
    "preset",
    "resolve",
]
