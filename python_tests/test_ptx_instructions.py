"""Every instruction of the PTX machine against an independent truth: numpy's integers and floats, torch's roundings,
and a list that no instruction is missing from."""

import numpy as np
import pytest
import torch

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with the emulator only (AFA_BUILD_EMULATOR=1)")

from ptx_helpers import per_lane  # noqa: E402

U16, U32, U64, S32, S64, F32, F64 = (
    np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64
)  # fmt: skip
RANDOM = np.random.default_rng(5)


def bits(dtype, *edges) -> np.ndarray:
    """Return 32 values: the edges of the type, some given ones, and random bits."""
    size = np.dtype(dtype).itemsize
    integer = np.dtype(f"u{size}")
    ends = [0, 1, 2, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1, *edges]
    rest = RANDOM.integers(0, np.iinfo(integer).max, 32 - len(ends), dtype=integer, endpoint=True)
    values = np.concatenate([np.array(ends, dtype=integer), rest])
    return RANDOM.permutation(values).view(dtype)


def floats(special: bool = True) -> np.ndarray:
    values = RANDOM.standard_normal(32).astype(F32) * np.exp2(RANDOM.integers(-30, 30, 32)).astype(F32)
    if special:
        values[:10] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 1.0, -1.0]
    return RANDOM.permutation(values)


def low(values, dtype):
    """Return Python integers as the bits of a type."""
    size = 8 * np.dtype(dtype).itemsize
    integer = np.dtype(f"u{size // 8}")
    return np.array([int(v) & ((1 << size) - 1) for v in values], dtype=integer).view(dtype)


def integers(function, result, *types):
    """Make a case whose truth is a function of Python integers, of which the low bits count."""

    def truth(*inputs):
        return low([function(*(int(v) for v in lane)) for lane in zip(*inputs, strict=True)], result)

    return truth, result, types


def field(a, position, length, width=32):
    """Return bits [position, position + length) of a number of unlimited width."""
    return (a >> position) & ((1 << length) - 1)


def inserted(width):
    def insert(a, b, c, d):
        position, length = c & 255, d & 255
        for k in range(length):
            if position + k < width:
                b = b & ~(1 << position + k) | (a >> k & 1) << position + k
        return b

    return insert


def extracted_signed(a, b, c):
    position, length = b & 255, c & 255
    if length == 0:
        return 0
    sign = a >> min(position + length - 1, 31) & 1
    return sum(((a >> position + k & 1) if k < length and position + k < 32 else sign) << k for k in range(32))


def quotient(a, b):
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permuted(a, b, c):
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = []
    for k in range(4):
        digit = c >> 4 * k & 15
        byte = pool[digit & 7]
        out.append((255 if byte & 128 else 0) if digit & 8 else byte)
    return int.from_bytes(bytes(out), "little")


