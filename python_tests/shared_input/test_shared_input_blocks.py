"""Blocks whose code calls layers that share their input one by one: they share, or run apart where they must; whole
models."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch._dynamo.testing
from helpers import relative_error
from shared_input_helpers import Block, K, run, separate
from torch import nn
from torch.utils.checkpoint import checkpoint

import afa_kernels as afa
from afa_kernels.model import peft_format as fmt
from afa_kernels.model import sharing as shared_input

# --- blocks whose code calls the layers one by one


@pytest.fixture
def block():
    block = Block()
    afa.share_inputs(block)
    return block


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused operator."""
    calls = []
    original = shared_input.linear_shared

    def counted(x, calls_on_x, **how):
        calls.append(len(calls_on_x.members))  # now: a recomputation may be stopped in the middle
        ys = original(x, calls_on_x, **how)
        if ys is None:
            calls.pop()
        return ys

    monkeypatch.setattr(shared_input, "linear_shared", counted)
    return calls


def apart(block, *arguments, **options):
    """The same block without sharing."""
    plain = afa.unshare_inputs(copy.deepcopy(block))
    return plain(*arguments, **options)


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_block_computes_once_and_hands_out(block, fused):
    layers = [block.q_proj, block.k_proj, block.v_proj]
    x = torch.randn(2, 5, K)
    dys = [torch.randn(2, 5, m.out_features) for m in layers]
    got = run(block, layers, x, dys)
    assert fused == [3]
    want = run(separate(layers), layers, x, dys)
    for g, w in zip(got, want, strict=True):
        for what in g:
            torch.testing.assert_close(g[what], w[what])
    block(x)
    assert fused == [3, 3]  # every call anew


def test_outside_its_block_a_layer_is_alone(block, fused):
    x = torch.randn(5, K)
    block(x)
    fused.clear()
    assert torch.equal(block.k_proj(x), apart_layer(block.k_proj, x))
    assert not fused


def apart_layer(member, x):
    return copy.deepcopy(member)(x)


def test_another_tensor_is_computed_for_itself_and_sharing_ends(block, fused):
    x, context = torch.randn(5, K), torch.randn(7, K)
    assert_same(block(x, context=context), apart(block, x, context=context))
    assert fused == [3]
    assert_same(block(x, context=context), apart(block, x, context=context))
    assert fused == [3]


def test_a_tensor_changed_in_between_is_noticed(block, fused):
    x = torch.randn(5, K)
    with torch.no_grad():
        want = apart(block, x.clone(), lambda x: x.mul_(2))
        assert_same(block(x.clone(), lambda x: x.mul_(2)), want)
    assert fused == [3]


def test_a_change_of_mode_in_between_is_noticed(block):
    class Modes(Block):
        def forward(self, x):
            q = self.q_proj(x)
            with torch.no_grad():
                k = self.k_proj(x)
            with torch.autocast("cpu", torch.bfloat16):
                return q, k, self.v_proj(x)

    model = afa.share_inputs(Modes())
    q, k, v = model(torch.randn(5, K))
    assert q.requires_grad and not k.requires_grad and v.dtype == torch.bfloat16


def test_inference_mode_runs_apart(block, fused):
    with torch.inference_mode():
        x = torch.randn(5, K)
        got = block(x)
        x.mul_(2)
    assert not fused and [y.shape[-1] for y in got] == [32, 16, 24]


def test_no_grad_shares(block, fused):
    x = torch.randn(5, K)
    with torch.no_grad():
        assert_same(block(x), apart(block, x))
    assert fused == [3]


def test_a_member_called_twice_computes_the_second_time(fused):
    class Twice(Block):
        def forward(self, x):
            return self.q_proj(x), self.q_proj(x), self.k_proj(x), self.v_proj(x)

    model = afa.share_inputs(Twice())
    x = torch.randn(5, K)
    assert_same(model(x), apart(model, x))
    assert fused == [3]


def test_an_exception_in_between_leaves_nothing_behind(block, fused):
    x = torch.randn(5, K)
    held = weakref.ref(x)

    def fail(_x):
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        block(x, fail)
    with torch.no_grad():
        block.k_proj.lora_b.mul_(2)
    assert torch.equal(block.k_proj(x), apart_layer(block.k_proj, x))
    del x
    gc.collect()
    assert held() is None
    y = torch.randn(5, K)
    assert_same(block(y), apart(block, y))
    assert fused == [3, 3]  # an exception is no sign of different tensors


