"""What every layer with an adapter promises of copies, state dicts and checkpoints (subjects.py)."""

import copy
import json
import warnings

import pytest
import torch
import torch._dynamo.testing
from peft_models import fill_adapters

import afa_kernels as afa
from adapters.comparing import alphas_of, close
from adapters.subjects import ADAPTERS, ALPHAS, COPIES, SUBJECTS, Injected
from afa_kernels.alpha_t import places_of

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("copied", COPIES)
def test_copies_are_whole_and_independent(subject, copied):
    model, x = subject.adapted(), subject.inputs()
    afa.set_alpha_t(model, 0.25)
    wanted, weights = model(x), [p.clone() for p in subject.frozen_parameters(model)]
    other = copied(model)
    assert torch.equal(other(x), wanted) and [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    afa.set_alpha_t(other, 0.0)
    subject.merge(other)
    third = copied(other)
    assert subject.merged(third) and torch.equal(third(x), other(x))
    subject.unmerge(third)
    close(third(x), subject.plain(third)(x))
    assert alphas_of(model) == {0.25} and torch.equal(model(x), wanted)
    assert all(map(torch.equal, subject.frozen_parameters(model), weights))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("alpha_t", [0.0, 0.3])
def test_a_state_brings_alpha_t_too(injected, alpha_t, assign):
    model, other, x = injected.adapted(), injected.fresh(), injected.inputs()
    afa.set_alpha_t(model, alpha_t)
    afa.set_alpha_t(other, 1.0 if alpha_t == 0.0 else 0.0)
    assert not other.load_state_dict(model.state_dict(), assign=assign).missing_keys
    assert torch.equal(other(x), model(x))
    for branch in injected.branches(other):
        assert branch.state.alpha_t == pytest.approx(alpha_t) and branch.state.identity == (alpha_t == 0.0)
    own = {name for name, _ in model.state_dict().items()} - injected.base().state_dict().keys()
    of_branches = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[2] in STATE}
    assert len(of_branches) == 2 * len(STATE) and of_branches.keys() <= own
    third = injected.fresh()
    third.load_state_dict(of_branches, strict=False)
    assert torch.equal(third(x), model(x))
    with pytest.raises(RuntimeError, match="Missing key.*lora_a"):
        third.load_state_dict({name: t for name, t in model.state_dict().items() if "lora_a" not in name})


STATE = ("lora_a", "lora_b", "alpha_t_buffer")


@pytest.mark.parametrize("value", [torch.tensor(2.0), torch.tensor(float("nan")), torch.ones(3)], ids=str)
def test_a_state_with_a_wrong_alpha_t_is_refused(injected, value):
    for model in (injected.adapted(), injected.several(ADAPTERS, {})):
        state = model.state_dict()
        name = next(name for name in state if name.endswith("alpha_t_buffer"))
        with pytest.raises(RuntimeError, match="alpha_t_buffer|one element|Tensor with 3"):
            model.load_state_dict({**state, name: value})
        assert alphas_of(model) == {1.0} and model.state_dict()[name] == 1.0


def test_a_state_says_whether_it_is_merged(injected):
    plain, x = injected.adapted(), injected.inputs()
    afa.set_alpha_t(plain, 0.0)
    merged = copy.deepcopy(plain)
    injected.merge(merged)
    for source, target in ((merged, plain), (plain, merged)):
        other, state = copy.deepcopy(target), source.state_dict()
        before, wanted = copy.deepcopy(other.state_dict()), other(x)
        of_branches = {name: torch.zeros_like(t) for name, t in state.items() if name.rpartition(".")[2] in STATE}
        marks = {name: t for name, t in state.items() if name.endswith("merged")}
        with pytest.raises(RuntimeError, match="a branch of a merged layer cannot be loaded without its weight"):
            other.load_state_dict(of_branches | marks, strict=False)
        assert other.state_dict().keys() == before.keys() and torch.equal(other(x), wanted)
        other.load_state_dict(state)
        assert injected.merged(other) == injected.merged(source) and torch.equal(other(x), source(x))
    narrow = injected.adapted(r=2)
    afa.set_alpha_t(narrow, 0.0)
    injected.merge(narrow)
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict(narrow.state_dict())
    assert not injected.merged(plain)


def test_a_kept_original_comes_back_bit_for_bit(injected):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = injected.adapted(dtype)
        afa.set_alpha_t(model, 0.0)
        before, keys = [p.clone() for p in injected.frozen_parameters(model)], model.state_dict().keys()
        injected.merge(model, keep_original=True)
        assert all(name.endswith("merged") for name in model.state_dict().keys() - keys), "the original is not saved"
        again = copy.deepcopy(model)
        for each in (again, model):
            injected.unmerge(each)
            assert all(map(torch.equal, injected.frozen_parameters(each), before)) and not injected.merged(each)
            assert all(place.layer._original_weight is None for place in places_of(each)), "the memory is free again"
        injected.merge(model)
        with pytest.raises(ValueError, match="keep_original"):
            injected.merge(model, keep_original=True)


