"""Floating-point instructions of the PTX machine: exact ones against numpy, Python's fractions and torch's roundings to
the bit, approximate ones within the error that the PTX ISA states."""

from fractions import Fraction

import numpy as np
import pytest
import torch

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with AFA_BUILD_PTX_MACHINE=1 only")

from ptx_helpers import COMPARISONS, bits, per_lane  # noqa: E402

U16, U32, S32, S64, F32, F64 = np.uint16, np.uint32, np.int32, np.int64, np.float32, np.float64
RANDOM = np.random.default_rng(7)


def floats(special: bool = True) -> np.ndarray:
    values = RANDOM.standard_normal(32).astype(F32) * np.exp2(RANDOM.integers(-30, 30, 32)).astype(F32)
    if special:
        values[:10] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 1.0, -1.0]
    return RANDOM.permutation(values)


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
    distance = lambda g: (abs(Fraction(float(g)) - exact), int(g.view(U32)) & 1)  # noqa: E731
    return min(around, key=distance)


def below(a, b, c):
    """Round a * b + c down."""
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
    "min.f32": (2, lambda a, b: np.where((a == 0) & (b == 0), -(-a - b), np.fmin(a, b))),  # -0 is below +0
    "max.f32": (2, lambda a, b: np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))),
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
