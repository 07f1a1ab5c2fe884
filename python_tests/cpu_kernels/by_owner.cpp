// Rows by owner against calls of each owner alone, bit for bit; problem.cpp checks those.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/activation.h"
#include "cpu/by_owner.h"
#include "cpu_kernels/checks.h"
#include "cpu_kernels/operand.h"

namespace afa::cpu::test {

namespace {

enum class Base { absent, given, out };

Operand zeros(int64_t rows, int64_t cols, Dtype dtype) {
    Operand made = operand(rows, cols, dtype, 0, true);
    std::fill(made.memory.begin(), made.memory.end(), 0);
    return made;
}

// The elements of `from`, into the first rows and columns of `to`.
void copy(const Operand& from, const Operand& to) {
    for (int64_t i = 0; i < from.rows; ++i)
        for (int64_t j = 0; j < from.cols; ++j)
            std::memcpy(to.at(i, j), from.at(i, j), size_of(from.matrix.dtype));
}

Matrix part_of(const Operand& all, int64_t first) {
    Matrix part = all.matrix;
    part.data = all.at(first, 0);
    return part;
}

// The matrices of a stack lie one below the other.
Stack stack_of(const Operand& all, int64_t rows) {
    return {all.matrix, rows * all.matrix.row_stride};
}

struct Results {
    Operand out, z, dx, da, db;
};

struct ByOwnerProblem {
    std::vector<int32_t> offsets, ranks;
    std::vector<float> alphas, scalings;
    int64_t key;
    Base base_is;
    Operand x, dy, base, start, a, b;  // dx is added to `start`
    Results got;
    ByOwnerForwardParams f;
    ByOwnerBackwardParams g;

    void draw_owners();
    explicit ByOwnerProblem(uint64_t seed);
    void run();
    Results alone(int64_t owner, int64_t first, int64_t count, int64_t rank) const;
};

// Many owners of few rows, which have a thread each, perhaps among them one of many, which has all.
void ByOwnerProblem::draw_owners() {
    f.owners = draw(1, 12), f.r = draw(1, draw(0, 4) ? 24 : 80);
    const bool ranks_differ = draw(0, 1), alphas_differ = draw(0, 1), with_scalings = draw(0, 1);
    const int64_t large = draw(0, 2 * f.owners);
    for (int64_t i = 0; i < f.owners; ++i) {
        f.m += i == large ? draw(100, 300) : draw(0, 2) ? draw(1, 50) : 0;
        offsets.push_back(static_cast<int32_t>(f.m));
        ranks.push_back(static_cast<int32_t>(draw(0, f.r)));
        alphas.push_back(static_cast<float>(draw(0, 10)) / 10);
        scalings.push_back(static_cast<float>(draw(1, 8)) / 4);
    }
    f.m += f.m == 0 || draw(0, 2) == 0 ? draw(1, 70) : 0;  // rows of no owner
    f.offsets = {offsets.data(), 1};
    f.alpha_t = {alphas.data(), alphas_differ};
    if (ranks_differ)
        f.ranks = {ranks.data(), 1};
    if (with_scalings)
        f.scalings = {scalings.data(), 1};
    f.scaling = 1.5f;
}

ByOwnerProblem::ByOwnerProblem(uint64_t seed) {
    seed_draws(seed);
    const auto length = [] { return draw(0, 1) ? draw(1, 700) : 64 * draw(1, 10); };
    draw_owners();
    f.k = length(), f.n = length();
    f.dtype = static_cast<Dtype>(draw(0, 2));
    f.activation = static_cast<int>(draw(0, kActivationCount - 1));
    f.threads = static_cast<int>(draw(1, 4));
    key = static_cast<int64_t>(bits());
    f.seed = &key, f.dropout = draw(0, 2) ? 0 : static_cast<int>(draw(1, 200));
    base_is = static_cast<Base>(draw(0, 2));
    g.accumulate_dx = f.dropout == 0 && draw(0, 1);

    const Dtype factors = draw(0, 1) ? f.dtype : static_cast<Dtype>(draw(0, 3));
    x = operand(f.m, f.k, f.dtype, 1), dy = operand(f.m, f.n, f.dtype, 1);
    base = operand(f.m, f.n, f.dtype, 1), start = operand(f.m, f.k, f.dtype, 1, true);
    a = operand(f.owners * f.r, f.k, factors, 1 / std::sqrt(f.k));
    b = operand(f.owners * f.n, f.r, factors, 1 / std::sqrt(f.r));
    got.out = operand(f.m, f.n, f.dtype, 0), got.z = operand(f.m, f.r, f.dtype, 0, true);
    got.dx = operand(f.m, f.k, f.dtype, 0, true);
    got.da = operand(f.owners * f.r, f.k, factors, 0, true);
    got.db = operand(f.owners * f.n, f.r, factors, 0, true);
    if (base_is == Base::out)
        copy(base, got.out);
    if (g.accumulate_dx)
        copy(start, got.dx);

    f.x = x.matrix, f.a = stack_of(a, f.r), f.b = stack_of(b, f.n);
    static_cast<ByOwnerParams&>(g) = f;
    if (base_is != Base::absent)
        f.base = base_is == Base::out ? got.out.matrix : base.matrix;
    f.out = got.out.matrix, f.z = got.z.matrix;
    g.dy = dy.matrix, g.z = f.z, g.dx = got.dx.matrix;
    g.da = stack_of(got.da, f.r), g.db = stack_of(got.db, f.n);
}

void ByOwnerProblem::run() {
    forward(f);
    backward(g);
}

// What the call has to give `count` rows and their owner, from calls of an A and B of the
// rank of the owner.
Results ByOwnerProblem::alone(int64_t owner, int64_t first, int64_t count, int64_t rank) const {
    Results whole{zeros(count, f.n, f.dtype), zeros(count, f.r, f.dtype),
                  zeros(count, f.k, f.dtype), zeros(f.r, f.k, f.a.first.dtype),
                  zeros(f.n, f.r, f.b.first.dtype)};
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < f.n && base_is != Base::absent; ++j)
            std::memcpy(whole.out.at(i, j), base.at(first + i, j), size_of(f.dtype));
        if (g.accumulate_dx)
            std::memcpy(whole.dx.at(i, 0), start.at(first + i, 0), f.k * size_of(f.dtype));
    }
    if (count == 0 || rank == 0)
        return whole;

