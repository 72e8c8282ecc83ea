"""AdaMix for models of any size: minibatches, one threshold a layer, and what is trained of a model as one argument."""

from adamix.deep.config import DeepConfig
from adamix.deep.losses import token_loss
from adamix.deep.trainer import DeepAdaMix, DeepResult
from adamix.deep.tuning import Tuned, tune

__all__ = ["DeepAdaMix", "DeepConfig", "DeepResult", "Tuned", "token_loss", "tune"]
