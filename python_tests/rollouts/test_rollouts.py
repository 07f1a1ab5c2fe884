"""What of the rollouts needs no engine: the activation by slots, and the versions on disk."""

import json
import sys

import pytest
import torch
from helpers import relative_error
from hf_models import llama
from peft_models import fill_adapters

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

import afa_kernels as afa
from afa_kernels.operator.activation import phi
from afa_kernels.peft import AFALoraConfig
from afa_kernels.vllm import annealed, save_rollout
from afa_kernels.vllm.annealed import Branch, Slots, branch_in
from afa_kernels.vllm.plugin import register

TARGETS = ["q_proj", "down_proj"]


def adapted(alpha_t: float, **options):
    model = fill_adapters(get_peft_model(llama(), AFALoraConfig(target_modules=TARGETS, r=4, **options)))
    afa.set_alpha_t(model, alpha_t)
    return model.eval()


@pytest.mark.parametrize("packed", [(), (3,)])
def test_each_row_has_the_activation_of_its_slot(packed):
    branches = [Branch(name, 0.3 + 0.1 * i) for i, name in enumerate(afa.activations())]
    slots = Slots(len(branches) + 1, "cpu")
    for slot, branch in enumerate(branches):
        slots.write(slot, Branch("relu", 1.0))  # of the adapter that was there before
        slots.write(slot, branch)
    plain = len(branches)
    rows = torch.arange(-1, plain + 1).repeat(3)[torch.randperm(3 * (plain + 2))]
    z = torch.randn(*packed, len(rows), 5)
    before = z.clone()
    out = slots.apply(z, rows)
    assert torch.equal(z, before)
    for slot, branch in enumerate(branches):
        of_slot = z[..., rows == slot, :]
        expected = phi(of_slot.double(), branch.alpha_t, branch.activation)
        assert relative_error(out[..., rows == slot, :], expected) < 1e-6
    assert torch.equal(out[..., rows == plain, :], z[..., rows == plain, :])
    assert not out[..., rows == -1, :].any()
    padding = torch.tensor([1 << 40, -9])  # what an engine has never written
    assert torch.isfinite(slots.apply(torch.randn(*packed, 2, 5), padding)).all()
    slots.write(0, None)
    assert torch.equal(slots.apply(z, rows)[..., rows == 0, :], z[..., rows == 0, :])


def test_plain_rows_keep_bits_and_pay_for_no_activation(monkeypatch):
    monkeypatch.delattr(annealed, "phi")
    slots = Slots(1, "cpu")
    z = torch.tensor([[float("inf"), -float("inf"), float("nan"), -0.0, 1e-42, 3e38]])
    out = slots.apply(z, torch.tensor([0]))
    assert torch.equal(out.view(torch.int32), z.view(torch.int32))


@pytest.mark.long
def test_compiled_code_sees_new_values_and_is_not_compiled_again():
    """As in an engine, where a graph is captured before the first adapter is there."""
    slots = Slots(2, "cpu")
    compiled = torch.compile(slots.apply, fullgraph=True, backend="eager")
    z, rows = torch.randn(4, 3), torch.tensor([0, 1, -1, 1])
    compiled(z, rows)
    with torch.compiler.set_stance("fail_on_recompile"):
        for alpha_t, activation in ((0.5, "silu"), (1.0, "sin")):
            slots.write(1, Branch(activation, alpha_t))
            assert torch.equal(compiled(z, rows)[1], phi(z[1], alpha_t, activation))
            assert torch.equal(compiled(z, rows)[0], z[0])


@pytest.mark.parametrize("alpha_t", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["peft", "named", "inject"])
def test_a_version_is_an_adapter_that_stock_readers_take_at_alpha_t_0_only(kind, alpha_t, tmp_path):
    if kind == "inject":
        model = llama()
        afa.inject(model, TARGETS, r=4, activation="gelu")
        afa.set_alpha_t(fill_adapters(model), alpha_t)
    else:
        model = adapted(alpha_t, activation="gelu")
        if kind == "named":
            model.add_adapter("policy", AFALoraConfig(target_modules=TARGETS, r=2, activation="gelu", alpha_t=alpha_t))
    rollout = save_rollout(model, tmp_path / "runs", "policy" if kind == "named" else None)
    assert rollout.path == tmp_path / "runs" / "version-000001" and rollout.name == "runs-1"
    assert sorted(p.name for p in rollout.path.iterdir() if p.suffix != ".md")[:2] == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    config = json.loads((rollout.path / "adapter_config.json").read_text())
    assert config["r"] == (2 if kind == "named" else 4)
    if alpha_t:
        assert branch_in(str(rollout.path)) == (Branch("gelu", alpha_t), "none")
        assert "alpha_t = 0.5" in config["bias"]
        with pytest.raises((NotImplementedError, ValueError), match="alpha_t = 0.5"):
            PeftModel.from_pretrained(llama(), rollout.path)
    else:
        assert branch_in(str(rollout.path)) is None
        PeftModel.from_pretrained(llama(), rollout.path)


def test_versions_follow_each_other_and_old_ones_go(tmp_path):
    model = adapted(1.0)
    made = []
    for step in range(4):
        afa.set_alpha_t(model, 1.0 - step / 4)
        made.append(save_rollout(model, tmp_path / "runs", keep=2))
    assert len({r.name for r in made}) == len({r.id for r in made}) == 4
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["version-000003", "version-000004"]
    assert [branch_in(str(r.path))[0].alpha_t for r in made[2:]] == [0.5, 0.25]
    (tmp_path / "runs" / "version-other").mkdir()
    assert save_rollout(model, tmp_path / "runs", keep=1).name == "runs-5"
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["version-000005", "version-other"]


def test_a_version_that_cannot_be_written_leaves_nothing(tmp_path):
    model = get_peft_model(llama(), AFALoraConfig(target_modules=TARGETS, r=4))
    model.base_model.model.model.layers[0].self_attn.q_proj.set_alpha_t(0.5)  # and the others stand at 1
    with pytest.raises(ValueError, match="has one alpha_t for an adapter"):
        save_rollout(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    model = adapted(0.5)
    with pytest.raises(ValueError, match="keep: expected the number of versions .*, got 0"):
        save_rollout(model, tmp_path, keep=0)
    with pytest.raises(ValueError, match="adapter: the model has no adapter 'b'; it has default"):
        save_rollout(model, tmp_path, "b")
    with pytest.raises(ValueError, match="expected AFA layers, found none in LlamaForCausalLM"):
        save_rollout(llama(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_contradict_each_other(tmp_path):
    model = llama()
    afa.inject(model, TARGETS, r=4)
    afa.set_alpha_t(model, 0.5)
    file = save_rollout(model, tmp_path).path / "adapter_config.json"
    assert branch_in(str(file.parent)) == (Branch("silu", 0.5), "none")
    file.write_text(file.read_text().replace('"alpha_t": 0.5', '"alpha_t": 0.25'))
    with pytest.raises(ValueError, match="says alpha_t = 0.25 and .*says 0.5: they belong to different adapters"):
        branch_in(str(file.parent))


def test_a_folder_that_is_not_of_this_package_is_left_to_vllm(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=TARGETS)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "rank_pattern": 3}))
    assert branch_in(str(tmp_path)) is None


def test_without_vllm_the_plugin_says_what_is_missing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level("WARNING", logger="vllm.afa_kernels"):
        register()
    assert "adapters at alpha_t > 0 are refused" in caplog.text