def test_what_is_no_tensor_is_named_by_the_layer(block):
    with pytest.raises(TypeError, match="x: expected a torch.Tensor, got list"):
        block([1.0])


def test_nothing_is_held_after_the_call(block):
    x = torch.randn(5, K)
    y = weakref.ref(block(x)[1])
    held = weakref.ref(x)
    del x
    gc.collect()
    assert y() is None and held() is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(block, fused, reentrant):
    layers = [block.q_proj, block.k_proj, block.v_proj]
    x = torch.randn(5, K)
    dys = [torch.randn(5, m.out_features) for m in layers]
    got = run(lambda x: checkpoint(block, x, use_reentrant=reentrant), layers, x, dys)
    assert fused == [3, 3]  # once more in the recomputation
    want = run(separate(layers), layers, x, dys)
    for g, w in zip(got, want, strict=True):
        for what in g:
            torch.testing.assert_close(g[what], w[what])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_single_members(reentrant):
    class Single(Block):
        def forward(self, x):
            q = checkpoint(self.q_proj, x, use_reentrant=reentrant)
            return q, checkpoint(self.k_proj, x, use_reentrant=reentrant), self.v_proj(x)

    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this torch does not show which saved-tensor hooks are on")
    model = afa.share_inputs(Single())
    layers = [model.q_proj, model.k_proj, model.v_proj]
    x = torch.randn(5, K)
    dys = [torch.randn(5, m.out_features) for m in layers]
    for g, w in zip(run(model, layers, x, dys), run(separate(layers), layers, x, dys), strict=True):
        for what in g:
            torch.testing.assert_close(g[what], w[what])


def test_hooks_of_members_run(block, fused):
    seen = []
    block.k_proj.register_forward_hook(lambda _m, _x, y: seen.append(y.shape))
    block(torch.randn(5, K))
    assert seen == [(5, 16)] and fused == [3]


def test_a_hook_that_changes_the_input_of_a_member_is_obeyed(block):
    block.k_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    x = torch.randn(5, K)
    torch.testing.assert_close(block(x)[1], apart_layer(block.k_proj, x))


def test_parameters_given_for_the_call_are_used(block, fused):
    x = torch.randn(5, K)
    others = {name: p.detach() * 2 for name, p in block.named_parameters() if "lora" in name}
    got = torch.func.functional_call(block, others, (x,))
    assert fused == [3]
    with torch.no_grad():
        for name, p in block.named_parameters():
            if "lora" in name:
                p.mul_(2)
    assert_same(got, apart(block, x))


def test_copies_share_among_themselves(block, fused):
    x = torch.randn(5, K)
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    for other in (copy.deepcopy(block), torch.load(stream, weights_only=False)):
        with torch.no_grad():
            other.k_proj.lora_b.zero_()
        fused.clear()
        assert torch.equal(other(x)[1], other.k_proj.base_layer(x))
        assert fused == [3]
        afa.unshare_inputs(other)
        assert not other._forward_hooks and not other._forward_pre_hooks
        other(x)
        assert fused == [3]
    assert not torch.equal(block(x)[1], block.k_proj.base_layer(x))


def test_a_copied_member_brings_no_siblings(block):
    member = copy.deepcopy(block.q_proj)
    assert member._shared_input is None and block.q_proj._shared_input is None


def test_compiled(block):
    torch._dynamo.reset()
    x = torch.randn(5, K)
    layers = [block.q_proj, block.k_proj, block.v_proj]
    dys = [torch.randn(5, m.out_features) for m in layers]
    want = run(separate(layers), layers, x, dys)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for _ in range(2):
        got = run(compiled, layers, x, dys)
        for g, w in zip(got, want, strict=True):
            for what in g:
                torch.testing.assert_close(g[what], w[what])
    assert counter.frame_count == 1


def test_compiled_without_gradients_a_change_in_between_is_obeyed(block):
    """A trace cannot see whether x changed, so it must not share."""
    torch._dynamo.reset()

    def double(x):
        x.mul_(2)

    x = torch.randn(5, K)
    for frozen in (False, True):
        if frozen:
            block.requires_grad_(False)
        with torch.set_grad_enabled(frozen):
            want = apart(block, x.clone(), double)
            got = torch.compile(block, backend="aot_eager", fullgraph=True)(x.clone(), double)
        assert_same(got, want)