INTEGERS = {
    "add.s32": integers(lambda a, b: a + b, U32, S32, S32),
    "add.u32": integers(lambda a, b: a + b, U32, U32, U32),
    "sub.s32": integers(lambda a, b: a - b, U32, S32, S32),
    "sub.u32": integers(lambda a, b: a - b, U32, U32, U32),
    "mul.lo.s32": integers(lambda a, b: a * b, U32, S32, S32),
    "mul.lo.u32": integers(lambda a, b: a * b, U32, U32, U32),
    "mul.hi.u32": integers(lambda a, b: a * b >> 32, U32, U32, U32),
    "mad.lo.s32": integers(lambda a, b, c: a * b + c, U32, S32, S32, S32),
    "mad.lo.u32": integers(lambda a, b, c: a * b + c, U32, U32, U32, U32),
    "add.s64": integers(lambda a, b: a + b, U64, S64, S64),
    "add.u64": integers(lambda a, b: a + b, U64, U64, U64),
    "sub.s64": integers(lambda a, b: a - b, U64, S64, S64),
    "sub.u64": integers(lambda a, b: a - b, U64, U64, U64),
    "mul.lo.s64": integers(lambda a, b: a * b, U64, S64, S64),
    "mul.lo.u64": integers(lambda a, b: a * b, U64, U64, U64),
    "mad.lo.s64": integers(lambda a, b, c: a * b + c, U64, S64, S64, S64),
    "mad.lo.u64": integers(lambda a, b, c: a * b + c, U64, U64, U64, U64),
    "add.s16": integers(lambda a, b: a + b, U16, U16, U16),
    "add.u16": integers(lambda a, b: a + b, U16, U16, U16),
    "sub.s16": integers(lambda a, b: a - b, U16, U16, U16),
    "sub.u16": integers(lambda a, b: a - b, U16, U16, U16),
    "mul.lo.s16": integers(lambda a, b: a * b, U16, U16, U16),
    "mul.lo.u16": integers(lambda a, b: a * b, U16, U16, U16),
    "mul.wide.u16": integers(lambda a, b: a * b, U32, U16, U16),
    "mul.wide.u32": integers(lambda a, b: a * b, U64, U32, U32),
    "mul.wide.s32": integers(lambda a, b: a * b, U64, S32, S32),
    "mad.wide.u32": integers(lambda a, b, c: a * b + c, U64, U32, U32, U64),
    "mad.wide.s32": integers(lambda a, b, c: a * b + c, U64, S32, S32, S64),
    "neg.s32": integers(lambda a: -a, U32, S32),
    "neg.s64": integers(lambda a: -a, U64, S64),
    "min.s32": integers(min, U32, S32, S32),
    "min.u32": integers(min, U32, U32, U32),
    "min.s64": integers(min, U64, S64, S64),
    "max.s32": integers(max, U32, S32, S32),
    "max.u32": integers(max, U32, U32, U32),
    "max.s64": integers(max, U64, S64, S64),
    "and.b16": integers(lambda a, b: a & b, U16, U16, U16),
    "or.b16": integers(lambda a, b: a | b, U16, U16, U16),
    "xor.b16": integers(lambda a, b: a ^ b, U16, U16, U16),
    "and.b32": integers(lambda a, b: a & b, U32, U32, U32),
    "or.b32": integers(lambda a, b: a | b, U32, U32, U32),
    "xor.b32": integers(lambda a, b: a ^ b, U32, U32, U32),
    "not.b32": integers(lambda a: ~a, U32, U32),
    "and.b64": integers(lambda a, b: a & b, U64, U64, U64),
    "or.b64": integers(lambda a, b: a | b, U64, U64, U64),
    "xor.b64": integers(lambda a, b: a ^ b, U64, U64, U64),
    "not.b64": integers(lambda a: ~a, U64, U64),
    "shl.b16": integers(lambda a, n: a << n, U16, U16, U32),
    "shl.b32": integers(lambda a, n: a << n, U32, U32, U32),
    "shl.b64": integers(lambda a, n: a << n, U64, U64, U32),
    "shr.u16": integers(lambda a, n: a >> n, U16, U16, U32),
    "shr.u32": integers(lambda a, n: a >> n, U32, U32, U32),
    "shr.b32": integers(lambda a, n: a >> n, U32, U32, U32),
    "shr.s32": integers(lambda a, n: a >> n, U32, S32, U32),
    "shr.u64": integers(lambda a, n: a >> n, U64, U64, U32),
    "shr.b64": integers(lambda a, n: a >> n, U64, U64, U32),
    "shr.s64": integers(lambda a, n: a >> n, U64, S64, U32),
    "shf.l.wrap.b32": integers(lambda a, b, n: ((b << 32 | a) << (n & 31)) >> 32, U32, U32, U32, U32),
    "shf.r.wrap.b32": integers(lambda a, b, n: (b << 32 | a) >> (n & 31), U32, U32, U32, U32),
    "bfe.u32": integers(lambda a, b, c: field(a, b & 255, c & 255), U32, U32, U32, U32),
    "bfe.s32": integers(extracted_signed, U32, U32, U32, U32),
    "bfi.b32": integers(inserted(32), U32, U32, U32, U32, U32),
    "bfi.b64": integers(inserted(64), U64, U64, U64, U32, U32),
    "prmt.b32": integers(permuted, U32, U32, U32, U32),
    "div.s32": integers(quotient, U32, S32, S32),
    "div.u32": integers(quotient, U32, U32, U32),
    "div.s64": integers(quotient, U64, S64, S64),
    "div.u64": integers(quotient, U64, U64, U64),
    "rem.s32": integers(lambda a, b: a - b * quotient(a, b), U32, S32, S32),
    "rem.u32": integers(lambda a, b: a - b * quotient(a, b), U32, U32, U32),
    "cvt.s64.s32": integers(lambda a: a, U64, S32),
    "cvt.u64.u32": integers(lambda a: a, U64, U32),
    "cvt.u32.u64": integers(lambda a: a, U32, U64),
    "cvt.u16.u32": integers(lambda a: a, U16, U32),
    "cvt.u32.u16": integers(lambda a: a, U32, U16),
    "cvt.s32.s16": integers(lambda a: a, U32, np.int16),
    "mov.b16": integers(lambda a: a, U16, U16),
    "mov.u16": integers(lambda a: a, U16, U16),
    "mov.s16": integers(lambda a: a, U16, U16),
    "mov.b32": integers(lambda a: a, U32, U32),
    "mov.u32": integers(lambda a: a, U32, U32),
    "mov.s32": integers(lambda a: a, U32, U32),
    "mov.f32": integers(lambda a: a, U32, U32),
    "mov.b64": integers(lambda a: a, U64, U64),
    "mov.u64": integers(lambda a: a, U64, U64),
    "mov.s64": integers(lambda a: a, U64, U64),
    "mov.f64": integers(lambda a: a, U64, U64),
    "cvta.to.global.u64": integers(lambda a: a, U64, U64),
    "cvta.global.u64": integers(lambda a: a, U64, U64),
}
# Operands that count bits, by position: mostly small, so that results are not all 0.
SMALL = {"shl": (1,), "shr": (1,), "bfe": (1, 2), "bfi": (2, 3)}
NOT_ZERO = {"div": (1,), "rem": (1,)}


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_instruction(name):
    truth, result, types = INTEGERS[name]
    for _ in range(4):
        inputs = [bits(t) for t in types]
        for position in SMALL.get(name.split(".")[0], ()):
            few = RANDOM.integers(0, 40, 32).astype(types[position])
            inputs[position] = np.where(RANDOM.random(32) < 0.8, few, inputs[position] & 255).astype(types[position])
        for position in NOT_ZERO.get(name.split(".")[0], ()):
            inputs[position][inputs[position] == 0] = 3
        operands = ", ".join(f"{{a{i}}}" for i in range(len(inputs)))
        (got,) = per_lane(f"{name} {{d0}}, {operands};", inputs, [result])
        np.testing.assert_array_equal(got, truth(*inputs))


