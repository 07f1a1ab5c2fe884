// Row invariance: the same rows in one large call and in calls of some of them.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/activation.h"
#include "cpu/tests/checks.h"
#include "cpu/tests/operand.h"

namespace afa::cpu::test {

namespace {

// Around the rows that a kernel takes at once (3 or 6), a block of them (48, 64), and the blocks
// that the backward takes through its phases together (96, 192, 256).
constexpr int64_t kCounts[] = {1,  2,  3,  4,  5,  6,  7,  13,  16,  17,  47,  48,
                               49, 63, 64, 65, 95, 96, 97, 191, 192, 193, 256, 257};
constexpr int64_t kRows = 300;

// What one call gives.
struct Results {
    Operand out, z, dx;
};

struct RowsProblem {
    Operand x, dy, base, dx, a, b;
    CommonParams common;
    bool with_base, accumulate_dx, recompute_z;

    // Forward and backward of rows [first, first + count), on random threads.
    Results run(int64_t first, int64_t count) const {
        const auto rows = [&](const Operand& all) {
            Matrix part = all.matrix;
            part.data = all.at(first, 0);
            return part;
        };
        const Dtype dtype = common.dtype;
        Results got{operand(count, common.n, dtype, 0), operand(count, common.r, dtype, 0, true),
                    operand(count, common.k, dtype, 0, true)};
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(got.dx.at(i, 0), dx.at(first + i, 0), common.k * size_of(dtype));

        ForwardParams f;
        static_cast<CommonParams&>(f) = common;
        f.m = count;
        f.threads = static_cast<int>(draw(1, 4));
        f.x = rows(x), f.a = a.matrix, f.b = b.matrix;
        f.out = got.out.matrix, f.z = got.z.matrix;
        if (with_base)
            f.base = rows(base);
        forward(f);

        BackwardParams g;
        static_cast<CommonParams&>(g) = f;
        g.dy = rows(dy), g.x = f.x, g.a = f.a, g.b = f.b;
        if (!recompute_z)
            g.z = f.z;
        g.dx = got.dx.matrix;
        g.accumulate_dx = accumulate_dx;
        backward(g);
        return got;
    }
};

RowsProblem random_problem(uint64_t seed) {
    seed_draws(seed);
    static const float kAlphas[] = {0.0f, 0.3f, 1.0f};
    const auto length = [] { return draw(0, 1) ? draw(1, 700) : 64 * draw(1, 10); };
    RowsProblem p;
    CommonParams& c = p.common;
    c.k = length(), c.n = length(), c.r = draw(1, draw(0, 4) ? 24 : 80);
    c.dtype = static_cast<Dtype>(draw(0, 2));
    c.alpha_t = &kAlphas[draw(0, 2)];
    c.activation = static_cast<int>(draw(0, kActivationCount - 1));
    c.scaling = 1.5f;
    const Dtype factors = draw(0, 1) ? c.dtype : Dtype::f32;
    p.x = operand(kRows, c.k, c.dtype, 1), p.dy = operand(kRows, c.n, c.dtype, 1);
    p.base = operand(kRows, c.n, c.dtype, 1), p.dx = operand(kRows, c.k, c.dtype, 1, true);
    p.a = operand(c.r, c.k, factors, 1 / std::sqrt(c.k), draw(0, 1));
    p.b = operand(c.n, c.r, factors, 1 / std::sqrt(c.r), draw(0, 1));
    p.with_base = draw(0, 1), p.accumulate_dx = draw(0, 1), p.recompute_z = draw(0, 1);
    return p;
}

// Elements of `part` that differ from those of `all` from row `first` on.
int64_t differences(const Operand& part, const Operand& all, int64_t first) {
    int64_t found = 0;
    for (int64_t i = 0; i < part.rows; ++i)
        for (int64_t j = 0; j < part.cols; ++j)
            found +=
                std::memcmp(part.at(i, j), all.at(first + i, j), size_of(part.matrix.dtype)) != 0;
    return found;
}

}  // namespace

int check_rows(uint64_t seed) {
    const RowsProblem p = random_problem(seed);
    const Results all = p.run(0, kRows);
    int failures = 0;
    for (const int64_t count : kCounts) {
        const int64_t first = draw(0, kRows - count);
        const Results some = p.run(first, count);
        const int64_t y = differences(some.out, all.out, first);
        const int64_t z = differences(some.z, all.z, first);
        const int64_t dx = differences(some.dx, all.dx, first);
        if (y + z + dx == 0)
            continue;
        ++failures;
        std::printf("seed %llu: rows %lld to %lld alone differ in %lld of y, %lld of z, %lld of "
                    "dx (K %lld, N %lld, r %lld, dtype %d)\n",
                    static_cast<unsigned long long>(seed), static_cast<long long>(first),
                    static_cast<long long>(first + count - 1), static_cast<long long>(y),
                    static_cast<long long>(z), static_cast<long long>(dx),
                    static_cast<long long>(p.common.k), static_cast<long long>(p.common.n),
                    static_cast<long long>(p.common.r), static_cast<int>(p.common.dtype));
    }
    return failures;
}

}  // namespace afa::cpu::test
