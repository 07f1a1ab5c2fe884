// Random problems for the CPU kernels, checked against double loops; built with sanitizers by
// -DAFA_SANITIZE=ON.
//
//   driver [problems] [first seed]      the instruction set is that of AFA_CPU_ISA
//
// Every operand is an allocation of its exact size, so that one element too far is an error, and
// the gaps between strided elements hold NaN. Products are checked from the kernel's own z, whose
// error is checked by itself.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/activation.h"
#include "common/philox.h"
#include "cpu/cpu.h"

namespace {

using afa::cpu::Dtype;
using afa::cpu::Matrix;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
double epsilon_of(Dtype dtype) {
    return dtype == Dtype::bf16 ? 0x1p-8 : dtype == Dtype::f16 ? 0x1p-11 : 0x1p-22;
}

// The rounding of a subnormal number, which no relative error covers.
double least_rounding_of(Dtype dtype) { return dtype == Dtype::f16 ? 0x1p-25 : 1e-30; }

double read(const void* p, Dtype dtype) {
    if (dtype == Dtype::f64)
        return *static_cast<const double*>(p);
    if (dtype == Dtype::f32)
        return *static_cast<const float*>(p);
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    if (dtype == Dtype::bf16) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31)
        return mantissa ? static_cast<double>(kNan)
                        : sign * std::numeric_limits<double>::infinity();
    return sign *
           (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// Rounds towards zero in 16 bits, which is exact enough for inputs.
void write(double value, void* p, Dtype dtype) {
    const float single = static_cast<float>(value);
    if (dtype == Dtype::f64) {
        *static_cast<double*>(p) = value;
    } else if (dtype == Dtype::f32) {
        *static_cast<float*>(p) = single;
    } else {
        uint32_t bits;
        std::memcpy(&bits, &single, 4);
        uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (dtype == Dtype::f16) {
            const int exponent = static_cast<int>((bits >> 23) & 255) - 112;
            half = std::isnan(single)
                       ? 0x7E00
                       : static_cast<uint16_t>(
                             ((bits >> 16) & 0x8000) |
                             (exponent <= 0 ? 0 : (exponent << 10) | ((bits >> 13) & 1023)));
        }
        std::memcpy(p, &half, 2);
    }
}

struct Operand {
    std::vector<char> memory;
    Matrix matrix;
    int64_t rows = 0, cols = 0;

    char* at(int64_t i, int64_t j) {
        return static_cast<char*>(matrix.data) +
               (i * matrix.row_stride + j * matrix.col_stride) * size_of(matrix.dtype);
    }
    double get(int64_t i, int64_t j) { return read(at(i, j), matrix.dtype); }
};

std::mt19937_64 random_engine;
int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_engine);
}
double normal() { return std::normal_distribution<double>()(random_engine); }

// Dense, transposed, or with gaps; filled with scale * normal, or with NaN if scale is 0.
Operand operand(int64_t rows, int64_t cols, Dtype dtype, double scale, bool dense = false) {
    Operand made;
    made.rows = rows;
    made.cols = cols;
    const int64_t kind = dense ? 0 : draw(0, 3), step = kind == 2 ? draw(2, 3) : 1;
    made.matrix.dtype = dtype;
    made.matrix.row_stride = kind == 1 ? 1 : cols * step + (kind == 3 ? draw(1, 9) : 0);
    made.matrix.col_stride = kind == 1 ? rows : step;
    const int64_t count =
        (rows - 1) * made.matrix.row_stride + (cols - 1) * made.matrix.col_stride + 1;
    made.memory.resize(count * size_of(dtype));
    made.matrix.data = made.memory.data();
    for (int64_t i = 0; i < count; ++i)
        write(kNan, made.memory.data() + i * size_of(dtype), dtype);
    if (scale != 0.0)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j)
                write(scale * normal(), made.at(i, j), dtype);
    return made;
}

