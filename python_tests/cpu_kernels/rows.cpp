// Row invariance: the same rows in one large call and in calls of some of them; and the same
// members in one call and in calls of their own.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/activation.h"
#include "cpu_kernels/checks.h"
#include "cpu_kernels/operand.h"

namespace afa::cpu::test {

namespace {

// Around the rows that a kernel takes at once (3 or 6), a block of them (48, 64), and the blocks
// that the backward takes through its phases together (from 48 at high ranks to 384 at low ones).
constexpr int64_t kCounts[] = {1,  2,  3,  4,  5,  6,  7,   13,  16,  17,  47,  48,  49,
                               63, 64, 65, 95, 96, 97, 191, 192, 193, 256, 257, 384, 385};
constexpr int64_t kRows = 400;

// What one call gives: y and z of each member, and dx.
struct Results {
    std::vector<Operand> out, z;
    Operand dx;
};

struct RowsMember {
    Operand dy, base, a, b;
    Member params;
};

struct RowsProblem {
    Operand x, dx;
    std::vector<RowsMember> members;
    CommonParams common;
    bool with_base, accumulate_dx;

    // Forward and backward of rows [first, first + count) of members [begin, end), on random
    // threads.
    Results run(int64_t first, int64_t count, size_t begin, size_t end) const {
        const auto rows = [&](const Operand& all) {
            Matrix part = all.matrix;
            part.data = all.at(first, 0);
            return part;
        };
        const Dtype dtype = common.dtype;
        Results got;
        got.dx = operand(count, common.k, dtype, 0, true);
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(got.dx.at(i, 0), dx.at(first + i, 0), common.k * size_of(dtype));

        std::vector<ForwardMember> forward_members;
        std::vector<BackwardMember> backward_members;
        for (size_t i = begin; i < end; ++i) {
            const RowsMember& one = members[i];
            got.out.push_back(operand(count, one.params.n, dtype, 0));
            got.z.push_back(operand(count, one.params.r, dtype, 0, true));
            ForwardMember forward_one;
            BackwardMember backward_one;
            static_cast<Member&>(forward_one) = static_cast<Member&>(backward_one) = one.params;
            forward_one.out = got.out.back().matrix, forward_one.z = got.z.back().matrix;
            if (with_base)
                forward_one.base = rows(one.base);
            backward_one.dy = rows(one.dy), backward_one.z = forward_one.z;
            forward_members.push_back(forward_one);
            backward_members.push_back(backward_one);
        }

        ForwardParams f;
        static_cast<CommonParams&>(f) = common;
        f.m = count;
        f.threads = static_cast<int>(draw(1, 4));
        f.x = rows(x);
        BackwardParams g;
        static_cast<CommonParams&>(g) = f;
        f.members = forward_members.data(), g.members = backward_members.data();
        f.count = g.count = static_cast<int64_t>(end - begin);
        forward(f);
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
    c.k = length();
    c.dtype = static_cast<Dtype>(draw(0, 2));
    p.x = operand(kRows, c.k, c.dtype, 1), p.dx = operand(kRows, c.k, c.dtype, 1, true);
    p.with_base = draw(0, 1), p.accumulate_dx = draw(0, 1);
    p.members.resize(draw(1, 3));
    for (RowsMember& one : p.members) {
        Member& params = one.params;
        params.n = length(), params.r = draw(1, draw(0, 4) ? 24 : 80);
        params.alpha_t = &kAlphas[draw(0, 2)];
        params.activation = static_cast<int>(draw(0, kActivationCount - 1));
        params.scaling = 1.5f;
        const Dtype factors = draw(0, 1) ? c.dtype : Dtype::f32;
        one.dy = operand(kRows, params.n, c.dtype, 1);
        one.base = operand(kRows, params.n, c.dtype, 1);
        one.a = operand(params.r, c.k, factors, 1 / std::sqrt(c.k), draw(0, 1));
        one.b = operand(params.n, params.r, factors, 1 / std::sqrt(params.r), draw(0, 1));
        params.a = one.a.matrix, params.b = one.b.matrix;
    }
    return p;
}

}  // namespace

int check_rows(uint64_t seed) {
    const RowsProblem p = random_problem(seed);
    const size_t members = p.members.size();
    const Results all = p.run(0, kRows, 0, members);
    int failures = 0;
    // Compares rows from `first` on of the members from `begin` on; dx where `with_dx`.
    const auto compare = [&](const Results& some, int64_t first, size_t begin, bool with_dx) {
        const int64_t dx = with_dx ? differences(some.dx, all.dx, first) : 0;
        int64_t y = 0, z = 0;
        for (size_t i = 0; i < some.out.size(); ++i) {
            y += differences(some.out[i], all.out[begin + i], first);
            z += differences(some.z[i], all.z[begin + i], first);
        }
        if (y + z + dx == 0)
            return;
        ++failures;
        std::printf("seed %llu: rows %lld to %lld of members %zu to %zu alone differ in %lld of y, "
                    "%lld of z, %lld of dx (K %lld, dtype %d)\n",
                    static_cast<unsigned long long>(seed), static_cast<long long>(first),
                    static_cast<long long>(first + some.dx.rows - 1), begin,
                    begin + some.out.size() - 1, static_cast<long long>(y),
                    static_cast<long long>(z), static_cast<long long>(dx),
                    static_cast<long long>(p.common.k), static_cast<int>(p.common.dtype));
    };
    for (const int64_t count : kCounts) {
        const int64_t first = draw(0, kRows - count);
        compare(p.run(first, count, 0, members), first, 0, true);
    }
    for (size_t i = 0; i < members; ++i)
        compare(p.run(0, kRows, i, i + 1), 0, i, members == 1);
    return failures;
}

}  // namespace afa::cpu::test