# --- whole models


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8)

    def forward(self, x):
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("share_inputs", [None, True])
def test_inject_shares_inputs_and_unload_undoes_it(fused, share_inputs):
    model = nn.Sequential(Mlp(), Mlp())
    keys = list(afa.inject(copy.deepcopy(model), r=2, share_inputs=False).state_dict())
    afa.inject(model, r=2, share_inputs=share_inputs)
    assert list(model.state_dict()) == keys
    x = torch.randn(3, 8)
    model(x)
    assert fused == [2, 2]
    afa.set_alpha_t(model, 0.0)
    want = model(x)
    torch.testing.assert_close(afa.merge(model)(x), want)
    assert len(fused) == 4
    afa.unload(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inject_shares_nothing_where_told_or_with_dropout(fused):
    for options in ({"share_inputs": False}, {"dropout": 0.1}):
        model = afa.inject(nn.Sequential(Mlp()), r=2, **options).train()
        model(torch.randn(3, 8))
        assert not fused and not model[0]._forward_pre_hooks


def test_adapters_of_a_sharing_model_are_those_of_any_other(tmp_path):
    model = nn.Sequential(Mlp(), Mlp())
    sharing = afa.inject(copy.deepcopy(model), r=2, share_inputs=True)
    plain = afa.inject(copy.deepcopy(model), r=2, share_inputs=False)
    for p in sharing.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.requires_grad else None
    plain.load_state_dict(sharing.state_dict())
    for m, name in ((sharing, "sharing"), (plain, "plain")):
        afa.set_alpha_t(m, 0.0)
        afa.save_adapter(m, tmp_path / name)
    states = [fmt.read_weights(tmp_path / n / fmt.WEIGHTS_FILE) for n in ("sharing", "plain")]
    (tensors, metadata), (want, wanted_metadata) = states
    assert metadata == wanted_metadata and tensors.keys() == want.keys()
    assert all(torch.equal(tensors[key], want[key]) for key in want)
    configs = [(tmp_path / n / fmt.CONFIG_FILE).read_bytes() for n in ("sharing", "plain")]
    assert configs[0] == configs[1]
    x = torch.randn(3, 8)
    fresh = afa.inject(copy.deepcopy(model), r=2, share_inputs=True)
    # In norm: single elements cancel, and shared input sums in another order.
    assert relative_error(afa.load_adapter(fresh, tmp_path / "plain")(x), plain(x)) < 1.3e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dropout": 0.1}, "share_inputs: dropout draws one mask for each layer"),
        ({"target_modules": ["down_proj"]}, "share_inputs: Sequential has no module with two AFA layers"),
    ],
)
def test_sharing_that_cannot_be_is_refused_before_anything_changes(options, match):
    model = nn.Sequential(Mlp())
    with pytest.raises(ValueError, match=match):
        afa.inject(model, share_inputs=True, **options)
    assert not any(isinstance(m, afa.AFALinear) for m in model.modules())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"q_proj": 8, "v_proj": 8, "o_proj": 8}, [["q_proj", "v_proj"]]),
        ({"q_proj": 8, "k_proj": 4, "v_proj": 4}, [["k_proj", "v_proj"]]),
        ({"query": 8, "key": 8, "value": 8}, [["query", "key", "value"]]),
        ({"gate_proj": 8, "up_proj": 8, "down_proj": 16}, [["gate_proj", "up_proj"]]),
        ({"c_attn": 8, "c_proj": 8}, []),
    ],
)
def test_what_shares_an_input(sizes, expected):
    assert list(shared_input.siblings_of(sizes)) == expected


def test_the_attention_of_real_models(fused):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    ids = torch.arange(6).view(1, 6)
    for name, config, expected in (
        ("Qwen2Model", transformers.Qwen2Config(**sizes, intermediate_size=24,
                                                num_key_value_heads=1), [3, 2]),
        ("BertModel", transformers.BertConfig(**sizes, intermediate_size=24), [3]),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        plain = afa.inject(copy.deepcopy(model), r=2, share_inputs=False)
        fused.clear()
        torch.manual_seed(0)
        sharing = afa.inject(model, r=2, share_inputs=True)
        for m in (plain, sharing):
            torch.manual_seed(1)
            for p in m.parameters():
                if p.requires_grad:
                    nn.init.normal_(p, std=0.3)
        got, want = sharing(ids).last_hidden_state, plain(ids).last_hidden_state
        assert fused == expected, name
        torch.testing.assert_close(got, want)
