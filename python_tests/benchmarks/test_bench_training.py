"""The benchmark of training steps: its cells, its memory, its table."""

import json
import os

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from bench import quantize, training

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = training.SIZES | SMALL | {"vocab_size": 32}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(training, "SIZES", SIZES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("model", training.MODELS)
@pytest.mark.parametrize("method", training.METHODS)
def test_every_method_trains(small, method, model, checkpointing):
    step = training.Step(model, "dense", method, checkpointing == "on", 2, 16)
    before = [p.detach().clone() for p in step.model.parameters()]
    trained = [p.requires_grad for p in step.model.parameters()]
    step()
    changed = [not torch.equal(p, old) for p, old in zip(step.model.parameters(), before, strict=True)]
    assert any(changed) and not any(new and not may for new, may in zip(changed, trained, strict=True))
    assert all(trained) == (method == "full")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [name for name in quantize.BASES if name != "dense"])
def test_every_format(small, base):
    library = {"nf4": "bitsandbytes", "bnb-int8": "bitsandbytes", "hqq": "hqq", "quanto-int8": "optimum.quanto"}
    pytest.importorskip(library.get(base, "torchao"), exc_type=ImportError)
    kinds = {}
    for names in ((), training.LINEAR):
        torch.manual_seed(0)
        mlp = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in training.LINEAR})
        quantize.BASES[base](mlp.requires_grad_(False), names)
        kinds[names] = [(type(m), type(getattr(m, "weight", None))) for m in mlp.values()]
    assert all(one != other for one, other in zip(*kinds.values(), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of the resident set to reset")
def test_memory_counts_weights_and_the_state_of_the_optimizer():
    """One layer more of full fine-tuning in 16 bits: its weights, their gradients and two moments of each."""
    layer = 1024 * (1024 * 3 + 2816 * 3) * 2
    one, two = (training.in_a_process("llama", "dense", "full", True, layers, 32) for layers in (1, 2))
    assert two - one == pytest.approx(4 * layer, rel=0.05)


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(training, "in_a_process", lambda *cell: 2_000_000 if cell[2] == "peft" else 1_000_000)
    monkeypatch.setattr(training, "Step", lambda *cell: cell)

    def measured(works, *_):
        for method, work in works.items():
            work.samples = {"step": [500.0 if method == "peft" else 250.0]}

    monkeypatch.setattr(training, "measure", measured)
    monkeypatch.setattr(training.allocator, "use", lambda name: None)  # for this process, and for good
    training.main(["--models", "llama", "--bases", "nf4,dense", "--checkpointing", "on", "--methods", "full,peft,afa"])
    out, err = capsys.readouterr()
    assert "| llama | nf4 | on | – | 2 MB, 500 ms (1.00) | 1 MB, 250 ms (0.50) |" in out
    assert "| llama | dense | on | 1 MB, 250 ms (0.50) |" in out
    assert len([json.loads(line) for line in err.splitlines()]) == 5
    with pytest.raises(SystemExit):
        training.main(["--bases", "nf5"])
    assert "expected some of dense, nf4" in capsys.readouterr().err


def test_saved_bytes_are_those_of_the_formula():
    block = 8192 * (4096 + 2 * 14336 + 3 * 16) * 2
    assert f"| block | {block / 1e9:.3f} |" in training.saved()


@pytest.mark.filterwarnings("ignore")
def test_what_a_merge_keeps():
    assert quantize.kept("dense", 0.1) == pytest.approx(1.0, abs=0.01)
    assert quantize.kept("dense", 1e-4) < 0.3  # less than half a step of bfloat16