def test_multiplication_with_carry():
    a, b, c, d = (bits(U32) for _ in range(4))
    low_word, high_word = per_lane(
        "mad.lo.cc.u32 {d0}, {a0}, {a1}, {a2}; madc.hi.u32 {d1}, {a0}, {a1}, {a3};", [a, b, c, d], [U32, U32]
    )
    for lane in range(32):
        product = int(a[lane]) * int(b[lane])
        sum_low = (product & 0xFFFFFFFF) + int(c[lane])
        assert low_word[lane] == sum_low & 0xFFFFFFFF
        assert high_word[lane] == ((product >> 32) + int(d[lane]) + (sum_low >> 32)) & 0xFFFFFFFF


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
}  # fmt: skip
COMPARED = {"s16": np.int16, "u16": U16, "b16": U16, "s32": S32, "u32": U32, "b32": U32, "s64": S64, "u64": U64,
            "b64": U64}  # fmt: skip


@pytest.mark.parametrize("kind", COMPARED)
@pytest.mark.parametrize("name", COMPARISONS)
def test_integer_comparison(name, kind):
    if kind[0] == "b" and name not in ("eq", "ne"):
        assert f"setp.{name}.{kind}" not in _ptx.instruction_names()
        return
    a, b = bits(COMPARED[kind]), bits(COMPARED[kind])
    b[:12] = a[:12]
    (got,) = per_lane(f"setp.{name}.{kind} {{d0}}, {{a0}}, {{a1}};", [a, b], [bool])
    np.testing.assert_array_equal(got, COMPARISONS[name](a, b))


