"""Values computed from private rows without noise: nothing but reveal() gets at them."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import batch, classifier, engine, run, step

from adamix_kernels import OutsideGuaranteeWarning, Private

SECRET = 0.123456789


def value() -> Private[Any]:
    return Private("clipped_fraction", lambda: SECRET)


WAYS: dict[str, Callable[[Any], Any]] = {
    "print": print,
    "str": str,
    "f-string": lambda v: f"{v}",
    "format with a width": lambda v: f"{v:.3f}",
    "percent": lambda v: "%s" % v,  # noqa: UP031
    "percent d": lambda v: "%.3f" % v,  # noqa: UP031
    "str.format": "{}".format,
    "float": float,
    "int": int,
    "complex": complex,
    "bool": bool,
    "if": lambda v: 1 if v else 0,
    "round": round,
    "floor": math.floor,
    "isfinite": math.isfinite,
    "index": lambda v: [1, 2][v],
    "bytes": bytes,
    "equal": lambda v: v == SECRET,
    "equal to another": lambda v: v == value(),
    "not equal": lambda v: v != SECRET,
    "less": lambda v: v < 1,
    "greater, reflected": lambda v: v > 1,
    "min": lambda v: min(v, 1.0),
    "sorted": lambda v: sorted([v, v]),
    "in a list": lambda v: 0.5 in [v],
    "dictionary key": lambda v: {v: 1},
    "set": lambda v: {v},
    "add": lambda v: v + 1,
    "add, reflected": lambda v: 1 + v,
    "sum": lambda v: sum([v]),
    "multiply": lambda v: 100 * v,
    "negate": lambda v: -v,
    "abs": abs,
    "power": lambda v: 2**v,
    "length": len,
    "iterate": list,
    "unpack": lambda v: [*v],
    "item": lambda v: v[0],
    "pickle": pickle.dumps,
    "torch.save": lambda v: torch.save(v, io.BytesIO()),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "JSON": json.dumps,
    "JSON in a record": lambda v: json.dumps({"step": 1, "x": [v]}),
    "JSON as text": lambda v: json.dumps({"x": v}, default=str),
    "JSON as number": lambda v: json.dumps({"x": v}, default=float),
    "asdict": lambda v: dataclasses.asdict(dataclasses.make_dataclass("R", ["x"])(v)),
    "numpy": np.asarray,
    "numpy of a list": lambda v: np.array([v], dtype=float),
    "numpy sum": lambda v: np.add(v, 1.0),
    "torch.tensor": torch.tensor,
    "torch.as_tensor": torch.as_tensor,
    "torch sum": lambda v: torch.ones(2) + v,
    "torch function": lambda v: torch.maximum(v, torch.ones(1)),
    "torch list": lambda v: torch.tensor([v]),
    "item()": lambda v: v.item(),
    "tolist()": lambda v: v.tolist(),
    "vars": vars,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_other_way_is_refused(way: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((TypeError, AttributeError)) as caught:
        WAYS[way](value())
    said = str(caught.value) + "".join(capfd.readouterr())
    assert "0.12" not in said and "0.5" not in said
    # json and vars have words of their own, which do not ask the value.
    if way not in ("JSON", "JSON in a record", "vars"):
        assert "reveal()" in said and "outside the privacy guarantee" in said
        assert "clipped_fraction" in said


def test_only_repr_shows_and_not_the_value() -> None:
    shown = "<private clipped_fraction, outside the guarantee; call reveal()>"
    assert repr(value()) == shown
    assert repr([value()]) == f"[{shown}]" and f"{value()!r}" == shown
    assert not hasattr(value(), "__dict__") and not hasattr(value(), "item")


def test_a_logger_does_not_get_it(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.Logger("test")
    log.addHandler(handler)
    raised, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        log.info("clipped %s", value())
        log.info(value())
    finally:
        logging.raiseExceptions = raised
    assert stream.getvalue() == ""


def test_reveal_warns_and_gives_the_value() -> None:
    with pytest.warns(OutsideGuaranteeWarning, match="clipped_fraction: .*outside the guarantee") as caught:
        assert value().reveal() == SECRET
    assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(5):
            value().reveal()
    assert len(seen) == 1, "Python's own filter shows a line's warning once"


def test_nothing_is_computed_before_it_is_revealed() -> None:
    calls: list[int] = []
    held: Private[int] = Private("samples", lambda: calls.append(1) or 7)
    with pytest.raises(TypeError):
        float(held)
    assert repr(held) and not calls
    with pytest.warns(OutsideGuaranteeWarning):
        assert held.reveal() == 7 and calls == [1]


def test_metrics_of_the_engine_are_private() -> None:
    dp = engine(classifier(), measure_signal=True)
    run(dp, batch())
    step(dp)
    metrics = dp.metrics()
    public = [name for name in dir(metrics) if not name.startswith("_")]
    assert sorted(public) == ["clipped_fraction", "norm_quantiles", "norms", "samples", "signal_to_noise"]
    for name in public:
        found = getattr(metrics, name)
        assert type(found() if name == "norm_quantiles" else found) is Private
    assert repr(metrics) == str(metrics) == "<private metrics of a step, outside the guarantee; call reveal() on each>"
    for save in (pickle.dumps, copy.copy, copy.deepcopy, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(TypeError, match=r"metrics: .*reveal\(\)"):
            save(metrics)
    with pytest.raises(TypeError):
        json.dumps(metrics)
