"""What is trained of a model: all of it, its head, its biases, low-rank adapters, or parameters by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from adamix.errors import InputError
from adamix.storage import one_line, require

MODES = ("full", "head", "bias", "lora")
#: What classifiers call their last layer, in the order in which they are looked for.
_HEADS = ("classifier", "head", "heads", "fc", "score", "classification_head")
#: In the names of an adapter's parameters, by peft.
_ADAPTER = ".lora_"


@dataclass(frozen=True)
class Tuned:
    """What of a model is trained: parameters `names`, `count` numbers of `total` in the model."""

    mode: str
    names: tuple[str, ...]
    count: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.count / self.total
        return f"{self.mode}: {self.count:,} of {self.total:,} parameters are trained ({share:.3g} %)"


def tune(
    model: nn.Module,
    mode: str = "full",
    *,
    head: str | None = None,
    lora_rank: int = 8,
    lora_alpha: float | None = None,
) -> Tuned:
    """Set which parameters of `model` are trained, in place.

    Args:
        mode: "full": those that require a gradient as the model comes. "head": the last layer. "bias": all biases and
            the head (BitFiT, Ben Zaken et al. 2021, arXiv 2106.10199). "lora": adapters of rank `lora_rank` beside
            every linear layer but the head (Hu et al. 2021, arXiv 2106.09685), and the head; they come from `peft`,
            within the model, which keeps its class; adapters that it has already are trained as they are. Anything
            else: patterns of parameter names, as in a shell, with spaces between them ("*.attention.* *.norm.*").
        head: name of the head's module; None: the layer of output scores, called "classifier", "head" or the like, else
            the last linear layer. The output layer of a language model is no such head for "bias" and "lora": its row
            for every word takes more noise than it brings, and it is often the input's table too. Name it to train it.
        lora_rank: of each adapter, at least 1.
        lora_alpha: adapters are multiplied by `lora_alpha / lora_rank`; None: 2 * lora_rank.

    Raises:
        InputError: nothing in the model fits; the message says what there is.
    """
    names = [name for name, _ in model.named_parameters()]
    if not names:
        raise InputError("model: it has no parameters; pass a model that does")
    if mode == "full":
        chosen = {name for name, p in model.named_parameters() if p.requires_grad}
    elif mode == "head":
        chosen = _of_module(model, find_head(model, head))
    elif mode == "bias":
        chosen = {name for name in names if _is_bias(name.rpartition(".")[2])}
        if not chosen:
            raise InputError("tune: 'bias' given, but the model has no bias; pass 'lora', or 'head'")
        chosen |= _classifier(model, head)
    elif mode == "lora":
        beside = _classifier(model, head)
        if not has_adapters(model):  # of a fit before, or of the caller
            _add_adapters(model, beside, lora_rank, 2 * lora_rank if lora_alpha is None else lora_alpha)
        chosen = {name for name, _ in model.named_parameters() if _ADAPTER in name} | beside
    else:
        chosen = _by_pattern(names, mode)
    if not chosen:
        raise InputError(f"tune: {mode!r} given, but no parameter of the model requires a gradient; unfreeze some")
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    parameters = dict(model.named_parameters())
    return Tuned(
        mode,
        tuple(name for name in parameters if name in chosen),
        sum(parameters[name].numel() for name in chosen),
        sum(p.numel() for p in parameters.values()),
    )


def has_adapters(model: nn.Module) -> bool:
    return any(_ADAPTER in name for name, _ in model.named_parameters())


def find_head(model: nn.Module, name: str | None = None) -> str:
    """Name of the module that makes the output scores.

    Raises:
        InputError: there is none of that name, or none that is plain.
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules or not any(True for _ in modules[name].parameters()):
            linear = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
            raise InputError(
                f"head: {name!r} is no module with parameters in the model; its linear layers are "
                f"{', '.join(linear[-5:]) or 'none'}"
            )
        return name
    output = _output_embeddings(model)
    if output is not None:
        return next(n for n, m in modules.items() if m is output)
    for known in _HEADS:
        if known in modules and any(True for _ in modules[known].parameters()):
            return known
    found = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
    if not found:
        raise InputError("head: the model has no linear layer to take for it; name the module, head='...'")
    return found[-1]


def _is_bias(name: str) -> bool:
    """Also of recurrent layers (bias_ih_l0) and of attention (in_proj_bias)."""
    return name.startswith("bias") or name.endswith("bias")


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """Of a language model of transformers."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()


def _classifier(model: nn.Module, head: str | None) -> set[str]:
    """Parameters of the head, unless it is the output layer of a language model that nobody named."""
    if head is None and _output_embeddings(model) is not None:
        return set()
    return _of_module(model, find_head(model, head))


def _of_module(model: nn.Module, module: str) -> set[str]:
    """Names as `named_parameters` has them, in which a parameter that is used twice stands once."""
    inside = {id(p) for p in model.get_submodule(module).parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}


def _by_pattern(names: Iterable[str], patterns: str) -> set[str]:
    names, chosen = list(names), set[str]()
    for pattern in patterns.split():
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            shown = ", ".join(names[:3] + ["..."] * (len(names) > 4) + names[3:][-1:])
            raise InputError(
                f"tune: {pattern!r} is none of {', '.join(MODES)}, and matches no parameter; pass one of them, or "
                f"patterns of these names: {shown}"
            )
        chosen |= found
    return chosen


def _add_adapters(model: nn.Module, beside: set[str], rank: int, alpha: float) -> None:
    peft = require("peft", "peft", "tune='lora'")
    output = _output_embeddings(model)
    kept = {id(p) for name, p in model.named_parameters() if name in beside}
    # Exactly these types: a subclass may be used by its weight alone (the projection of nn.MultiheadAttention).
    targets = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
        and module is not output
        and not any(id(p) in kept for p in module.parameters())
    }
    if not targets:
        raise InputError(
            "tune: 'lora' given, but the model has no nn.Linear beside its head; pass 'head', 'bias' or 'full'"
        )
    transposed = any(type(module).__name__ == "Conv1D" for module in targets.values())
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), fan_in_fan_out=transposed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out")  # where both kinds of layer are in a model
            peft.inject_adapter_in_model(config, model)
    except Exception as error:  # peft raises many types
        raise InputError(f"tune: peft cannot add adapters to the model ({one_line(error)}); pass 'head'") from error
