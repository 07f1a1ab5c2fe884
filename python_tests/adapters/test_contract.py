"""What every layer with an adapter promises, whoever keeps it (subjects.py): its function, alpha_t and merging."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
from helpers import allowed_error, relative_error
from torch.utils.checkpoint import checkpoint

import afa_kernels as afa
from adapters.comparing import alphas_of, assert_accurate, close, in_plain_torch, results
from adapters.subjects import Injected, LinearLayers
from afa_kernels.alpha_t import places_of

# --- the function

pytestmark = pytest.mark.fast


def test_it_starts_as_the_frozen_model_and_only_the_branches_train(subject):
    model, x = subject.fresh(), subject.inputs()
    close(model(x), subject.base()(x))
    assert alphas_of(model) == {1.0} and not subject.merged(model)
    trained = subject.trained(model)
    assert len(trained) == 4 and all(p.any() != (i % 2) for i, p in enumerate(trained)), "A is drawn, B is 0"
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, trained))


@pytest.mark.parametrize("alpha_t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_the_formula(subject, dtype, alpha_t):
    model, x = subject.adapted(dtype), subject.inputs(dtype)
    afa.set_alpha_t(model, alpha_t)
    assert all(branch.lora_a.dtype == torch.float32 for branch in subject.branches(model)), "beside 16 bits too"
    dy = torch.randn_like(model(x))
    got = results(model, subject.trained(model), x, dy)
    assert got["y"].dtype == got["dx"].dtype == dtype and len(got) == 6
    assert_accurate(got, *in_plain_torch(subject, model, x, dy), dtype)


def test_activation_and_scaling_take_effect(subject):
    x = subject.inputs()
    for options, scaling in (
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True, "activation": "tanh"}, 6 / math.sqrt(4)),
    ):
        model = subject.adapted(**options)
        for branch in subject.branches(model):
            assert branch.scaling == scaling and branch.activation == options.get("activation", "silu")
        close(model(x), subject.plain(model)(x))


def test_autocast(subject):
    model, x, seen = subject.adapted(), subject.inputs(), []
    plain = subject.plain(model)
    for place in places_of(model):
        place.layer.register_forward_hook(lambda _module, _arguments, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y, same = model(x), plain(x)
    if isinstance(subject.frozen, LinearLayers):  # transformers' experts compute in the dtype of their weights
        assert seen == [torch.bfloat16] * 2
    truth = plain.double()(x.double())
    assert relative_error(y, truth) <= allowed_error(same, truth, torch.bfloat16)
    y.float().sum().backward()
    assert all(branch.lora_b.grad.dtype == torch.float32 for branch in subject.branches(model))


def test_dropout_is_seeded_and_acts_in_training_only(subject):
    model, x = subject.adapted(dropout=0.5), subject.inputs()
    close(model(x), subject.plain(model)(x))
    model.train()
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    assert not torch.allclose(model(x), first) and not torch.allclose(model.eval()(x), first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_the_backward_has_the_same_mask(subject, reentrant):
    model, x = subject.adapted(dropout=0.3).train(), subject.inputs()
    dy = torch.randn_like(model(x))
    torch.manual_seed(1)
    wanted = results(model, subject.trained(model), x, dy)
    torch.manual_seed(1)
    got = results(lambda x: checkpoint(model, x, use_reentrant=reentrant), subject.trained(model), x, dy)
    assert all(torch.equal(got[name], value) for name, value in wanted.items()) and len(got) == 6


def test_gradients_of_samples_by_torch_func(subject):
    model, x = subject.adapted(), subject.inputs()
    tensors = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    trained = {name: tensors.pop(name) for name, p in model.named_parameters() if p.requires_grad}

    def loss(trained, sample):
        return torch.func.functional_call(model, tensors | trained, (sample[None],)).square().sum()

    with subject.promises("torch.func"):
        got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
        for i, sample in enumerate(x):
            model.zero_grad()
            model(sample[None]).square().sum().backward()
            for name in trained:
                close(got[name][i], model.get_parameter(name).grad)


@pytest.mark.long
def test_annealing_compiles_once_and_identity_once_more(subject):
    model, x = subject.adapted(), subject.inputs()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    schedule = afa.AnnealSchedule(10, end_frac=0.5).attach(model)
    for _ in range(10):
        close(compiled(x), model(x))
        compiled(x).sum().backward()
        schedule.step()
    assert schedule.alpha_t == 0.0 and counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r.*0"),
        ({"activation": "swish"}, ValueError, "activation: .*silu.*'swish'"),
    ],
)
def test_options_that_do_not_fit_are_named_and_leave_the_model(subject, options, error, message, monkeypatch):
    net = subject.base()
    monkeypatch.setattr(subject, "base", lambda dtype: net)
    with pytest.raises(error, match=message):
        subject.fresh(**options)
    assert all(p.requires_grad for p in net.parameters())


# --- alpha_t


def test_alpha_t_is_written_in_place_in_every_layer(subject):
    model, x = subject.adapted(), subject.inputs()
    states = [branch.state for branch in subject.branches(model)]
    pointers = [state.alpha_t_buffer.data_ptr() for state in states]
    seen = []
    for value in (0.5, 0.0, 1.0):
        afa.set_alpha_t(model, value)
        assert alphas_of(model) == {value} and len(states) == 2
        assert all(state.alpha_t_buffer.item() == value and state.identity == (value == 0.0) for state in states)
        seen.append(model(x))
    assert [state.alpha_t_buffer.data_ptr() for state in states] == pointers
    assert not any(torch.allclose(one, other) for one, other in ((seen[0], seen[1]), (seen[1], seen[2])))


@pytest.mark.parametrize(
    ("value", "error"), [(-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), ("0.5", TypeError)]
)
def test_a_wrong_alpha_t_is_refused(subject, value, error):
    model = subject.adapted()
    afa.set_alpha_t(model, 0.5)
    for target in (*(place.layer for place in places_of(model)), model):
        with pytest.raises(error, match="alpha_t: expected"):
            target.set_alpha_t(value) if target is not model else afa.set_alpha_t(model, value)
    assert alphas_of(model) == {0.5}


def test_an_alpha_t_that_float32_cannot_hold_is_identity(subject):
    model = subject.adapted()
    afa.set_alpha_t(model, 1e-50)
    assert alphas_of(model) == {0.0}
    subject.merge(model)
    assert subject.merged(model)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_alpha_t_stays_float32_and_exact_through_casts(subject, cast):
    model = subject.adapted()
    afa.set_alpha_t(model, 0.3)
    for state in (branch.state for branch in subject.branches(cast(model))):
        assert state.alpha_t_buffer.dtype == torch.float32 and state.alpha_t == 0.3
        assert state.alpha_t_buffer.item() == torch.tensor(0.3).item()


# --- merging


def test_merging_before_identity_is_refused_and_changes_nothing(subject):
    model = subject.adapted()
    before = copy.deepcopy(model.state_dict())
    for stands in (1.0, 0.1):
        afa.set_alpha_t(model, stands)
        for attempt in (subject.merge, lambda m: subject.unload(m, merge=True)):
            with pytest.raises(ValueError, match=f"merge: alpha_t .*is {stands:g}.*anneal"):
                attempt(model)
        for place in places_of(model):
            with pytest.raises(ValueError, match=f"merge: alpha_t .*is {stands:g}"):
                place.layer.merge()
    last = places_of(model)[-1]
    where = next(branch.where for branch in subject.branches(model) if branch.state is last.state)
    afa.set_alpha_t(model, 0.0)
    last.set_alpha_t(0.5)
    for attempt in (subject.merge, lambda m: subject.unload(m, merge=True)):
        with pytest.raises(ValueError, match=r"merge: alpha_t .*is 0\.5") as refused:
            attempt(model)
        assert any(name in str(refused.value) for name in (where, last.name.removeprefix("base_model.model.")))
    last.set_alpha_t(0.1)
    assert not subject.merged(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or "alpha_t" in name, name


@pytest.mark.filterwarnings("ignore:All adapters are already merged", "ignore:Already unmerged")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merging_keeps_the_function_and_unmerging_undoes_it(subject, dtype):
    model, x = subject.adapted(dtype), subject.inputs(dtype)
    afa.set_alpha_t(model, 0.0)
    before = [p.clone() for p in subject.frozen_parameters(model)]
    unmerged, plain = model(x), subject.plain(model)
    subject.unmerge(model)
    assert all(map(torch.equal, subject.frozen_parameters(model), before)), "unmerging nothing is nothing"
    subject.merge(model)
    assert subject.merged(model)
    once = [p.clone() for p in subject.frozen_parameters(model)]
    assert sum(not torch.equal(*pair) for pair in zip(once, before, strict=True)) == 2
    truth = plain.double()(x.double())
    # The weight is rounded once more than in the unmerged model.
    allowed = 2 * (allowed_error(unmerged, truth, dtype) + torch.finfo(dtype).eps)
    assert relative_error(model(x), truth) <= allowed
    with pytest.raises(ValueError, match="is merged, got 0.5"):
        afa.set_alpha_t(model, 0.5)
    for place in places_of(model):
        with pytest.raises(ValueError, match="merged.*unmerge"):
            place.set_alpha_t(0.5)
    subject.merge(model)
    for place in places_of(model):
        place.layer.merge()
    assert all(map(torch.equal, subject.frozen_parameters(model), once)), "twice is once"
    subject.unmerge(model)
    assert not subject.merged(model)
    for got, merged, wanted in zip(subject.frozen_parameters(model), once, before, strict=True):
        bound = 2 * torch.finfo(dtype).eps * torch.maximum(merged.abs(), wanted.abs()).max()
        assert (got - wanted).abs().max() <= bound
    afa.set_alpha_t(model, 0.5)


def test_a_merge_that_would_overflow_changes_nothing(subject):
    model = subject.adapted()
    afa.set_alpha_t(model, 0.0)
    before = [p.clone() for p in subject.frozen_parameters(model)]
    *_, last = subject.branches(model)
    with torch.no_grad():
        last.lora_a.fill_(3e38)
    if not isinstance(subject, Injected):  # PEFT merges one layer after the other, and checks if it is told to
        with pytest.raises(ValueError, match="NaNs detected"):
            subject.merge(model, safe_merge=True)
        return
    with pytest.raises(ValueError, match=f"{last.where}: merge: the merged weight would not be finite"):
        subject.merge(model, keep_original=True)
    assert all(map(torch.equal, subject.frozen_parameters(model), before)) and not subject.merged(model)
    assert all(place.layer._original_weight is None for place in places_of(model))


def test_merged_and_unloaded_it_is_a_plain_model(subject):
    model, x, base = subject.adapted(), subject.inputs(), subject.base()
    afa.set_alpha_t(model, 0.0)
    wanted = model(x)
    plain = subject.unload(copy.deepcopy(model), merge=True)
    close(plain(x), wanted)
    assert torch.equal(subject.unload(model)(x), base(x))
    for each in (plain, model if isinstance(subject, Injected) else model.base_model.model):
        assert [type(m) for m in each.modules()] == [type(m) for m in base.modules()]
        assert each.state_dict().keys() == base.state_dict().keys()
        assert not any(m._load_state_dict_pre_hooks or m._forward_pre_hooks for m in each.modules())
