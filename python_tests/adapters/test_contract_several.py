"""What every layer with several adapters promises (subjects.py): whose sample, whose gradient, whose alpha_t."""

import copy
from types import SimpleNamespace

import pytest
import torch

import afa_kernels as afa
from adapters.comparing import assert_accurate, close, in_plain_torch, results
from adapters.subjects import ADAPTERS, ALPHAS, COPIES, Injected, Peft
from afa_kernels.alpha_t import places_of

pytestmark = pytest.mark.fast

NAMES = ["bob", "ann", "__base__", "cy", "ann", "bob"]


def test_every_sample_gets_the_branch_of_its_adapter(subject):
    model, x = subject.several(ADAPTERS, ALPHAS), subject.inputs()
    for order in (NAMES, sorted(NAMES)):
        with subject.promises("mixed batches"):
            dy = torch.randn_like(subject.call(model, x, NAMES))
            trained = {name: subject.trained(model, name) for name in ADAPTERS}
            got = results(lambda x, o=order: subject.call(model, x, o), sum(trained.values(), []), x, dy)
            for name in ADAPTERS:
                rows = [i for i, other in enumerate(order) if other == name]
                if not rows:
                    assert all(p.grad is None for p in trained[name]), "an absent adapter has no gradient"
                    continue
                own = {"y": got["y"][rows], "dx": got["dx"][rows]}
                own |= {f"gradient {i}": p.grad for i, p in enumerate(trained[name])}
                assert_accurate(own, *in_plain_torch(subject, model, x[rows], dy[rows], name), torch.float32)
            free = [i for i, name in enumerate(order) if name == "__base__"]
            close(got["y"][free], subject.base()(x[free]))


def test_one_name_for_all_samples(subject):
    model, x = subject.several(ADAPTERS, ALPHAS), subject.inputs()
    for name in ADAPTERS:
        close(subject.call(model, x, name), subject.plain(model, name)(x))
    assert torch.equal(subject.call(model, x, "__base__"), subject.base()(x)), "no adapter: the frozen model"


def test_only_the_adapter_that_computes_is_trained(subject):
    model, x = subject.several(ADAPTERS, ALPHAS), subject.inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    subject.call(model, x, "bob").sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    own = {id(p) for p in subject.trained(model, "bob")}
    assert moved == {name for name, p in model.named_parameters() if id(p) in own}


def test_each_adapter_has_its_own_alpha_t_and_schedule(subject):
    model = subject.several(ADAPTERS, ALPHAS)
    afa.set_alpha_t(model, 0.75, "ann")
    driven = afa.AnnealSchedule(4, start=0.25, end_frac=1.0).attach(model, "bob")
    driven.step()
    stands = {name: {branch.state.alpha_t for branch in subject.branches(model, name)} for name in ADAPTERS}
    assert (
        stands == {"ann": {0.75}, "bob": {driven.alpha_t}, "cy": {0.0}, "idle": {1.0}} and 0.0 < driven.alpha_t < 0.25
    )
    for action in (lambda: driven.attach(model, "x"), lambda: afa.set_alpha_t(model, 0.5, "x")):
        with pytest.raises(ValueError, match="has an adapter 'x' that can be annealed"):
            action()


def test_dropout_is_that_of_each_adapter(subject):
    adapters = {"ann": {"r": 4, "dropout": 0.5}, "bob": {"r": 4}}
    model, x, names = subject.several(adapters, {}).train(), subject.inputs(), ["bob", "ann"] * 3
    with subject.promises("mixed batches"):
        torch.manual_seed(3)
        first = subject.call(model, x, names)
        torch.manual_seed(3)
        assert torch.equal(subject.call(model, x, names), first)
        other, without = subject.call(model, x, names), subject.call(model.eval(), x, names)
        close(first[::2], without[::2])
        assert not torch.allclose(first[1::2], other[1::2]) and not torch.allclose(first[1::2], without[1::2])


