"""Variants of the annealing: other blends, how non-linear a branch is, the studies."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from accelerate.state import AcceleratorState

import afa_kernels as afa
from experiments import annealing
from experiments.harness import adaptation, prototypes, sft_config, sft_tasks
from experiments.tests.sft_helpers import byte_llama, tiny_settings, write_config


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return byte_llama(tmp_path_factory.mktemp("byte-llama"))


@pytest.fixture
def settings(model_folder, tmp_path) -> sft_config.Settings:
    return tiny_settings(model_folder, tmp_path)


@pytest.fixture
def config_file(settings, tmp_path) -> Path:
    return write_config(settings, tmp_path / "tiny.yaml")


@pytest.fixture(autouse=True)
def _a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_blend_with_gain_has_slope_one_at_zero():
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    smooth = [m for m in prototypes.PROTOTYPES.values() if m.activation != "relu"]
    for method in smooth:
        for alpha_t in (0.0, 0.5, 1.0):
            phi = prototypes.blend(z, alpha_t, method.activation, method.gain, method.scale)
            (slope,) = torch.autograd.grad(phi.sum(), z)
            assert slope.tolist() == pytest.approx([1.0 + alpha_t * (method.gain / 2 - 1)] * 3)


def test_a_kept_activation_is_not_annealed(settings):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    afa.inject(model, ["0"], r=2)
    prototypes.use_prototype(model, prototypes.PROTOTYPES["relu_kept"])
    afa.AnnealSchedule(1).attach(model).step()
    assert model[0].alpha_t == 1.0


def test_a_prototype_without_gain_and_scale_is_the_package(settings):
    task = sft_tasks.make(settings)
    models = []
    for change in (False, True):
        model = task.model(0)
        torch.manual_seed(0)
        adaptation.adapt(model, adaptation.METHODS["afa_silu"], adaptation.Adapter(2, 4.0), None)
        for module in model.modules():
            if isinstance(module, afa.AFALinear):
                torch.nn.init.normal_(module.lora_b, std=0.1)
        if change:
            prototypes.use_prototype(model, prototypes.Prototype("same", "adapters", "silu"))
        afa.AnnealSchedule(10).attach(model).step()
        models.append(model)
    torch.testing.assert_close(task.logits(models[0]), task.logits(models[1]), rtol=1e-4, atol=1e-4)


def test_the_share_beyond_a_linear_map():
    z = torch.tensor([[-1.0], [1.0]])
    # relu is (0, 1), the best multiple of z is z / 2: (1/2, 1/2) is left of a vector of length 1.
    assert prototypes.share_of_nonlinearity(z, "relu") == pytest.approx(math.sqrt(0.5))
    assert prototypes.share_of_nonlinearity(z.abs(), "relu") == pytest.approx(0.0, abs=1e-9)
    small = prototypes.share_of_nonlinearity(0.01 * z, "silu")
    assert 0 < small < 0.01 < prototypes.share_of_nonlinearity(z, "silu")


def test_the_studies_run_and_compare_seed_by_seed(config_file, settings, capsys):
    options = ["--config", str(config_file), "--seeds", "2", "--quiet"]
    assert annealing.main(["blends", "inputs", *options]) == 0
    result = json.loads((Path(settings.output) / "annealing.json").read_text())
    rows = {row["label"]: row for row in result["studies"]["blends"]}
    silu, lora = rows["silu"], rows["LoRA"]
    assert silu["differences"] == [a - b for a, b in zip(silu["scores"], lora["scores"], strict=True)]
    assert rows["silu, slope 1 at 0"]["against"] == "silu"
    measured = result["studies"]["inputs"]
    assert {row["alpha_t"] for row in measured} >= {0.0, 1.0}
    assert all(row["size"] > 0 and 0 <= row["share"] <= 1 for row in measured)
    assert (Path(settings.output) / "annealing.png").read_bytes().startswith(b"\x89PNG")
    assert "| silu, slope 1 at 0 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", annealing.STUDIES)
def test_a_study_compares_each_variant_with_one_of_its_own(name, settings):
    variants = annealing.STUDIES[name](settings)
    assert len({v.label for v in variants}) == len(variants)
    cells = {v.label: v.cell(settings, seed=0) for v in variants}
    assert {v.against for v in variants if v.against} <= set(cells)
    for variant in variants:
        if name == "ends" and variant.against:
            assert cells[variant.label].settings.decay_from_frac == cells[variant.against].settings.decay_from_frac
        if name == "ranks" and variant.against:
            assert cells[variant.label].settings.r == cells[variant.against].settings.r