def float_comparison(name, a, b):
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    with np.errstate(invalid="ignore"):
        result = COMPARISONS[name[:2]](a, b)
    return result | unordered if name.endswith("u") else result & ~unordered


FLOAT_COMPARISONS = [*COMPARISONS, *(name + "u" for name in COMPARISONS), "num", "nan"]


@pytest.mark.parametrize("name", FLOAT_COMPARISONS)
def test_float_comparison(name):
    a, b = floats(), floats()
    b[:12] = a[:12]
    (got,) = per_lane(f"setp.{name}.f32 {{d0}}, {{a0}}, {{a1}};", [a, b], [bool])
    np.testing.assert_array_equal(got, float_comparison(name, a, b))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", FLOAT_COMPARISONS)
def test_comparison_of_narrow_floats(name, kind):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b = torch.from_numpy(floats()).to(dtype), torch.from_numpy(floats()).to(dtype)
    b[:12] = a[:12]
    words = [t.view(torch.int16).numpy().view(U16) for t in (a, b)]
    truth = float_comparison(name, a.float().numpy(), b.float().numpy())
    (got,) = per_lane(f"setp.{name}.{kind} {{d0}}, {{a0}}, {{a1}};", words, [bool])
    np.testing.assert_array_equal(got, truth)
    pairs = [w.astype(U32) | np.roll(w, 1).astype(U32) << 16 for w in words]
    first, second = per_lane(f"setp.{name}.{kind}x2 {{d0}}|{{d1}}, {{a0}}, {{a1}};", pairs, [bool, bool])
    np.testing.assert_array_equal(first, truth)
    np.testing.assert_array_equal(second, np.roll(truth, 1))


def flushed(x):
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(F32(0), x), x).astype(F32)


def fused(a, b, c):
    """Round a * b + c once: the sum of exact fractions, by Python."""
    from fractions import Fraction

    out = []
    for x, y, z in zip(a, b, c, strict=True):
        if not all(map(np.isfinite, (x, y, z))):
            out.append(F32(x) * F32(y) + F32(z))
            continue
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        out.append(nearest(exact, x, y, z))
    return np.array(out, dtype=F32)


def nearest(exact, x, y, z):
    """Return the float32 nearest to a fraction."""
    if exact == 0:
        return F32(F64(x) * F64(y) + F64(z))  # the sign of a zero
    guess = F32(float(exact))
    around = sorted({guess, np.nextafter(guess, F32(np.inf)), np.nextafter(guess, F32(-np.inf))})
    around = [g for g in around if np.isfinite(g)]
    if not np.isfinite(guess):
        return guess
    from fractions import Fraction

    distance = lambda g: (abs(Fraction(float(g)) - exact), int(g.view(U32)) & 1)  # noqa: E731
    return min(around, key=distance)


