// y = base + scaling * phi(dropout(x) A^T) B^T in one pass over x and one over y.
//
// With many rows a task is a block of rows: it goes from x to y, with z and h in the caches. With
// few rows there are not enough blocks for the threads, so the tasks are slabs of columns: first
// those of A, each for its part of the sum of z, then those of B, each for its columns of y. Either
// way a slab's part of z is summed by itself and the parts are added up in the order of the slabs,
// so that a row has the same bits whatever rows stand around it.
#pragma once

#include "cpu/isa/phi.h"
#include "cpu/isa/plan.h"

namespace afa::cpu::AFA_ISA {

template <class T, class E>
class Forward {
    using Elem = typename E::Elem;

  public:
    explicit Forward(const ForwardParams& params)
        : p(params), plan(params), rp(plan.rp), dropout(dropout_of(params)),
          inverse_keep(inverse_keep_of(params)), alpha_t(alpha_of(params)), scratch(plan.layout) {}

    void run() {
        if (p.out.data != p.base.data && p.out.col_stride == 1 && p.out.row_stride == p.n)
            advise_huge_pages(p.out.data, p.m * p.n * static_cast<int64_t>(sizeof(T)));
        run_team(plan.threads, 2, [&](Team team) {
            [[maybe_unused]] typename E::Scope scope;
            if (plan.few_rows)
                by_slabs(team);
            else
                by_rows(team);
            if (plan.streams)
                stream_fence();
        });
    }

  private:
    void by_rows(Team& team) {
        team.share(plan.k_slabs + plan.n_slabs, [&](int64_t i) {
            if (i < plan.k_slabs)
                pack_a(i, a_panel(i));
            else
                pack_b(i - plan.k_slabs, b_panel(i - plan.k_slabs));
        });
        team.barrier();
        float* z = rows_of(team);
        // Each thread gets the same number of blocks, and all of nearly the same size: otherwise
        // everyone would wait for the thread that has one more.
        const int64_t units = ceil_div(p.m, E::kExpandRows);
        const int64_t blocks = min_of(round_up(ceil_div(p.m, E::kBlockRows), plan.threads), units);
        team.share(blocks, [&](int64_t block) {
            const Range part = part_of_team(units, block, blocks);
            const int64_t row = part.begin * E::kExpandRows;
            const int64_t count = min_of(part.end * E::kExpandRows, p.m) - row;
            memset(z, 0, round_up(count, E::kRowStep) * rp * sizeof(float));
            for (int64_t slab = 0; slab < plan.k_slabs; ++slab)
                dot_slab(team, slab, row, count, a_panel(slab), z);
            const Coefficients<E> h = activate(team, row, count, z, true);
            for (int64_t slab = 0; slab < plan.n_slabs; ++slab)
                expand_slab(slab, row, count, h, b_panel(slab));
        });
    }

    void by_slabs(Team& team) {
        float* sums = scratch[plan.partial];
        team.split(plan.k_slabs, [&](int64_t slab) {
            float* z = sums + slab * plan.block_rows * rp;
            memset(z, 0, plan.block_rows * rp * sizeof(float));
            if (!dot_in_place(team, slab, z)) {
                pack_a(slab, a_panel(team.id()));
                dot_slab(team, slab, 0, p.m, a_panel(team.id()), z);
            }
        });
        team.barrier();
        float* z = rows_of(team);
        memcpy(z, sums, p.m * rp * sizeof(float));
        for (int64_t slab = 1; slab < plan.k_slabs; ++slab)
            for (int64_t i = 0; i < p.m * rp; ++i)
                z[i] += sums[slab * plan.block_rows * rp + i];
        const Coefficients<E> h = activate(team, 0, p.m, z, team.id() == 0);
        team.split(plan.n_slabs, [&](int64_t slab) {
            pack_b(slab, b_panel(team.id()));
            expand_slab(slab, 0, p.m, h, b_panel(team.id()));
        });
    }

