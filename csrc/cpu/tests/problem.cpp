// Products are checked from the kernel's own z, whose error is checked by itself.
#include <cmath>
#include <cstdio>

#include "common/activation.h"
#include "common/philox.h"
#include "cpu/tests/checks.h"
#include "cpu/tests/operand.h"

namespace afa::cpu::test {

namespace {

double epsilon_of(Dtype dtype) {
    return dtype == Dtype::bf16 ? 0x1p-8 : dtype == Dtype::f16 ? 0x1p-11 : 0x1p-22;
}

// The rounding of a subnormal number, which no relative error covers.
double least_rounding_of(Dtype dtype) { return dtype == Dtype::f16 ? 0x1p-25 : 1e-30; }

int failures = 0;

void expect(const char* what, uint64_t seed, Dtype dtype, double got, double wanted,
            double allowed) {
    if (std::fabs(got - wanted) <= allowed + least_rounding_of(dtype))
        return;
    if (++failures <= 20)
        std::printf("seed %llu: %s is %.9g, expected %.9g within %.3g\n",
                    static_cast<unsigned long long>(seed), what, got, wanted, allowed);
}

}  // namespace

int check_problem(uint64_t seed) {
    failures = 0;
    seed_draws(seed);
    const int64_t limits[] = {3, 20, 70, 600};
    const auto size = [&] { return draw(1, limits[draw(0, 3)]); };
    // Whole tiles take other ways than ragged ones.
    const auto length = [&] { return draw(0, 2) ? size() : 64 * draw(1, 10); };
    const int64_t m = size(), k = length(), n = length(), r = draw(1, draw(0, 9) ? 20 : 256);
    const Dtype dtype = static_cast<Dtype>(draw(0, 2));
    const auto factor_dtype = [&] { return draw(0, 1) ? dtype : static_cast<Dtype>(draw(0, 3)); };
    const float alpha_t = static_cast<float>(draw(0, 2)) / 2;
    const int64_t key = static_cast<int64_t>(bits());

    Operand x = operand(m, k, dtype, 1), dy = operand(m, n, dtype, 1),
            base = operand(m, n, dtype, 1);
    Operand a = operand(r, k, factor_dtype(), 1 / std::sqrt(k)),
            b = operand(n, r, factor_dtype(), 1 / std::sqrt(r));
    Operand out = operand(m, n, dtype, 0), z = operand(m, r, dtype, 0, true);
    Operand dx = operand(m, k, dtype, 0, true), da = operand(r, k, a.matrix.dtype, 0, true);
    Operand db = operand(n, r, b.matrix.dtype, 0, true);

    ForwardParams f;
    f.m = m, f.k = k, f.n = n, f.r = r, f.dtype = dtype;
    f.alpha_t = &alpha_t, f.seed = &key, f.scaling = 1.5f;
    f.activation = static_cast<int>(draw(0, afa::kActivationCount - 1));
    f.dropout = draw(0, 2) ? 0 : static_cast<int>(draw(1, 200));
    f.threads = static_cast<int>(draw(1, 4));
    f.x = x.matrix, f.a = a.matrix, f.b = b.matrix, f.out = out.matrix, f.z = z.matrix;
    const bool with_base = draw(0, 1);
    if (with_base)
        f.base = base.matrix;
    forward(f);

    BackwardParams g;
    static_cast<CommonParams&>(g) = f;
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
    backward(g);

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
            const afa::ValueSlope value =
                afa::anneal_by_id(f.activation, static_cast<float>(z.get(i, j)), alpha_t);
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
    return failures;
}

}  // namespace afa::cpu::test