afa::ValueSlope phi(int activation, double z, float alpha_t) {
    using afa::Activation;
    const float value = static_cast<float>(z);
    switch (static_cast<Activation>(activation)) {
    case Activation::relu:
        return afa::anneal<Activation::relu>(value, alpha_t);
    case Activation::silu:
        return afa::anneal<Activation::silu>(value, alpha_t);
    case Activation::gelu:
        return afa::anneal<Activation::gelu>(value, alpha_t);
    case Activation::gelu_tanh:
        return afa::anneal<Activation::gelu_tanh>(value, alpha_t);
    case Activation::leaky_relu:
        return afa::anneal<Activation::leaky_relu>(value, alpha_t);
    case Activation::tanh:
        return afa::anneal<Activation::tanh>(value, alpha_t);
    default:
        return afa::anneal<Activation::sin>(value, alpha_t);
    }
}

int failures = 0;

void expect(const char* what, uint64_t seed, Dtype dtype, double got, double wanted,
            double allowed) {
    if (std::fabs(got - wanted) <= allowed + least_rounding_of(dtype))
        return;
    if (++failures <= 20)
        std::printf("seed %llu: %s is %.9g, expected %.9g within %.3g\n",
                    static_cast<unsigned long long>(seed), what, got, wanted, allowed);
}

