"""What the compiled module reads of a tensor, through DLPack's exchange table and through Python's attributes."""

import itertools

import pytest
import torch
from helpers import Problem

import afa_kernels as afa
from afa_kernels.backend import compiled
from afa_kernels.operator import checks

pytestmark = pytest.mark.fast

if compiled._C is None:
    pytest.skip(compiled.load_error, allow_module_level=True)

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


class Subclass(torch.Tensor):
    pass


def tensors():
    for dtype in (*ELEMENTS, torch.int16):
        t = torch.arange(60).reshape(5, 12).to(dtype)
        yield from (t, t.T, t[1:, 3:], t[::2, ::3], t[2:3], t[:, 5:6], t[0], t[1, 2], t[:0])
        yield t[0].expand(4, 12)
        yield t[:, :1].expand(5, 7)
        yield t.view(5, 3, 4).permute(2, 0, 1)[1:]
    yield torch.nn.Parameter(torch.randn(3, 4))
    yield torch.randn(3, 4).as_subclass(Subclass)
    yield torch.randn(3, 4, requires_grad=True) * 2
    with torch.inference_mode():
        yield torch.randn(3, 4)


@pytest.mark.parametrize("by_attributes", [False, True])
def test_views_are_what_torch_says(by_attributes):
    for t in tensors():
        data, sizes, strides, element = compiled._C.tensor_view(t, by_attributes)
        assert (sizes, strides) == (list(t.shape), list(t.stride()))
        assert element == (ELEMENTS.index(t.dtype) if t.dtype in ELEMENTS else len(ELEMENTS))
        assert data == t.data_ptr() or t.numel() == 0


@pytest.mark.parametrize("by_attributes", [False, True])
def test_what_is_no_matrix_in_memory_is_refused(by_attributes):
    with pytest.raises(TypeError, match="tensor: expected a torch.Tensor, got float"):
        compiled._C.tensor_view(0.5, by_attributes)
    with pytest.raises(TypeError, match="tensor: expected a torch.Tensor, got NoneType"):
        compiled._C.tensor_view(None, by_attributes)
    with pytest.raises(ValueError, match="tensor: expected at most three dimensions, got 4"):
        compiled._C.tensor_view(torch.zeros(2, 3, 4, 5), by_attributes)
    with pytest.raises((ValueError, RuntimeError, BufferError)):
        compiled._C.tensor_view(torch.zeros(2, 3, device="meta"), by_attributes)