def below(a, b, c):
    """Round a * b + c down."""
    from fractions import Fraction

    out = []
    for x, y, z in zip(a, b, c, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        guess = F32(float(exact))
        while Fraction(float(guess)) > exact:
            guess = np.nextafter(guess, F32(-np.inf))
        while Fraction(float(np.nextafter(guess, F32(np.inf)))) <= exact:
            guess = np.nextafter(guess, F32(np.inf))
        out.append(guess)
    return np.array(out, dtype=F32)


EXACT_FLOATS = {
    "add.f32": (2, lambda a, b: a + b),
    "add.rn.f32": (2, lambda a, b: a + b),
    "sub.f32": (2, lambda a, b: a - b),
    "sub.rn.f32": (2, lambda a, b: a - b),
    "mul.f32": (2, lambda a, b: a * b),
    "mul.rn.f32": (2, lambda a, b: a * b),
    "add.ftz.f32": (2, lambda a, b: flushed(flushed(a) + flushed(b))),
    "sub.ftz.f32": (2, lambda a, b: flushed(flushed(a) - flushed(b))),
    "mul.ftz.f32": (2, lambda a, b: flushed(flushed(a) * flushed(b))),
    "mul.rn.ftz.f32": (2, lambda a, b: flushed(flushed(a) * flushed(b))),
    "fma.rn.f32": (3, fused),
    "fma.rn.ftz.f32": (3, lambda a, b, c: flushed(fused(flushed(a), flushed(b), flushed(c)))),
    "min.f32": (2, np.fmin),
    "max.f32": (2, np.fmax),
    "neg.f32": (1, lambda a: -a),
    "abs.f32": (1, np.abs),
    "abs.ftz.f32": (1, lambda a: np.abs(flushed(a))),
    "copysign.f32": (2, lambda a, b: np.copysign(b, a)),
    "div.rn.f32": (2, lambda a, b: a / b),
    "rcp.rn.f32": (1, lambda a: F32(1) / a),
}
# Within the error that the PTX ISA allows: 2 ulp, 1 ulp, 2^-22 of the result.
APPROXIMATE = {
    "div.full.f32": (2, lambda a, b: a.astype(F64) / b),
    "rcp.approx.ftz.f32": (1, lambda a: 1 / flushed(a).astype(F64)),
    "ex2.approx.f32": (1, lambda a: np.exp2(a.astype(F64))),
    "ex2.approx.ftz.f32": (1, lambda a: np.exp2(flushed(a).astype(F64))),
}


@pytest.mark.parametrize("name", EXACT_FLOATS)
@np.errstate(all="ignore")
def test_float_instruction(name):
    arity, truth = EXACT_FLOATS[name]
    for _ in range(4):
        inputs = [floats() for _ in range(arity)]
        operands = ", ".join(f"{{a{i}}}" for i in range(arity))
        (got,) = per_lane(f"{name} {{d0}}, {operands};", inputs, [F32])
        expected = truth(*inputs)
        assert got.dtype == expected.dtype == F32
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(got[numbers], expected[numbers])
        zeros = expected == 0
        np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(expected[zeros]))


def test_fused_multiply_add_rounds_once():
    a = np.full(32, 1 + 2**-12, dtype=F32)
    c = np.full(32, -1 - 2**-11, dtype=F32)
    once, twice = per_lane(
        "fma.rn.f32 {d0}, {a0}, {a0}, {a1}; mul.f32 {d1}, {a0}, {a0}; add.f32 {d1}, {d1}, {a1};", [a, c], [F32, F32]
    )
    assert (once == F32(2**-24)).all() and (twice == 0).all()


def test_fused_multiply_add_rounded_down():
    for _ in range(20):
        a, b, c = (floats(special=False) for _ in range(3))
        c = (c * RANDOM.choice([1, 1e-6, 1e6], 32)).astype(F32)
        (got,) = per_lane("fma.rm.f32 {d0}, {a0}, {a1}, {a2};", [a, b, c], [F32])
        np.testing.assert_array_equal(got, below(a, b, c))


