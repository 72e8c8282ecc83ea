"""The examples run, learn something and say what it cost."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "examples"


def tiny(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(["--tiny"])


def test_cnn(capsys):
    pytest.importorskip("sklearn")
    assert tiny("cnn") > 0.8
    assert "epsilon 8.00" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_llm_lora(capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    assert tiny("llm_lora") < 1.5  # from ln 32 = 3.5
    assert "epsilon 8.00" in capsys.readouterr().out


def test_vit(capsys):
    pytest.importorskip("timm", reason="timm needs a torchvision that fits torch", exc_type=ImportError)
    pytest.importorskip("sklearn")
    assert tiny("vit") > 0.1
    assert "epsilon 8.00" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60