@pytest.fixture
def no_exchange_table(monkeypatch):
    """Makes the module believe in a torch from before the table."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None, raising=False)
        compiled._C.use_torch(torch)
        assert not compiled._C.has_exchange_table()
        yield
    compiled._C.use_torch(torch)


def test_this_torch_has_the_table_where_it_should():
    assert compiled._C.has_exchange_table() == hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def step(p: Problem) -> list[torch.Tensor]:
    x, a, b = (t.clone().requires_grad_() for t in (p.x, p.lora_a, p.lora_b))
    y = afa.afa_linear(x, p.weight, p.bias, a, b, 0.5, dropout_p=0.25, dropout_seed=3, backend="cpu")
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), p.dy)]


def test_either_way_gives_the_same_bits(request):
    problem = Problem.random(19, 40, 24, 4)
    expected = step(problem)
    request.getfixturevalue("no_exchange_table")
    for one, other in zip(step(problem), expected, strict=True):
        assert torch.equal(one, other)


def test_wrong_operands_are_named():
    p = Problem.random(5, 16, 12, 4)
    arguments = [p.x, p.lora_a, p.lora_b, torch.tensor(0.5), None, 1, 0, 1.0, 1, None, torch.empty(5, 12), None]
    compiled._C.cpu_forward(*arguments)
    for place, wrong, message in (
        (0, torch._efficientzerotensor((5, 16)), "x: expected a tensor that has memory"),
        (1, p.lora_a.T, r"lora_a: expected shape \(4, 16\)"),
        (3, torch.tensor(0.5, dtype=torch.float64), "alpha_t: expected a 0-dim float32 tensor"),
        (3, torch.zeros(1), "alpha_t: expected a 0-dim float32 tensor"),
        (3, torch._efficientzerotensor(()), "alpha_t: expected a 0-dim float32 tensor"),
        (5, 99, "activation: unknown id"),
        (9, torch.empty(5, 12).half(), "base: expected the dtype"),
        (10, None, "out: expected a torch.Tensor, got None"),
        (11, torch.empty(4, 5).T, "z: expected a contiguous tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            compiled._C.cpu_forward(*arguments[:place], wrong, *arguments[place + 1 :])


def test_a_backward_takes_the_z_of_the_forward():
    p = Problem.random(5, 16, 12, 4)
    options = (1, 0, 1.0, 1, p.dy, None, None, None, None, False)
    with pytest.raises(TypeError, match="z: expected a torch.Tensor, got None"):
        compiled._C.cpu_backward(p.x, p.lora_a, p.lora_b, torch.tensor(0.5), None, *options)
    owned = (p.lora_a[None], p.lora_b[None], torch.tensor([5]).int(), None, torch.ones(1), None, None)
    with pytest.raises(TypeError, match="z: expected a torch.Tensor, got None"):
        compiled._C.cpu_backward_by_owner(p.x, *owned, *options)


def test_values_are_read_from_memory_only_where_they_are_there():
    assert compiled.value_of(torch.tensor([0.25, 0.5])[1]) == 0.5
    assert compiled.value_of(torch.tensor(0.5)._neg_view()) == -0.5
    assert compiled.value_of(torch._efficientzerotensor(())) == 0.0


def test_environment_follows_os_environ(monkeypatch):
    monkeypatch.delenv("AFA_KERNELS_BACKEND", raising=False)
    assert compiled.environment("AFA_KERNELS_BACKEND") is None
    monkeypatch.setenv("AFA_KERNELS_BACKEND", "torch")
    assert compiled.environment("AFA_KERNELS_BACKEND") == "torch"


def strange_tensors():
    """Whatever may come in the place of an operand (2, 4)."""
    yield from (None, 0.5, [[1.0] * 4] * 2, torch.Tensor, object())
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.complex64, torch.bool):
        yield torch.ones(2, 4, dtype=dtype)
    yield from (torch.ones(4), torch.ones(1), torch.ones(()), torch.ones(4, 2), torch.ones(2, 4, 1), torch.ones(0, 4))
    yield from (torch.ones(2, 4).as_subclass(type("Odd", (torch.Tensor,), {})), torch.nn.Parameter(torch.ones(2, 4)))
    yield torch._efficientzerotensor((2, 4))
    yield torch.ones(2, 4)._neg_view()


def tensors_without_memory():
    """What torch does not hand out, with an exception that takes a millisecond."""
    yield torch.ones(2, 4).to_sparse()
    yield torch.ones(2, 4, device="meta")
    if torch.backends.mkldnn.is_available():
        yield torch.ones(2, 4).to_mkldnn()


def may_skip_the_dispatcher(check, *arguments, **options) -> bool:
    try:
        return check(*arguments, **options)
    except (TypeError, ValueError, AttributeError):
        return False


def test_nothing_wrong_is_recognized(monkeypatch):
    """With strange tensors in any three places, or in any two with those that take long: what the compiled module
    recognizes passes the checks without it, and is what the checks say that it is, of torch's own types and in its
    memory."""
    for name in ("recognizes_lora", "recognizes_linear"):
        monkeypatch.setattr(compiled, name, compiled._recognizes_nothing)
    right = torch.ones(4, 4)
    three = [*strange_tensors(), right, right[0]]
    two = [*three, *tensors_without_memory()]
    for check, recognizes, count in (
        (lambda *t: checks.lora(*t, inplace=False), compiled._C.recognizes_lora, 4),
        (checks.linear, compiled._C.recognizes_linear, 5),
    ):
        recognized = 0
        for candidates, repeat in ((three, 3), (two, 2)):
            for places in itertools.combinations(range(count), repeat):
                for strange in itertools.product(candidates, repeat=repeat):
                    operands = [right] * count
                    for place, t in zip(places, strange, strict=True):
                        operands[place] = t
                    if recognizes(*operands):
                        recognized += 1
                        assert may_skip_the_dispatcher(check, *operands)
        assert recognized > 0 or not compiled._C.has_exchange_table()


def test_layers_on_one_x_are_recognized_where_each_is():
    x = square = torch.ones(4, 4)
    good = (square, None, square, square)
    for place in range(4):
        for t in (*strange_tensors(), *tensors_without_memory(), square, square[0], torch.ones(4, 5), None):
            other = (*good[:place], t, *good[place + 1 :])
            recognized = compiled._C.recognizes_linear(x, *other)
            for layers in ([other], [good, other], [other, good]):
                assert compiled._C.recognizes_shared(x, layers) == recognized
    for odd in (7, (), good[:3], list(good), (1, 2, 3, 4)):
        assert not compiled._C.recognizes_shared(x, [good, odd])


def test_subclasses_are_left_to_python():
    """A subclass may answer for its shape or dtype itself."""
    plain = torch.ones(2, 4)
    odd = plain.as_subclass(Subclass)
    square = torch.ones(4, 4)
    assert compiled._C.recognizes_lora(plain, square, square, plain) == compiled._C.has_exchange_table()
    assert not compiled._C.recognizes_lora(odd, square, square, plain)
    assert not compiled._C.recognizes_lora(plain, square, square, odd)
