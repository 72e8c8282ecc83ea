"""AdaMix: differentially private training on public and private data together."""

from adamix.config import Config
from adamix.data import Split, load_split
from adamix.deep import DeepAdaMix, DeepConfig, DeepResult
from adamix.errors import InputError
from adamix.features import extract_features
from adamix.ledger import Ledger
from adamix.privacy import calibrate, dp_event, spent, spent_on, spent_together
from adamix.private_phase import Step
from adamix.rows import Rows
from adamix.trainer import AdaMix, Result

__all__ = [
    "AdaMix",
    "Config",
    "DeepAdaMix",
    "DeepConfig",
    "DeepResult",
    "InputError",
    "Ledger",
    "Result",
    "Rows",
    "Split",
    "Step",
    "calibrate",
    "dp_event",
    "extract_features",
    "load_split",
    "spent",
    "spent_on",
    "spent_together",
]
