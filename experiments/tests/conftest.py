"""Tiny models and settings that the tests of the studies share."""

from pathlib import Path

import isolation  # noqa: F401  before torch and transformers: it sets the environment
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh_random_numbers(request):
    """Every test draws its own numbers, the same in every run."""
    torch.manual_seed(sum(map(ord, request.node.name)))


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory) -> str:
    """A byte-level Llama of one layer with random weights."""
    from experiments import data, pretrain

    folder = tmp_path_factory.mktemp("byte-llama")
    pretrain.new_model(32, 1, seed=0).save_pretrained(folder)
    data.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(byte_llama, tmp_path) -> dict:
    """Settings of a training of a second."""
    rates = dict.fromkeys(("lora", "afa_relu", "afa_silu", "afa_gelu"), 1e-2) | {"full_adapted": 1e-3, "full": 1e-3}
    return {
        "model": byte_llama,
        "steps": 10,
        "evaluate_every": 5,
        "curve_examples": 2,
        "test_examples": 4,
        "checkpoint_every": 3,
        "learning_rates": rates,
        "output": str(tmp_path / "out"),
    }


@pytest.fixture
def text_file(tmp_path) -> str:
    file = tmp_path / "license.txt"
    file.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    return str(file)


@pytest.fixture
def interrupted(monkeypatch):
    """Return a function that interrupts a training after a step, once, and then lists the steps that are taken."""

    def at(step: int) -> list[int]:
        from experiments.training import Scores

        whole, taken = Scores.on_step_end, []

        def stop(self, args, state, control, **kwargs):
            if state.global_step == step and "interrupted" not in taken:
                taken.append("interrupted")
                raise KeyboardInterrupt
            taken.append(state.global_step)
            whole(self, args, state, control, **kwargs)

        monkeypatch.setattr(Scores, "on_step_end", stop)
        return taken

    return at