# --- checkpoints


def readers(subject):
    """What reads a checkpoint of this package, by name."""
    peft = pytest.importorskip("peft", minversion=subject.frozen.release_of_peft)
    from afa_kernels.peft import AFALoraConfig

    def of_peft(folder):
        return peft.PeftModel.from_pretrained(subject.base(), folder, config=AFALoraConfig.from_pretrained(folder))

    return {
        "stock": lambda folder: peft.PeftModel.from_pretrained(subject.base(), folder).eval(),
        "inject": lambda folder: afa.load_adapter(subject.base(), folder),
        "peft": lambda folder: of_peft(folder).eval(),
    }


OPTIONS = {"r": 3, "lora_alpha": 7, "activation": "tanh", "use_rslora": True}


@pytest.mark.long  # it imports PEFT
@pytest.mark.filterwarnings("error::UserWarning:peft")
def test_at_identity_everybody_reads_what_was_saved(subject, tmp_path):
    read = readers(subject)
    model, x = subject.adapted(**OPTIONS), subject.inputs()
    afa.set_alpha_t(model, 0.0)
    wanted = model(x)
    subject.save(model, tmp_path)
    assert torch.equal(subject.load(subject.base(), tmp_path)(x), wanted)
    assert "afa_lora" not in json.loads((tmp_path / "adapter_config.json").read_text())
    for name, reader in read.items():
        loaded = reader(tmp_path)
        close(loaded(x), wanted)
        if name != "stock":
            assert alphas_of(loaded) == {0.0}
        if name != "inject":
            close(loaded.merge_and_unload()(x), wanted)


@pytest.mark.long  # it imports PEFT
@pytest.mark.filterwarnings("ignore:.*saved at alpha_t = 0.4")
def test_on_the_way_alpha_t_comes_back_and_stock_peft_refuses(subject, tmp_path):
    read = readers(subject)
    model, x = subject.adapted(**OPTIONS), subject.inputs()
    afa.set_alpha_t(model, 0.4)
    subject.save(model, tmp_path)
    assert torch.equal(subject.load(subject.base(), tmp_path)(x), model(x))
    for way in SUBJECTS:
        if way.frozen is subject.frozen:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*afa_lora")  # stock PEFT's, of what it does not know
                loaded = read["inject" if isinstance(way, Injected) else "peft"](tmp_path)
            close(loaded(x), model(x))
            assert alphas_of(loaded) == {0.4}
            assert {branch.activation for branch in way.branches(loaded)} == {"tanh"}
    with pytest.warns(UserWarning, match="afa_lora"), pytest.raises(ValueError, match="saved .* at alpha_t = 0.4"):
        read["stock"](tmp_path)


@pytest.mark.long  # it imports PEFT
def test_what_stock_peft_saved_is_at_identity(subject, tmp_path):
    peft = pytest.importorskip("peft", minversion=subject.frozen.release_of_peft)
    options = {"r": 3, "lora_alpha": 5} | subject.frozen.targets | subject.frozen.options_of_peft
    stock, x = peft.get_peft_model(subject.base(), peft.LoraConfig(**options)).eval(), subject.inputs()
    fill_adapters(stock).save_pretrained(tmp_path)
    loaded = subject.load(subject.base(), tmp_path)
    close(loaded(x), stock(x))
    assert alphas_of(loaded) == {0.0}


@pytest.mark.long  # it imports PEFT
@pytest.mark.filterwarnings("ignore:.*saved at alpha_t")
def test_one_adapter_is_saved_and_loaded_by_its_name(subject, tmp_path):
    model, x = subject.several(ADAPTERS, ALPHAS), subject.inputs()
    wanted, others = subject.call(model, x, "bob"), {name: subject.call(model, x, name) for name in ("ann", "cy")}
    folder = subject.save(model, tmp_path, "bob")
    alone = subject.load(subject.base(), folder)
    close(alone(x), wanted)
    assert alphas_of(alone) == {ALPHAS["bob"]}
    finished = readers(subject)["stock"](subject.save(model, tmp_path / "finished", "cy"))
    close(finished(x), others["cy"])
    subject.load_as(model, folder, "again")
    assert torch.equal(subject.call(model, x, "again"), wanted)
    for name, y in others.items():
        assert torch.equal(subject.call(model, x, name), y), name


def test_16_bit_models_keep_float32_adapters_in_files(subject, tmp_path):
    model = subject.adapted(torch.bfloat16)
    afa.set_alpha_t(model, 0.0)
    subject.save(model, tmp_path)
    loaded = subject.load(subject.base(torch.bfloat16), tmp_path)
    for got, wanted in zip(subject.trained(loaded), subject.trained(model), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)
