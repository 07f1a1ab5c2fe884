"""The scope "model": a training step of transformer blocks, adapted as the users of each package do it."""

import pytest
import torch
from bench_rows import TINY

from afa_kernels import AFALinear
from bench import optimizer
from bench.providers import providers
from bench.shapes import TRANSFORMERS, Transformer, transformer
from bench.transformer import Checker, Operands, Step

MODEL = Transformer("tiny", 2, 48, 72, 2)
CASE = TINY._replace(scope="model", layer="tiny", m=40, k=48, n=72, bias=False)
THROUGH_PEFT = {"afa.peft", "afa.peft.again", "afa.accelerate", "afa.accelerate.again"}
WHOLE = {"frozen", "frozen.again", "afa", "afa.again", "afa.identity", "afa.separate", *THROUGH_PEFT}


def checker_of(case, operands) -> Checker:
    return Checker(providers()["eager"], providers()["frozen"], case, operands)


@pytest.mark.parametrize("alpha_t", [0.5, 0.0])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")])
def test_every_provider_is_right(dtype, adapter_dtype, alpha_t):
    case = CASE._replace(dtype=dtype, adapter_dtype=adapter_dtype, alpha_t=alpha_t)
    operands = Operands.of(MODEL, case)
    checker = checker_of(case, operands)
    names = set()
    for name, provider in providers().items():
        if name == "compiled" or provider.absent(case) is not None:
            continue
        check = checker.check(Step(provider, case, operands), provider.function)
        assert check.right, (name, check)
        names.add(name)
    wanted = {"eager", "afa.torch", *WHOLE}
    if providers()["peft"].absent(case) is None:
        wanted.add("peft")
    else:
        wanted -= THROUGH_PEFT
    assert names >= (wanted if alpha_t else wanted - {"afa.identity"})


def test_another_alpha_t_is_found_wrong():
    operands = Operands.of(MODEL, CASE)
    step = Step(providers()["afa"], CASE._replace(alpha_t=0.4), operands)
    assert not checker_of(CASE, operands).check(step, "afa").right


def test_a_models_layers_have_the_names_that_groups_are_found_by(monkeypatch):
    attached = []
    monkeypatch.setattr("afa_kernels.model.inject.attach_groups", lambda model, kind: attached.append(model))
    operands = Operands.of(MODEL, CASE)
    step = Step(providers()["afa"], CASE, operands)
    assert attached == [step.model]
    Step(providers()["afa.separate"], CASE, operands)
    assert attached == [step.model]
    monkeypatch.undo()
    # Open during a call of their parent: q, k and v as one, gate and up as one, in each block.
    step, found = Step(providers()["afa"], CASE, operands), set()
    for name, layer in step.model.named_modules():
        if isinstance(layer, AFALinear):
            layer.register_forward_pre_hook(
                lambda layer, _, name=name: found.add((name, layer._shared_input and layer._shared_input.names))
            )
    step()
    qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    groups = {name: qkv for name in qkv} | dict.fromkeys(gate_up, gate_up)
    assert found == {(name, groups.get(name.rpartition(".")[2])) for name in MODEL.linears()}


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


def test_the_variants_of_adamw_do_the_same():
    updated = {}
    for name in optimizer.VARIANTS:
        step = Step(providers()["afa"], CASE, Operands.of(MODEL, CASE))
        before = [p.detach().clone() for p in step.adapters]
        optimizer.work(name, optimizer.optimizers(step)[name]).steps[name](None)
        updated[name] = torch.cat([(p - old).flatten() for p, old in zip(step.adapters, before, strict=True)])
        assert optimizer.least(step).nbytes == 7 * 4 * sum(p.numel() for p in step.adapters)
    first, *others = updated.values()
    assert first.abs().max() > 0
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-2, atol=1e-7)


def test_the_named_models():
    assert transformer("llama-block") is TRANSFORMERS["llama-block"]
    weights = sum(n * k for n, k in transformer("llama-block").linears().values())
    assert weights == 4 * 1024**2 + 3 * 1024 * 2816
    assert len(transformer("llama-8-blocks").linears()) == 56
