"""The scope "model": a training step of transformer blocks, adapted as the users of each package do it."""

import dataclasses

import pytest
import torch
from bench_rows import TINY

from afa_kernels import AFALinear
from bench.providers import providers
from bench.shapes import TRANSFORMERS, Transformer
from bench.transformer import Operands, Step, checking

MODEL = Transformer("tiny", 2, 48, 72, 2)
CASE = TINY._replace(scope="model", layer="tiny", m=40, k=48, n=72, bias=False)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(TRANSFORMERS, "tiny", MODEL)


@pytest.mark.parametrize(
    "dtype, adapter_dtype, alpha_t",
    [("f32", "f32", 0.5), ("f32", "f32", 0.0), ("bf16", "bf16", 0.5), ("bf16", "f32", 0.5)],
)
def test_every_provider_is_right(dtype, adapter_dtype, alpha_t):
    case = CASE._replace(dtype=dtype, adapter_dtype=adapter_dtype, alpha_t=alpha_t)
    checked = checking(case)
    here = {name: p for name, p in providers().items() if name != "compiled" and p.absent(case) is None}
    checks = {name: checked(provider)[1] for name, provider in here.items()}
    assert all(check.right for check in checks.values()), checks
    assert {"frozen", "eager", "afa", "afa.torch", "afa.separate"} <= here.keys()
    assert ("peft" in here) == ("afa.peft" in here) == ("afa.accelerate" in here)
    assert ("afa.identity" in here) == bool(alpha_t)


def test_another_alpha_t_is_found_wrong():
    ours = providers()["afa"]
    other = dataclasses.replace(ours, model=lambda *given: ours.model(*given[:2], CASE._replace(alpha_t=0.4)))
    assert checking(CASE)(ours)[1].right and not checking(CASE)(other)[1].right


def test_a_models_layers_have_the_names_by_which_they_share_x():
    operands = Operands.of(MODEL, CASE)
    # Open during a call of their parent: q, k and v as one, gate and up as one, in each block.
    qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    together = {name: qkv for name in qkv} | dict.fromkeys(gate_up, gate_up)
    for provider, expected in (("afa", together), ("afa.separate", {})):
        step, found = Step(providers()[provider], CASE, operands), set()
        for name, layer in step.model.named_modules():
            if isinstance(layer, AFALinear):
                layer.register_forward_pre_hook(
                    lambda layer, _, name=name, found=found: found.add(
                        (name, layer._shared_input and layer._shared_input.names)
                    )
                )
        step()
        assert found == {(name, expected.get(name.rpartition(".")[2])) for name in MODEL.linears()}


def test_providers_multiply_by_the_same_memory_and_train_weights_of_their_own():
    operands = Operands.of(MODEL, CASE)
    first, second = (Step(providers()[name], CASE, operands) for name in ("afa", "afa.torch"))
    pointers = [{p.data_ptr() for p in step.model.parameters() if not p.requires_grad} for step in (first, second)]
    shared = {t.data_ptr() for t in operands.frozen.values()}
    assert shared <= pointers[0] and shared <= pointers[1]
    assert len(first.adapters) == 2 * 7 * MODEL.blocks
    for mine, other in zip(first.adapters, second.adapters, strict=True):
        assert torch.equal(mine, other) and mine.data_ptr() != other.data_ptr()
    assert {id(p) for p in first.model.parameters() if p.requires_grad} == set(map(id, first.adapters))


def test_a_step_leaves_the_gradients_of_x_and_of_every_adapter():
    step = Step(providers()["afa"], CASE, Operands.of(MODEL, CASE))
    step()
    first = [p.grad.clone() for p in (step.x, *step.adapters)]
    step()  # from zero again
    for p, gradient in zip((step.x, *step.adapters), first, strict=True):
        assert torch.equal(p.grad, gradient) and gradient.abs().max() > 0
    flop = step.least("both").flop
    assert flop == sum(4 * CASE.m * n * k + 6 * CASE.m * CASE.r * (n + k) for n, k in MODEL.linears().values())
