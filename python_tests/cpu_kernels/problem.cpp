// Products are checked from the kernel's own z, whose error is checked by itself.
#include <cmath>
#include <cstdio>

#include "common/activation.h"
#include "common/philox.h"
#include "cpu_kernels/checks.h"
#include "cpu_kernels/operand.h"

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

// One member: its operands and results, and in double precision h, the slope and dz, with the sums
// of the sizes of their terms, (M, r) each.
struct OneMember {
    int64_t n, r;
    float alpha_t;
    Operand a, b, base, out, z, dy, da, db;
    bool need_da, need_db;
    std::vector<double> h, h_size, slope, dz, dz_size;
};

// A random call.
struct Problem {
    uint64_t seed;
    int64_t m, k, key;
    Dtype dtype;
    double eps;  // four roundings; the kernels round factors to the dtype of x as well
    bool with_base, need_dx;
    Operand x, dx;
    std::vector<OneMember> members;
    std::vector<ForwardMember> forward_members;
    std::vector<BackwardMember> backward_members;
    ForwardParams f;
    BackwardParams g;
    std::vector<double> keep;  // (M, K): 1 where dropout keeps x, over the probability of that

    explicit Problem(uint64_t problem_seed);
    void check_member(size_t index);
    void check_gradients(size_t index);
    void check_dx();
};

// The kernels compute the activations in their own way, to this error.
constexpr double kActivationError = 2e-7;

Problem::Problem(uint64_t problem_seed) : seed(problem_seed) {
    seed_draws(seed);
    const int64_t limits[] = {3, 20, 70, 600};
    const auto size = [&] { return draw(1, limits[draw(0, 3)]); };
    // Whole tiles take other ways than those that are not.
    const auto length = [&] { return draw(0, 2) ? size() : 64 * draw(1, 10); };
    m = size(), k = length();
    dtype = static_cast<Dtype>(draw(0, 2));
    eps = 4 * epsilon_of(dtype);
    const auto factor_dtype = [&] { return draw(0, 1) ? dtype : static_cast<Dtype>(draw(0, 3)); };
    key = static_cast<int64_t>(bits());
    x = operand(m, k, dtype, 1), dx = operand(m, k, dtype, 0, true);
    with_base = draw(0, 1), need_dx = draw(0, 1);

    members.resize(draw(0, 1) ? 1 : draw(2, 4));
    const bool alone = members.size() == 1;
    for (OneMember& one : members) {
        one.n = length();
        one.r = draw(1, draw(0, 9) ? 20 : alone ? 256 : 60);
        one.alpha_t = static_cast<float>(draw(0, 2)) / 2;
        one.a = operand(one.r, k, factor_dtype(), 1 / std::sqrt(k));
        one.b = operand(one.n, one.r, factor_dtype(), 1 / std::sqrt(one.r));
        one.base = operand(m, one.n, dtype, 1), one.dy = operand(m, one.n, dtype, 1);
        one.out = operand(m, one.n, dtype, 0), one.z = operand(m, one.r, dtype, 0, true);
        one.da = operand(one.r, k, one.a.matrix.dtype, 0, true);
        one.db = operand(one.n, one.r, one.b.matrix.dtype, 0, true);
        one.need_da = draw(0, 1), one.need_db = draw(0, 1);
        ForwardMember forward_one;
        forward_one.n = one.n, forward_one.r = one.r;
        forward_one.a = one.a.matrix, forward_one.b = one.b.matrix;
        forward_one.activation = static_cast<int>(draw(0, kActivationCount - 1));
        forward_one.scaling = 0.5f * static_cast<float>(draw(1, 4));
        BackwardMember backward_one;
        static_cast<Member&>(backward_one) = forward_one;
        forward_one.out = one.out.matrix, forward_one.z = one.z.matrix;
        if (with_base)
            forward_one.base = one.base.matrix;
        backward_one.dy = one.dy.matrix, backward_one.z = one.z.matrix;
        if (one.need_da)
            backward_one.da = one.da.matrix;
        if (one.need_db)
            backward_one.db = one.db.matrix;
        forward_members.push_back(forward_one);
        backward_members.push_back(backward_one);
    }
    for (size_t i = 0; i < members.size(); ++i)
        forward_members[i].alpha_t = backward_members[i].alpha_t = &members[i].alpha_t;

    f.m = m, f.k = k, f.dtype = dtype, f.x = x.matrix, f.seed = &key;
    f.dropout = draw(0, 2) || !alone ? 0 : static_cast<int>(draw(1, 200));
    f.threads = static_cast<int>(draw(1, 4));
    static_cast<CommonParams&>(g) = f;
    f.members = forward_members.data(), g.members = backward_members.data();
    f.count = g.count = static_cast<int64_t>(members.size());
    if (need_dx)
        g.dx = dx.matrix;

    const double inverse = 256.0 / (256 - f.dropout);
    const int64_t calls = (k + kDropoutColumns - 1) / kDropoutColumns;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < k; ++c) {
            const auto bytes =
                dropout_bytes(static_cast<uint64_t>(key), i, calls, c / kDropoutColumns);
            const int column = static_cast<int>(c % kDropoutColumns);
            keep.push_back(dropout_keeps(bytes, column, f.dropout) ? inverse : 0.0);
        }
}

