// Floating-point arithmetic. Compiled without contraction: a multiplication and an addition round
// twice where the PTX says so. Approximate instructions give what the C library gives, which is
// within the error that the PTX ISA allows them.
#include <cmath>

#include "ptx_machine/forms.h"
#include "ptx_machine/half.h"
#include "ptx_machine/map.h"

namespace ptx {
namespace {

// ftz: subnormal inputs and results become zeros of their sign.
float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

float add(float a, float b) { return a + b; }
float sub(float a, float b) { return a - b; }
float mul(float a, float b) { return a * b; }
float fused(float a, float b, float c) { return std::fma(a, b, c); }
float add_ftz(float a, float b) { return flush(flush(a) + flush(b)); }
float sub_ftz(float a, float b) { return flush(flush(a) - flush(b)); }
float mul_ftz(float a, float b) { return flush(flush(a) * flush(b)); }
float fused_ftz(float a, float b, float c) { return flush(std::fma(flush(a), flush(b), flush(c))); }

// Rounded down: the product is exact in double, and so is the error of its sum with c, so that the
// double below the exact value is known; its float below is the result.
float fused_down(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c;
    if (!std::isfinite(sum))
        return static_cast<float>(sum);
    const double part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    const double below = error < 0 ? std::nextafter(sum, -HUGE_VAL) : sum;
    const float nearest = static_cast<float>(below);
    return nearest > below ? std::nextafter(nearest, -HUGE_VALF) : nearest;
}

float negate(float a) { return float_of(bits_of(a) ^ 0x80000000u); }
float absolute(float a) { return float_of(bits_of(a) & 0x7FFFFFFFu); }
float absolute_ftz(float a) { return absolute(flush(a)); }
float copy_sign(float a, float b) {  // the sign of a, the magnitude of b
    return float_of((bits_of(a) & 0x80000000u) | (bits_of(b) & 0x7FFFFFFFu));
}

// Of a NaN and a number, the number; -0 is below +0.
float minimum(float a, float b) {
    if (a != a)
        return b;
    if (b != b)
        return a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
}
float maximum(float a, float b) {
    if (a != a)
        return b;
    if (b != b)
        return a;
    return a > b || (a == b && std::signbit(b)) ? a : b;
}

float divide(float a, float b) { return a / b; }
float reciprocal(float a) { return 1.0f / a; }
float reciprocal_ftz(float a) { return flush(1.0f / flush(a)); }
float power_of_two(float a) { return std::exp2(a); }
float power_of_two_ftz(float a) { return flush(std::exp2(flush(a))); }

double mul_f64(double a, double b) { return a * b; }

// Comparisons: a NaN makes the ordered ones false and the unordered ones (ltu, ...) true.
bool eq(float a, float b) { return a == b; }
bool ne(float a, float b) { return a < b || a > b; }
bool lt(float a, float b) { return a < b; }
bool le(float a, float b) { return a <= b; }
bool gt(float a, float b) { return a > b; }
bool ge(float a, float b) { return a >= b; }
bool equ(float a, float b) { return !ne(a, b); }
bool neu(float a, float b) { return !(a == b); }
bool ltu(float a, float b) { return !(a >= b); }
bool leu(float a, float b) { return !(a > b); }
bool gtu(float a, float b) { return !(a <= b); }
bool geu(float a, float b) { return !(a < b); }
bool num(float a, float b) { return a == a && b == b; }
bool nan(float a, float b) { return !num(a, b); }

using Compare = bool (*)(float, float);
using Widen = float (*)(uint32_t);

template <Compare kCompare, Widen kWiden>
bool of_narrow(uint32_t a, uint32_t b) {
    return kCompare(kWiden(a), kWiden(b));
}

// Two results: of the low halves and of the high ones.
template <Compare kCompare, Widen kWiden>
void of_pairs(Warp& warp, const Instruction& i) {
    const uint32_t *a = warp.in<uint32_t>(i.op[2]), *b = warp.in<uint32_t>(i.op[3]);
    uint32_t low = 0, high = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        low |= static_cast<uint32_t>(kCompare(kWiden(a[lane] & 0xFFFF), kWiden(b[lane] & 0xFFFF)))
               << lane;
        high |= static_cast<uint32_t>(kCompare(kWiden(a[lane] >> 16), kWiden(b[lane] >> 16)))
                << lane;
    }
    warp.set_predicate(i.op[0], low);
    warp.set_predicate(i.op[1], high);
}

template <Compare kCompare>
void add_comparison(Forms& f, const std::string& name) {
    f.add("setp." + name + ".f32", "Pdd", map<kCompare>);
    f.add("setp." + name + ".f16", "Phh", map<of_narrow<kCompare, f16_to_float>>);
    f.add("setp." + name + ".bf16", "Phh", map<of_narrow<kCompare, bf16_to_float>>);
    f.add("setp." + name + ".f16x2", "{PP}dd", of_pairs<kCompare, f16_to_float>);
    f.add("setp." + name + ".bf16x2", "{PP}dd", of_pairs<kCompare, bf16_to_float>);
}

}  // namespace

void add_float_forms(Forms& f) {
    f.add("add.f32", "Ddd", map<add>);
    f.add("sub.f32", "Ddd", map<sub>);
    f.add("mul.f32", "Ddd", map<mul>);
    f.add("add.rn.f32", "Ddd", map<add>);
    f.add("sub.rn.f32", "Ddd", map<sub>);
    f.add("mul.rn.f32", "Ddd", map<mul>);
    f.add("add.ftz.f32", "Ddd", map<add_ftz>);
    f.add("sub.ftz.f32", "Ddd", map<sub_ftz>);
    f.add("mul.ftz.f32", "Ddd", map<mul_ftz>);
    f.add("mul.rn.ftz.f32", "Ddd", map<mul_ftz>);
    f.add("fma.rn.f32", "Dddd", map<fused>);
    f.add("fma.rn.ftz.f32", "Dddd", map<fused_ftz>);
    f.add("fma.rm.f32", "Dddd", map<fused_down>);
    f.add("min.f32", "Ddd", map<minimum>);
    f.add("max.f32", "Ddd", map<maximum>);
    f.add("neg.f32", "Dd", map<negate>);
    f.add("abs.f32", "Dd", map<absolute>);
    f.add("abs.ftz.f32", "Dd", map<absolute_ftz>);
    f.add("copysign.f32", "Ddd", map<copy_sign>);
    f.add("div.full.f32", "Ddd", map<divide>);
    f.add("div.rn.f32", "Ddd", map<divide>);
    f.add("rcp.rn.f32", "Dd", map<reciprocal>);
    f.add("rcp.approx.ftz.f32", "Dd", map<reciprocal_ftz>);
    f.add("ex2.approx.f32", "Dd", map<power_of_two>);
    f.add("ex2.approx.ftz.f32", "Dd", map<power_of_two_ftz>);
    f.add("mul.f64", "Qqq", map<mul_f64>);

    add_comparison<eq>(f, "eq");
    add_comparison<ne>(f, "ne");
    add_comparison<lt>(f, "lt");
    add_comparison<le>(f, "le");
    add_comparison<gt>(f, "gt");
    add_comparison<ge>(f, "ge");
    add_comparison<equ>(f, "equ");
    add_comparison<neu>(f, "neu");
    add_comparison<ltu>(f, "ltu");
    add_comparison<leu>(f, "leu");
    add_comparison<gtu>(f, "gtu");
    add_comparison<geu>(f, "geu");
    add_comparison<num>(f, "num");
    add_comparison<nan>(f, "nan");
}

}  // namespace ptx