// One problem: random shape, dtypes, strides, dropout, threads and subset of gradients.
void check(uint64_t seed) {
    random_engine.seed(seed);
    const int64_t limits[] = {3, 20, 70, 600};
    const auto size = [&] { return draw(1, limits[draw(0, 3)]); };
    // Whole tiles take other ways than ragged ones.
    const auto length = [&] { return draw(0, 2) ? size() : 64 * draw(1, 10); };
    const int64_t m = size(), k = length(), n = length(), r = draw(1, draw(0, 9) ? 20 : 256);
    const Dtype dtype = static_cast<Dtype>(draw(0, 2));
    const auto factor_dtype = [&] { return draw(0, 1) ? dtype : static_cast<Dtype>(draw(0, 3)); };
    const float alpha_t = static_cast<float>(draw(0, 2)) / 2;
    const int64_t key = static_cast<int64_t>(random_engine());

    Operand x = operand(m, k, dtype, 1), dy = operand(m, n, dtype, 1),
            base = operand(m, n, dtype, 1);
    Operand a = operand(r, k, factor_dtype(), 1 / std::sqrt(k)),
            b = operand(n, r, factor_dtype(), 1 / std::sqrt(r));
    Operand out = operand(m, n, dtype, 0), z = operand(m, r, dtype, 0, true);
    Operand dx = operand(m, k, dtype, 0, true), da = operand(r, k, a.matrix.dtype, 0, true);
    Operand db = operand(n, r, b.matrix.dtype, 0, true);

    afa::cpu::ForwardParams f;
    f.m = m, f.k = k, f.n = n, f.r = r, f.dtype = dtype;
    f.alpha_t = &alpha_t, f.seed = &key, f.scaling = 1.5f;
    f.activation = static_cast<int>(draw(0, afa::kActivationCount - 1));
    f.dropout = draw(0, 2) ? 0 : static_cast<int>(draw(1, 200));
    f.threads = static_cast<int>(draw(1, 4));
    f.x = x.matrix, f.a = a.matrix, f.b = b.matrix, f.out = out.matrix, f.z = z.matrix;
    const bool with_base = draw(0, 1);
    if (with_base)
        f.base = base.matrix;
    afa::cpu::forward(f);

    afa::cpu::BackwardParams g;
    static_cast<afa::cpu::CommonParams&>(g) = f;
    const int64_t needs = draw(1, 7);
    g.dy = dy.matrix, g.x = x.matrix, g.a = a.matrix, g.b = b.matrix;
    if (draw(0, 1))
        g.z = z.matrix;
    if (needs & 1)
        g.dx = dx.matrix;
    if (needs & 2)
        g.da = da.matrix;
    if (needs & 4)
        g.db = db.matrix;
    afa::cpu::backward(g);

    // Factors are rounded to the dtype of x by the kernels; here that is part of the allowed error.
    const double eps = 4 * epsilon_of(dtype), act_error = 2e-7, inverse = 256.0 / (256 - f.dropout);
    std::vector<double> keep(m * k, 1.0), h(m * r), h_size(m * r), slope(m * r);
    std::vector<double> dz(m * r), dz_size(m * r);
    const int64_t calls = (k + afa::kDropoutColumns - 1) / afa::kDropoutColumns;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < k; ++c)
            keep[i * k + c] = afa::dropout_keeps(
                afa::dropout_bytes(static_cast<uint64_t>(key), i, calls, c / afa::kDropoutColumns),
                static_cast<int>(c % afa::kDropoutColumns), f.dropout);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < r; ++j) {
            double sum = 0, sizes = 0;
            for (int64_t c = 0; c < k; ++c) {
                const double term = inverse * keep[i * k + c] * x.get(i, c) * a.get(j, c);
                sum += term, sizes += std::fabs(term);
            }
            expect("z", seed, dtype, z.get(i, j), sum, eps * sizes);
            const afa::ValueSlope value = phi(f.activation, z.get(i, j), alpha_t);
            h[i * r + j] = value.value, slope[i * r + j] = value.slope;
            // The kernels compute the activations in their own way, to act_error.
            h_size[i * r + j] = std::fabs(h[i * r + j]) + act_error / eps * std::fabs(z.get(i, j));
            sum = sizes = 0;
            for (int64_t c = 0; c < n; ++c) {
                const double term = f.scaling * inverse * dy.get(i, c) * b.get(c, j);
                sum += term, sizes += std::fabs(term);
            }
            dz[i * r + j] = sum * slope[i * r + j];
            dz_size[i * r + j] = sizes * (std::fabs(slope[i * r + j]) + act_error / eps);
        }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < n; ++c) {
            double sum = with_base ? base.get(i, c) : 0, sizes = std::fabs(sum);
            for (int64_t j = 0; j < r; ++j) {
                sum += f.scaling * h[i * r + j] * b.get(c, j);
                sizes += std::fabs(f.scaling * h_size[i * r + j] * b.get(c, j));
            }
            expect("y", seed, dtype, out.get(i, c), sum, eps * sizes);
        }
    for (int64_t i = 0; i < m && (needs & 1); ++i)
        for (int64_t c = 0; c < k; ++c) {
            double sum = 0, sizes = 0;
            for (int64_t j = 0; j < r; ++j) {
                sum += keep[i * k + c] * dz[i * r + j] * a.get(j, c);
                sizes += std::fabs(dz_size[i * r + j] * a.get(j, c));
            }
            expect("dx", seed, dtype, dx.get(i, c), sum, eps * sizes);
        }
    // dz carries the 1 / (1 - p) of both gradients, so dA has it once.
    for (int64_t j = 0; j < r; ++j) {
        for (int64_t c = 0; c < k && (needs & 2); ++c) {
            double sum = 0, sizes = 0;
            for (int64_t i = 0; i < m; ++i) {
                sum += keep[i * k + c] * dz[i * r + j] * x.get(i, c);
                sizes += std::fabs(dz_size[i * r + j] * x.get(i, c));
            }
            expect("dA", seed, da.matrix.dtype, da.get(j, c), sum,
                   std::fmax(eps, 4 * epsilon_of(da.matrix.dtype)) * sizes);
        }
        for (int64_t c = 0; c < n && (needs & 4); ++c) {
            double sum = 0, sizes = 0;
            for (int64_t i = 0; i < m; ++i) {
                sum += f.scaling * dy.get(i, c) * h[i * r + j];
                sizes += std::fabs(f.scaling * dy.get(i, c) * h_size[i * r + j]);
            }
            expect("dB", seed, db.matrix.dtype, db.get(c, j), sum,
                   std::fmax(eps, 4 * epsilon_of(db.matrix.dtype)) * sizes);
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t problems = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 200;
    const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    const char* isa = afa::cpu::isa_name(afa::cpu::selected_isa());
    for (uint64_t seed = first; seed < first + problems; ++seed)
        check(seed);
    std::printf("%s: %llu problems, %d failures\n", isa, static_cast<unsigned long long>(problems),
                failures);
    return failures ? 1 : 0;
}