@pytest.mark.parametrize("name", APPROXIMATE)
@np.errstate(all="ignore")
def test_approximate_instruction(name):
    arity, truth = APPROXIMATE[name]
    for _ in range(4):
        inputs = [(RANDOM.standard_normal(32) * 20).astype(F32) for _ in range(arity)]
        inputs[0][:3] = [0.0, -0.0, 1.0]
        inputs[-1][3:6] = [1.0, -3.0, 126.5]
        operands = ", ".join(f"{{a{i}}}" for i in range(arity))
        (got,) = per_lane(f"{name} {{d0}}, {operands};", inputs, [F32])
        expected = truth(*inputs)
        finite = np.isfinite(expected)
        np.testing.assert_allclose(got[finite], expected[finite], rtol=2**-22, atol=0)
        np.testing.assert_array_equal(got[~finite & ~np.isnan(expected)], expected[~finite & ~np.isnan(expected)])


@np.errstate(all="ignore")
def test_conversions_of_numbers():
    a = np.concatenate([floats(), [0.5, 1.5, 2.5, -0.5, 3e9, -3e9]])[-32:].astype(F32)
    rounded, saturated = per_lane("cvt.rni.s32.f32 {d0}, {a0}; cvt.sat.f32.f32 {d1}, {a0};", [a], [S32, F32])
    number = np.nan_to_num(np.rint(a.astype(F64)), nan=0.0)
    np.testing.assert_array_equal(rounded, np.clip(number, -(2.0**31), 2.0**31 - 1).astype(S64).astype(S32))
    np.testing.assert_array_equal(saturated, np.nan_to_num(np.clip(a, 0, 1), nan=0.0))
    (flushing,) = per_lane("cvt.rni.ftz.s32.f32 {d0}, {a0};", [a], [S32])
    np.testing.assert_array_equal(flushing, rounded)
    n = bits(S32)
    signed, unsigned = per_lane("cvt.rn.f32.s32 {d0}, {a0}; cvt.rn.f32.u32 {d1}, {a0};", [n], [F32, F32])
    np.testing.assert_array_equal(signed, n.astype(F32))
    np.testing.assert_array_equal(unsigned, n.view(U32).astype(F32))
    wide = bits(S64)
    product, narrow = per_lane(
        "cvt.rn.f64.s64 {d0}, {a0}; mul.f64 {d0}, {d0}, 0d3FD5555555555555; cvt.rn.f32.f64 {d1}, {d0};",
        [wide], [F64, F32],
    )  # fmt: skip
    np.testing.assert_array_equal(product, wide.astype(F64) * F64(1 / 3))
    np.testing.assert_array_equal(narrow, product.astype(F32))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversions_to_16_bits_match_torch(kind):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    for values in (floats(), np.array([65504, 65519, 65520, 6e-8, 2.9e-8, 1e-8, 2**-14, 3.39e38] * 4, dtype=F32),
                   (np.ones(32) + np.arange(32) * 2.0**-12).astype(F32)):  # fmt: skip
        narrow, pair = per_lane(
            f"cvt.rn.{kind}.f32 {{d0}}, {{a0}}; cvt.rn.{kind}x2.f32 {{d1}}, {{a1}}, {{a0}};",
            [values, np.roll(values, 1)], [U16, U32],
        )  # fmt: skip
        expected = torch.from_numpy(values).to(dtype)
        words = expected.view(torch.int16).numpy().view(U16)
        numbers = ~np.isnan(values)
        np.testing.assert_array_equal(narrow[numbers], words[numbers])
        np.testing.assert_array_equal(narrow[~numbers], 0x7FFF)
        np.testing.assert_array_equal(pair, narrow.astype(U32) | np.roll(narrow, 1).astype(U32) << 16)
        (back,) = per_lane(f"cvt.f32.{kind} {{d0}}, {{a0}};", [words], [F32])
        np.testing.assert_array_equal(back, expected.float().numpy())


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_16_bit_pattern_widens_as_torch_widens_it(kind):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    for start in range(0, 65536, 2048):  # every 64th pattern and its neighbours
        words = (start + np.arange(32) * 64 + start // 2048).astype(U16)
        (got,) = per_lane(f"cvt.f32.{kind} {{d0}}, {{a0}};", [words], [F32])
        expected = torch.from_numpy(words.view(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(got, expected)


def test_selections_and_predicates():
    a, b, c = bits(U32), bits(U32), bits(U32)
    for kind, dtype in (("b16", U16), ("u16", U16), ("s16", U16), ("b32", U32), ("u32", U32), ("s32", U32),
                        ("f32", U32), ("b64", U64), ("u64", U64), ("s64", U64)):  # fmt: skip
        x, y = bits(dtype), bits(dtype)
        (got,) = per_lane(f"setp.lt.u32 %p9, {{a2}}, {{a3}}; selp.{kind} {{d0}}, {{a0}}, {{a1}}, %p9;",
                          [x, y, a, b], [dtype])  # fmt: skip
        np.testing.assert_array_equal(got, np.where(a < b, x, y))
    code = """setp.lt.u32 %p8, {a0}, {a1}; setp.lt.u32 %p9, {a1}, {a2};
        and.pred {d0}, %p8, %p9; or.pred {d1}, %p8, %p9; xor.pred {d2}, %p8, %p9; not.pred {d3}, %p8;
        mov.pred {d4}, %p8; mov.pred {d5}, -1; mov.pred {d6}, 0;"""
    got = per_lane(code, [a, b, c], [bool] * 7)
    p, q = a < b, b < c
    for result, expected in zip(got, [p & q, p | q, p ^ q, ~p, p, p | True, p & False], strict=True):
        np.testing.assert_array_equal(result, expected)


def test_halves_of_registers():
    word, wide = bits(U32), bits(U64)
    code = """mov.b32 {{%h30, %h31}}, {a0}; mov.b32 {d0}, {{%h31, %h30}}; mov.b32 {{_, %h32}}, {a0}; mov.b16 {d3}, %h32;
        mov.b64 {{%r50, %r51}}, {a1}; mov.b64 {d1}, {{%r51, %r50}}; mov.b64 {{_, %r52}}, {a1}; mov.b32 {d2}, %r52;"""
    swapped, wide_swapped, high, high_half = per_lane(code, [word, wide], [U32, U64, U32, U16])
    np.testing.assert_array_equal(swapped, word >> 16 | word << 16)
    np.testing.assert_array_equal(wide_swapped, wide >> U64(32) | wide << U64(32))
    np.testing.assert_array_equal(high, (wide >> U64(32)).astype(U32))
    np.testing.assert_array_equal(high_half, (word >> 16).astype(U16))


def test_narrow_part_of_a_wide_register():
    wide = bits(U64)
    signed, unsigned = per_lane("cvt.s64.s32 {d0}, {a0}; cvt.u64.u32 {d1}, {a0};", [wide], [S64, U64])
    np.testing.assert_array_equal(signed, wide.astype(U32).view(S32).astype(S64))
    np.testing.assert_array_equal(unsigned, wide & U64(0xFFFFFFFF))


def test_results_of_inactive_lanes_are_kept():
    a, b = bits(U32), bits(U32)
    (got,) = per_lane("mov.b32 {d0}, {a0}; setp.lt.u32 %p9, {a0}, {a1}; @%p9 add.s32 {d0}, {a0}, {a1};", [a, b], [U32])
    np.testing.assert_array_equal(got, np.where(a < b, a + b, a))
    (got,) = per_lane("mov.b32 {d0}, {a0}; setp.lt.u32 %p9, {a0}, {a1}; @!%p9 mov.b32 {d0}, 7;", [a, b], [U32])
    np.testing.assert_array_equal(got, np.where(a < b, a, 7))


def test_shuffle():
    a, source = bits(U32), RANDOM.integers(0, 64, 32).astype(U32)
    for control, segment in ((31, 32), (31 | 24 << 8, 8), (31 | 16 << 8, 16)):
        (got,) = per_lane(f"shfl.sync.idx.b32 {{d0}}, {{a0}}, {{a1}}, {control}, -1;", [a, source], [U32])
        lanes = np.arange(32)
        expected = a[lanes // segment * segment + source % segment]
        np.testing.assert_array_equal(got, expected)
