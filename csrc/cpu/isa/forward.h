// y = base + scaling * phi(dropout(x) A^T) B^T of each member, in one pass over x and one over
// every y.
//
// With many rows a task is a block of rows: it goes from x to y, with z and h in the caches. With
// few rows there are not enough blocks for the threads, so the tasks are slabs of columns: first
// those of K, each for its part of the sums of z, then those of N, each for its columns of a y.
// Either way a slab's part of z is summed by itself and the parts are added up in the order of the
// slabs, so that a row has the same bits whatever rows and members stand around it.
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
          inverse_keep(inverse_keep_of(params)), scratch(plan.layout) {}

    void run() {
        for (int64_t i = 0; i < p.count; ++i) {
            const ForwardMember& of = p.members[i];
            if (of.out.data != of.base.data && of.out.col_stride == 1 && of.out.row_stride == of.n)
                advise_huge_pages(of.out.data, p.m * of.n * static_cast<int64_t>(sizeof(T)));
        }
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
    // A member with what was planned for it.
    struct View {
        const ForwardMember& of;
        const typename ForwardPlan<T, E>::Of& plan;
    };
    View member(int64_t i) const { return {p.members[i], plan.of[i]}; }

    // Calls f(member, slab) for slab i of those of all members.
    template <class F>
    void with_n_slab(int64_t i, F&& f) {
        int64_t owner = 0;
        while (i >= plan.of[owner].first_slab + plan.of[owner].n_slabs)
            ++owner;
        f(member(owner), i - plan.of[owner].first_slab);
    }

    void by_rows(Team& team) {
        team.share(plan.k_slabs + plan.n_slabs, [&](int64_t i) {
            if (i >= plan.k_slabs)
                return with_n_slab(i - plan.k_slabs, [&](const View& one, int64_t slab) {
                    pack_b(one, slab, b_panel(one, slab));
                });
            for (int64_t j = 0; j < p.count; ++j)
                pack_a(member(j), i, {plan.of[j].first_rank, plan.of[j].rp, rp}, a_panel(i));
        });
        team.barrier();
        float* sums = projected_of(team);
        // Each thread gets the same number of blocks, and all of nearly the same size: otherwise
        // everyone would wait for the thread that has one more.
        const int64_t units = ceil_div(p.m, E::kExpandRows);
        const int64_t blocks = min_of(round_up(ceil_div(p.m, E::kBlockRows), plan.threads), units);
        team.share(blocks, [&](int64_t block) {
            const Range part = part_of_team(units, block, blocks);
            const int64_t row = part.begin * E::kExpandRows;
            const int64_t count = min_of(part.end * E::kExpandRows, p.m) - row;
            memset(sums, 0, round_up(count, E::kRowStep) * rp * sizeof(float));
            for (int64_t slab = 0; slab < plan.k_slabs; ++slab) {
                const Block<E> x = stage_slab(team, slab, row, count);
                E::dot(x.data, x.ld, count, a_panel(slab), rp, tiles_of(slab), sums, rp);
            }
            for (int64_t j = 0; j < p.count; ++j) {
                const View one = member(j);
                const Coefficients<E> h =
                    activate(team, one, sums + one.plan.first_rank, rp, row, count, true);
                for (int64_t slab = 0; slab < one.plan.n_slabs; ++slab)
                    expand_slab(one, slab, row, count, h, b_panel(one, slab));
            }
        });
    }

    void by_slabs(Team& team) {
        team.split(plan.k_slabs, [&](int64_t slab) {
            float* part = part_of_slab(slab);
            memset(part, 0, plan.block_rows * rp * sizeof(float));
            const Block<E> x = stage_slab(team, slab, 0, p.m);
            for (int64_t j = 0; j < p.count; ++j) {
                const View one = member(j);
                float* z = part + one.plan.first_rank;
                if (dot_in_place(one, slab, x, z))
                    continue;
                pack_a(one, slab, all_rows(one.plan.rp), a_panel(team.id()));
                E::dot(x.data, x.ld, p.m, a_panel(team.id()), one.plan.rp, tiles_of(slab), z, rp);
            }
        });
        team.barrier();
        const ForwardMember* current = nullptr;
        Coefficients<E> h{};
        team.split(plan.n_slabs, [&](int64_t i) {
            with_n_slab(i, [&](const View& one, int64_t slab) {
                if (&one.of != current) {
                    add_parts(team, one);
                    h = activate(team, one, projected_of(team), one.plan.rp, 0, p.m, slab == 0);
                    current = &one.of;
                }
                pack_b(one, slab, b_panel(one, team.id()));
                expand_slab(one, slab, 0, p.m, h, b_panel(one, team.id()));
            });
        });
    }

    void pack_a(const View& one, int64_t slab, PanelRows rows, Elem* out) {
        pack_slab<T, E>(one.of.a, false, slab * E::kSlab, slab_cols<E>(p.k, slab), one.of.r, rows,
                        out, nullptr);
    }
    void pack_b(const View& one, int64_t slab, Elem* out) {
        pack_slab<T, E>(one.of.b, true, slab * E::kSlab, slab_cols<E>(one.of.n, slab), one.of.r,
                        all_rows(one.plan.rp), nullptr, out);
    }

    Block<E> stage_slab(Team& team, int64_t slab, int64_t row, int64_t count) {
        Elem* memory = scratch[plan.staged] + team.id() * E::kBlockRows * staged_ld<E>();
        return stage<E, T>(p.x, row, count, slab * E::kSlab, slab_cols<E>(p.k, slab), dropout,
                           memory);
    }
    int64_t tiles_of(int64_t slab) const { return ceil_div(slab_cols<E>(p.k, slab), E::kTile); }

    // The product with A for so few rows that each element of A is read once: packing A would cost
    // more than it saves, so A is read where it lies. Returns false where its layout does not allow
    // that.
    bool dot_in_place([[maybe_unused]] const View& one, [[maybe_unused]] int64_t slab,
                      [[maybe_unused]] const Block<E>& x, [[maybe_unused]] float* z) {
        if constexpr (E::kHasDotInPlace && sizeof(T) == sizeof(Elem)) {
            const Matrix& a = one.of.a;
            if (p.m > kRowGroup || a.dtype != p.dtype || a.col_stride != 1 ||
                one.plan.rp != one.of.r || slab_cols<E>(p.k, slab) % E::kTile != 0)
                return false;
            const T* rows = element<T>(a, 0, slab * E::kSlab);
            E::dot_in_place(x.data, x.ld, p.m, reinterpret_cast<const Elem*>(rows), a.row_stride,
                            one.plan.rp, tiles_of(slab), z, rp);
            return true;
        }
        return false;
    }

    // x A^T of a member, from the parts of the slabs.
    void add_parts(const Team& team, const View& one) {
        float* sums = projected_of(team);
        const auto add = [&](int64_t slab, auto&& f) {
            for_each_run(part_of_slab(slab) + one.plan.first_rank, rp, sums, one.plan.rp, p.m, f);
        };
        add(0, [](const float* part, float* sum, int64_t count) {
            memcpy(sum, part, count * sizeof(float));
        });
        for (int64_t slab = 1; slab < plan.k_slabs; ++slab)
            add(slab, [](const float* part, float* sum, int64_t count) {
                for (int64_t e = 0; e < count; ++e)
                    sum[e] += part[e];
            });
    }

    // Rounds z of a member, from sums whose rows are ld apart, stores it if wanted, and returns
    // scaling * h. Rows of both have rp elements, zeros beyond r.
    Coefficients<E> activate(Team& team, const View& one, const float* sums, int64_t ld,
                             int64_t row, int64_t count, bool store_z) {
        const int64_t own = one.plan.rp, r = one.of.r;
        float* z = scratch[plan.rows] + team.id() * 2 * plan.block_rows * plan.most_rp;
        round_z<T>(sums, ld, count, own, inverse_keep, z);
        if (store_z && one.of.z.data != nullptr)
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < r; ++j)
                    from_float(z[m * own + j], element<T>(one.of.z, row + m, j));
        float* h = z + plan.block_rows * plan.most_rp;
        phi(one.of.activation, z, count * own, alpha_of(one.of), h, nullptr);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = 0; j < own; ++j)
                h[m * own + j] = j < r ? one.of.scaling * h[m * own + j] : 0.0f;
        char* memory = scratch[plan.coefficients] +
                       team.id() * E::coefficient_bytes(plan.block_rows, plan.most_rp);
        return E::pack_coefficients(h, count, own, memory);
    }

    void expand_slab(const View& one, int64_t slab, int64_t row, int64_t count,
                     const Coefficients<E>& h, const Elem* packed) {
        const Matrix &base = one.of.base, &out = one.of.out;
        const int64_t first = slab * E::kSlab;
        const Target<T> target{element<T>(out, row, first),
                               out.row_stride,
                               out.col_stride,
                               base.data == nullptr ? nullptr : element<T>(base, row, first),
                               base.row_stride,
                               base.col_stride,
                               one.plan.streams};
        E::expand(h, count, one.plan.rp, one.of.r, packed, target, slab_cols<E>(one.of.n, slab));
    }

    Elem* a_panel(int64_t i) { return scratch[plan.a_panels] + i * plan.a_slab; }
    Elem* b_panel(const View& one, int64_t i) {
        return scratch[one.plan.b_panels] + i * one.plan.b_slab;
    }
    float* projected_of(const Team& team) {
        return scratch[plan.projected] + team.id() * plan.block_rows * rp;
    }
    float* part_of_slab(int64_t slab) {
        return scratch[plan.partial] + slab * plan.block_rows * rp;
    }

    const ForwardParams& p;
    const ForwardPlan<T, E> plan;
    const int64_t rp;
    const Dropout dropout;
    const float inverse_keep;
    const Scratch scratch;
};

}  // namespace afa::cpu::AFA_ISA