    void pack_a(int64_t slab, Elem* out) {
        pack_slab<T, E>(p.a, false, slab * E::kSlab, slab_cols<E>(p.k, slab), p.r, rp, out,
                        nullptr);
    }
    void pack_b(int64_t slab, Elem* out) {
        pack_slab<T, E>(p.b, true, slab * E::kSlab, slab_cols<E>(p.n, slab), p.r, rp, nullptr, out);
    }

    void dot_slab(Team& team, int64_t slab, int64_t row, int64_t count, const Elem* packed,
                  float* z) {
        const int64_t cols = slab_cols<E>(p.k, slab);
        const Block<E> x =
            stage<E, T>(p.x, row, count, slab * E::kSlab, cols, dropout, stage_of(team));
        E::dot(x.data, x.ld, count, packed, rp, ceil_div(cols, E::kTile), z, rp);
    }

    // dot_slab for so few rows that each element of A is read once: packing A would cost more than
    // it saves, so A is read where it lies. Returns false where its layout does not allow that.
    bool dot_in_place([[maybe_unused]] Team& team, [[maybe_unused]] int64_t slab,
                      [[maybe_unused]] float* z) {
        if constexpr (E::kHasDotInPlace && sizeof(T) == sizeof(Elem)) {
            const int64_t cols = slab_cols<E>(p.k, slab);
            if (p.m > kRowGroup || p.a.dtype != p.dtype || p.a.col_stride != 1 || rp != p.r ||
                cols % E::kTile != 0)
                return false;
            const Block<E> x =
                stage<E, T>(p.x, 0, p.m, slab * E::kSlab, cols, dropout, stage_of(team));
            const T* a = element<T>(p.a, 0, slab * E::kSlab);
            E::dot_in_place(x.data, x.ld, p.m, reinterpret_cast<const Elem*>(a), p.a.row_stride, rp,
                            cols / E::kTile, z, rp);
            return true;
        }
        return false;
    }

    // Rounds z, stores it if wanted, and returns scaling * h. Rows of both have rp elements, zeros
    // beyond r.
    Coefficients<E> activate(Team& team, int64_t row, int64_t count, float* z, bool store_z) {
        for (int64_t i = 0; i < count * rp; ++i)
            z[i] = round_to<T>(dropout.threshold > 0 ? inverse_keep * z[i] : z[i]);
        if (store_z && p.z.data != nullptr)
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < p.r; ++j)
                    from_float(z[m * rp + j], element<T>(p.z, row + m, j));
        float* h = z + plan.block_rows * rp;
        phi(p.activation, z, count * rp, alpha_t, h, nullptr);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = 0; j < rp; ++j)
                h[m * rp + j] = j < p.r ? p.scaling * h[m * rp + j] : 0.0f;
        char* memory =
            scratch[plan.coefficients] + team.id() * E::coefficient_bytes(plan.block_rows, rp);
        return E::pack_coefficients(h, count, rp, memory);
    }

    void expand_slab(int64_t slab, int64_t row, int64_t count, const Coefficients<E>& h,
                     const Elem* packed) {
        const int64_t first = slab * E::kSlab, cols = slab_cols<E>(p.n, slab);
        const T* base = p.base.data == nullptr ? nullptr : element<T>(p.base, row, first);
        const Target<T> target{element<T>(p.out, row, first),
                               p.out.row_stride,
                               p.out.col_stride,
                               base,
                               p.base.row_stride,
                               p.base.col_stride,
                               plan.streams};
        E::expand(h, count, rp, p.r, packed, target, cols);
    }

    Elem* a_panel(int64_t i) { return scratch[plan.a_panels] + i * plan.a_slab; }
    Elem* b_panel(int64_t i) { return scratch[plan.b_panels] + i * plan.b_slab; }
    Elem* stage_of(const Team& team) {
        return scratch[plan.staged] + team.id() * E::kBlockRows * staged_ld<E>();
    }
    float* rows_of(const Team& team) {
        return scratch[plan.rows] + team.id() * 2 * plan.block_rows * rp;
    }

    const ForwardParams& p;
    const ForwardPlan<T, E> plan;
    const int64_t rp;
    const Dropout dropout;
    const float inverse_keep, alpha_t;
    const Scratch scratch;
};

}  // namespace afa::cpu::AFA_ISA
