"""AFALinear: merging, and its state through casts, copies and checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from layer_helpers import BASES, composed, trained
from torch import nn
from torch.nn.utils import parametrizations

import afa_kernels as afa

pytestmark = pytest.mark.fast


@pytest.fixture(params=BASES, ids=str)
def base(request):
    torch.manual_seed(0)
    return BASES[request.param]()


# --- merging --------------------------------------------------------------------------------------


def test_merging_before_identity_is_refused(base):
    layer = trained(base)
    layer.set_alpha_t(0.25)
    before = base.weight.clone()
    with pytest.raises(ValueError, match="alpha_t is 0.25.*anneal"):
        layer.merge()
    assert torch.equal(base.weight, before) and not layer.merged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merging_keeps_the_function(base, dtype):
    layer = trained(base.to(dtype))
    layer.set_alpha_t(0.0)
    x = torch.randn(7, 12, dtype=dtype)
    truth = composed(copy.deepcopy(layer).double(), x.double())
    unmerged = layer(x)
    layer.merge()
    assert layer.merged
    # Merging rounds the weight once more than the unmerged layer does.
    error = (unmerged.double() - truth).abs().max() + torch.finfo(dtype).eps * 12
    assert (layer(x).double() - truth).abs().max() <= 2 * error
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_kept_original_comes_back_bit_for_bit(base, dtype):
    layer = trained(base.to(dtype))
    layer.set_alpha_t(0.0)
    before = base.weight.clone()
    layer.merge(keep_original=True)
    assert not torch.equal(base.weight, before)
    assert "_original_weight" not in layer.state_dict()
    layer.unmerge()
    assert torch.equal(base.weight, before) and not layer.merged
    assert layer._original_weight is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subtraction_comes_back_to_a_rounding(base, dtype):
    layer = trained(base.to(dtype))
    layer.set_alpha_t(0.0)
    before = base.weight.clone()
    layer.merge()
    merged = base.weight.clone()
    layer.unmerge()
    bound = torch.finfo(dtype).eps * torch.maximum(before.abs(), merged.abs()).max()
    assert (base.weight - before).abs().max() <= bound


def test_merging_twice_is_once_and_unmerging_nothing_is_nothing(base):
    layer = trained(base)
    layer.set_alpha_t(0.0)
    before = base.weight.clone()
    layer.unmerge()
    assert torch.equal(base.weight, before)
    layer.merge()
    once = base.weight.clone()
    layer.merge()
    assert torch.equal(base.weight, once)
    with pytest.raises(ValueError, match="keep_original"):
        layer.merge(keep_original=True)


def test_a_merged_layer_does_not_leave_identity():
    layer = trained(nn.Linear(12, 10))
    layer.set_alpha_t(0.0)
    layer.merge()
    layer.set_alpha_t(0.0)
    with pytest.raises(ValueError, match="merged.*unmerge"):
        layer.set_alpha_t(0.5)
    layer.unmerge()
    layer.set_alpha_t(0.5)
    assert layer.alpha_t == 0.5


def test_a_merge_that_would_overflow_is_refused():
    base = nn.Linear(12, 10, dtype=torch.float16)
    layer = trained(base)
    layer.set_alpha_t(0.0)
    with torch.no_grad():
        layer.lora_b.fill_(1e6)
    before = base.weight.clone()
    with pytest.raises(ValueError, match="finite"):
        layer.merge(keep_original=True)
    assert torch.equal(base.weight, before) and not layer.merged
    assert layer._original_weight is None


def test_a_computed_weight_is_not_merged():
    layer = trained(parametrizations.weight_norm(nn.Linear(12, 10)))
    layer.set_alpha_t(0.0)
    with pytest.raises(ValueError, match="parametrization"):
        layer.merge()


def test_an_offloaded_weight_is_not_merged():
    """accelerate leaves an empty weight on the meta device between two calls."""
    accelerate = pytest.importorskip("accelerate")
    layer = trained(nn.Linear(12, 10))
    layer.set_alpha_t(0.0)
    merged = layer.merged_weight()
    accelerate.cpu_offload(layer)
    with pytest.raises(ValueError, match="merge: accelerate has offloaded.*remove_hook_from_submodules"):
        layer.merge()
    accelerate.hooks.remove_hook_from_submodules(layer)
    layer.merge()
    assert torch.equal(layer.weight, merged)


def test_merging_ignores_autocast():
    layer = trained(nn.Linear(12, 10))
    layer.set_alpha_t(0.0)
    expected = layer.merged_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.merged_weight(), expected)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to"])
def test_alpha_stays_float32_through_casts(cast):
    layer = trained(nn.Linear(12, 10))
    layer.set_alpha_t(0.3)
    layer = layer.to(torch.bfloat16) if cast == "to" else getattr(layer, cast)()
    assert layer.alpha_t_buffer.dtype == torch.float32
    assert layer.alpha_t_buffer.item() == pytest.approx(0.3, abs=1e-7)  # bfloat16 would be off by 1e-3
    assert layer.alpha_t == 0.3


def test_alpha_survives_meta_and_to_empty():
    with torch.device("meta"):
        layer = afa.AFALinear(nn.Linear(12, 10))
    layer.set_alpha_t(0.3)
    layer = layer.to_empty(device="cpu")
    assert layer.alpha_t_buffer.item() == pytest.approx(0.3)
    assert layer.lora_a.shape == (8, 12) and layer.lora_a.device.type == "cpu"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("alpha_t", [0.0, 0.3])
def test_load_state_dict_restores_the_number_and_the_flag(alpha_t, assign):
    saved = trained(nn.Linear(12, 10))
    saved.set_alpha_t(alpha_t)
    layer = afa.AFALinear(nn.Linear(12, 10), r=4)
    layer.set_alpha_t(1.0 if alpha_t == 0 else 0.0)
    layer.load_state_dict(saved.state_dict(), assign=assign)
    assert layer.alpha_t == pytest.approx(alpha_t)
    assert layer.identity == (alpha_t == 0.0)
    x = torch.randn(7, 12)
    assert torch.equal(layer(x), saved(x))
    if alpha_t == 0.0:
        layer.merge()


def test_a_state_with_another_dtype_of_alpha_is_assigned_as_float32():
    layer = afa.AFALinear(nn.Linear(12, 10))
    state = layer.state_dict()
    state["alpha_t_buffer"] = torch.tensor(0.5, dtype=torch.bfloat16)
    layer.load_state_dict(state, assign=True)
    assert layer.alpha_t_buffer.dtype == torch.float32 and layer.alpha_t == 0.5


@pytest.mark.parametrize("value", [torch.tensor(2.0), torch.tensor(float("nan")), torch.ones(3)])
def test_a_state_with_a_wrong_alpha_is_refused(value):
    layer = afa.AFALinear(nn.Linear(12, 10))
    with pytest.raises(RuntimeError, match="alpha_t_buffer|one element|Tensor with 3"):
        layer.load_state_dict({**layer.state_dict(), "alpha_t_buffer": value})
    assert layer.alpha_t == 1.0 and layer.alpha_t_buffer.item() == 1.0


def test_a_merged_state_is_loaded_as_merged():
    merged = trained(nn.Linear(12, 10))
    merged.set_alpha_t(0.0)
    merged.merge()
    layer = afa.AFALinear(nn.Linear(12, 10), r=4)
    layer.load_state_dict(merged.state_dict())
    assert layer.merged
    x = torch.randn(7, 12)
    assert torch.equal(layer(x), merged(x))

    fresh = trained(nn.Linear(12, 10))
    layer.load_state_dict(fresh.state_dict())
    assert not layer.merged
    assert torch.equal(layer(x), fresh(x))


def test_a_branch_alone_is_not_loaded_into_a_merged_layer():
    layer = trained(nn.Linear(12, 10))
    layer.set_alpha_t(0.0)
    layer.merge()
    with pytest.raises(RuntimeError, match="merged layer"):
        layer.load_state_dict({"lora_a": torch.zeros(4, 12)}, strict=False)


def _reload(layer):
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), _reload],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_independent(duplicate):
    layer = trained(nn.Linear(12, 10), dropout=0.25)
    layer.set_alpha_t(0.3)
    twin = duplicate(layer).eval()
    x = torch.randn(7, 12)
    assert torch.equal(twin(x), layer.eval()(x))
    twin.set_alpha_t(0.0)
    assert layer.alpha_t == 0.3 and layer.alpha_t_buffer.item() == pytest.approx(0.3)
    twin.merge(keep_original=True)
    again = duplicate(twin)
    again.unmerge()
    assert torch.equal(again.base_layer.weight, layer.base_layer.weight)