    ForwardMember forward_one;
    forward_one.n = f.n, forward_one.r = rank;
    forward_one.a = f.a.at(owner), forward_one.b = f.b.at(owner);
    forward_one.alpha_t = f.alpha_t.at(owner);
    forward_one.activation = f.activation;
    forward_one.scaling = f.scalings.data ? *f.scalings.at(owner) : f.scaling;
    BackwardMember backward_one;
    static_cast<Member&>(backward_one) = forward_one;
    const Operand z = operand(count, rank, f.dtype, 0, true);
    const Operand da = operand(rank, f.k, f.a.first.dtype, 0, true);
    const Operand db = operand(f.n, rank, f.b.first.dtype, 0, true);
    if (base_is != Base::absent)
        forward_one.base = whole.out.matrix;
    forward_one.out = whole.out.matrix, forward_one.z = z.matrix;
    backward_one.dy = part_of(dy, first), backward_one.z = z.matrix;
    backward_one.da = da.matrix, backward_one.db = db.matrix;

    ForwardParams forward_alone;
    static_cast<CommonParams&>(forward_alone) = f;
    forward_alone.m = count, forward_alone.first_row = first;
    forward_alone.x = part_of(x, first);
    forward_alone.threads = static_cast<int>(draw(1, 4));
    forward_alone.members = &forward_one, forward_alone.count = 1;
    BackwardParams backward_alone;
    static_cast<CommonParams&>(backward_alone) = forward_alone;
    backward_alone.members = &backward_one, backward_alone.count = 1;
    backward_alone.dx = whole.dx.matrix, backward_alone.accumulate_dx = g.accumulate_dx;
    forward(forward_alone);
    backward(backward_alone);
    copy(z, whole.z), copy(da, whole.da), copy(db, whole.db);
    return whole;
}

}  // namespace

int check_by_owner(uint64_t seed) {
    ByOwnerProblem p(seed);
    p.run();
    int failures = 0;
    for (int64_t owner = 0, first = 0; owner <= p.f.owners; ++owner) {
        const bool is_owner = owner < p.f.owners;  // else the rows behind the last
        const int64_t end = is_owner ? p.offsets[owner] : p.f.m;
        const Results want = p.alone(owner, first, end - first, is_owner ? p.f.rank_of(owner) : 0);
        const auto expect = [&](const char* what, const Operand& wanted, const Operand& got,
                                int64_t from) {
            const int64_t found = differences(wanted, got, from);
            if (found == 0)
                return;
            ++failures;
            std::printf("seed %llu: %lld elements of %s differ in owner %lld of %lld\n",
                        static_cast<unsigned long long>(seed), static_cast<long long>(found), what,
                        static_cast<long long>(owner), static_cast<long long>(p.f.owners));
        };
        expect("y", want.out, p.got.out, first);
        expect("z", want.z, p.got.z, first);
        expect("dx", want.dx, p.got.dx, first);
        if (is_owner) {
            expect("dA", want.da, p.got.da, owner * p.f.r);
            expect("dB", want.db, p.got.db, owner * p.f.n);
        }
        first = end;
    }
    return failures;
}

}  // namespace afa::cpu::test