// z and y of a member, and what its gradients follow from.
void Problem::check_member(size_t index) {
    OneMember& one = members[index];
    const ForwardMember& params = forward_members[index];
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < one.r; ++j) {
            double sum = 0, sizes = 0;
            for (int64_t c = 0; c < k; ++c) {
                const double term = keep[i * k + c] * x.get(i, c) * one.a.get(j, c);
                sum += term, sizes += std::fabs(term);
            }
            const double z = one.z.get(i, j);
            expect("z", seed, dtype, z, sum, eps * sizes);
            const ValueSlope value =
                anneal_by_id(params.activation, static_cast<float>(z), one.alpha_t);
            one.h.push_back(value.value), one.slope.push_back(value.slope);
            one.h_size.push_back(std::fabs(value.value) + kActivationError / eps * std::fabs(z));
            sum = sizes = 0;
            for (int64_t c = 0; c < one.n; ++c) {
                const double term = params.scaling * one.dy.get(i, c) * one.b.get(c, j);
                sum += term, sizes += std::fabs(term);
            }
            one.dz.push_back(sum * value.slope);
            one.dz_size.push_back(sizes * (std::fabs(value.slope) + kActivationError / eps));
        }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < one.n; ++c) {
            double sum = with_base ? one.base.get(i, c) : 0, sizes = std::fabs(sum);
            for (int64_t j = 0; j < one.r; ++j) {
                const double factor = params.scaling * one.b.get(c, j);
                sum += one.h[i * one.r + j] * factor;
                sizes += std::fabs(one.h_size[i * one.r + j] * factor);
            }
            expect("y", seed, dtype, one.out.get(i, c), sum, eps * sizes);
        }
}

void Problem::check_gradients(size_t index) {
    const OneMember& one = members[index];
    const double scaling = forward_members[index].scaling;
    const Dtype a_dtype = one.a.matrix.dtype, b_dtype = one.b.matrix.dtype;
    for (int64_t j = 0; j < one.r; ++j) {
        for (int64_t c = 0; c < k && one.need_da; ++c) {
            double sum = 0, sizes = 0;
            for (int64_t i = 0; i < m; ++i) {
                const double dropped = keep[i * k + c] * x.get(i, c);
                sum += one.dz[i * one.r + j] * dropped;
                sizes += std::fabs(one.dz_size[i * one.r + j] * dropped);
            }
            expect("dA", seed, a_dtype, one.da.get(j, c), sum,
                   std::fmax(eps, 4 * epsilon_of(a_dtype)) * sizes);
        }
        for (int64_t c = 0; c < one.n && one.need_db; ++c) {
            double sum = 0, sizes = 0;
            for (int64_t i = 0; i < m; ++i) {
                sum += scaling * one.dy.get(i, c) * one.h[i * one.r + j];
                sizes += std::fabs(scaling * one.dy.get(i, c) * one.h_size[i * one.r + j]);
            }
            expect("dB", seed, b_dtype, one.db.get(c, j), sum,
                   std::fmax(eps, 4 * epsilon_of(b_dtype)) * sizes);
        }
    }
}

void Problem::check_dx() {
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < k; ++c) {
            double sum = 0, sizes = 0;
            for (const OneMember& one : members)
                for (int64_t j = 0; j < one.r; ++j) {
                    const double factor = keep[i * k + c] * one.a.get(j, c);
                    sum += one.dz[i * one.r + j] * factor;
                    sizes += std::fabs(one.dz_size[i * one.r + j] * factor);
                }
            expect("dx", seed, dtype, dx.get(i, c), sum, eps * sizes);
        }
}

}  // namespace

int check_problem(uint64_t seed) {
    failures = 0;
    Problem problem(seed);
    forward(problem.f);
    backward(problem.g);
    for (size_t i = 0; i < problem.members.size(); ++i) {
        problem.check_member(i);
        problem.check_gradients(i);
    }
    if (problem.need_dx)
        problem.check_dx();
    return failures;
}

}  // namespace afa::cpu::test