def test_adapters_come_and_go(subject):
    model, x = subject.several(ADAPTERS, ALPHAS), subject.inputs()
    wanted = {name: subject.call(model, x, name) for name in ("ann", "bob")}
    subject.add(model, "new", r=2, activation="gelu")
    close(subject.call(model, x, "new"), subject.base()(x))  # B is 0
    if isinstance(subject, Injected):  # PEFT's containers have the mode of a new module
        assert not any(branch.state.training for branch in subject.branches(model, "new")), "as the model"
    subject.delete(model, "idle")
    assert not subject.branches(model, "idle") and len(subject.branches(model, "new")) == 2
    for name, y in wanted.items():
        assert torch.equal(subject.call(model, x, name), y), name
    for name in ("idle", "x"):
        with pytest.raises(ValueError, match=name):
            subject.call(model, x, name)
        with pytest.raises(ValueError, match=name):
            subject.delete(model, name)


@pytest.mark.parametrize("names", [["ann", "x"] * 3, ["ann"] * 5], ids=["unknown", "number"])
def test_names_that_do_not_fit(subject, names):
    model, x = subject.several(ADAPTERS, ALPHAS).train(), subject.inputs()
    wanted = subject.call(model, x, "ann")
    with pytest.raises((TypeError, ValueError), match="'?x'?|names|mixed adapter batches"):
        subject.call(model, x, names)
    assert torch.equal(subject.call(model, x, "ann"), wanted)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_have_every_adapter(subject, copied):
    model, x = subject.several(ADAPTERS, ALPHAS), subject.inputs()
    other = copied(model)
    afa.set_alpha_t(model, 0.75, "ann")
    for name in ("bob", "cy", "idle"):
        assert torch.equal(subject.call(other, x, name), subject.call(model, x, name)), name
    assert {branch.state.alpha_t for branch in subject.branches(other, "ann")} == {ALPHAS["ann"]}


def test_a_state_has_every_adapter(injected):
    model, other, x = injected.several(ADAPTERS, ALPHAS), injected.several(ADAPTERS, {}), injected.inputs()
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        assert torch.equal(injected.call(each, x, NAMES), injected.call(model, x, NAMES))
    assert [place.state.alpha_t for place in places_of(other)] == [place.state.alpha_t for place in places_of(model)]


def test_no_weight_equals_several_branches(injected):
    model, x, base = injected.several(ADAPTERS, dict.fromkeys(ADAPTERS, 0.0)), injected.inputs(), injected.base()
    for action in (injected.merge, injected.unmerge):
        with pytest.raises(ValueError, match="no weight equals several branches"):
            action(model)
    plain = injected.unload(model)
    assert torch.equal(plain(x), base(x)) and plain.state_dict().keys() == base.state_dict().keys()
    assert not any(m._load_state_dict_pre_hooks or m._forward_pre_hooks for m in plain.modules())


def language_model(kind):
    """Return a subject of transformers."""
    if kind == "experts":
        from expert_models import PARAMETERS, mixture

        frozen = SimpleNamespace(base=lambda: mixture(), targets={"target_parameters": list(PARAMETERS)})
    else:
        pytest.importorskip("transformers")
        from hf_models import llama

        frozen = SimpleNamespace(base=lambda: llama(), targets={"target_modules": ["q_proj", "v_proj"]})
    vars(frozen).update(name=kind, inputs=None, options_of_peft={}, release_of_peft="0.17")
    return Peft(frozen) if kind == "peft" else Injected(frozen)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["linear", "experts", "peft"])
def test_transformers_recomputes_with_the_names_of_the_forward(kind, reentrant):
    """Of each forward: the backward of two comes after both."""
    subject = language_model(kind)
    model = subject.several({"ann": {"r": 4, "dropout": 0.3}, "bob": {"r": 2, "activation": "tanh"}}, {}).train()
    ids = torch.randint(3, 30, (3, 6))

    def two_steps():
        model.zero_grad()
        torch.manual_seed(5)
        ys = [subject.call(model, ids, names).logits for names in (["bob", "ann", "bob"], ["ann", "__base__", "bob"])]
        sum(y.square().sum() for y in ys).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = two_steps()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = two_steps()
    assert got.keys() == wanted.keys() and len(got) == 8 * (2 if kind == "experts" else 1)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert all(getattr(module, "_assignment", None) is None for module in model.modules())
