// y = base + scaling * phi(dropout(x) A^T) B^T in one pass over x and one over y.
//
// Many rows: a task is a block of rows, from x to y, with z and h in the caches. Few rows: tasks
// are slabs of columns, first of A (partial sums of z), then of B. Both add the partial sums of z
// in the order of the slabs of A: same bits.
#pragma once

#include "cpu/isa/operands.h"
#include "cpu/isa/phi.h"
#include "cpu/isa/team.h"

namespace afa::cpu::AFA_ISA {

template <class T, class E>
class Forward {
    using Elem = typename E::Elem;

  public:
    explicit Forward(const ForwardParams& params)
        : p(params), rp(round_up(p.r, E::kRankStep)), k_slabs(ceil_div(p.k, E::kSlab)),
          n_slabs(ceil_div(p.n, E::kSlab)), few_rows(p.m <= E::kBlockRows), alpha_t(*p.alpha_t) {
        if (p.dropout > 0)
            dropout = {p.dropout, static_cast<uint64_t>(*p.seed), ceil_div(p.k, kDropoutColumns)};
        inverse_keep = kDropoutLevels / static_cast<float>(kDropoutLevels - p.dropout);
        block_rows = min_of(round_up(p.m, E::kRowStep), E::kBlockRows);
        threads = p.m * p.r * (p.k + p.n) < kWorthThreads ? 1 : p.threads;
        a_slab = rp * E::kSlab;
        b_slab = E::expand_rank(rp) * E::kSlab;
        streams = p.out.data != p.base.data && can_stream<T>(p.out, p.m, p.n);

        staged = scratch.reserve(threads * E::kBlockRows * staged_ld<E>() * sizeof(Elem));
        rows = scratch.reserve(threads * 2 * block_rows * rp * sizeof(float));
        coefficients = scratch.reserve(threads * E::coefficient_bytes(block_rows, rp));
        a_panels = scratch.reserve((few_rows ? threads : k_slabs) * a_slab * sizeof(Elem));
        b_panels = scratch.reserve((few_rows ? threads : n_slabs) * b_slab * sizeof(Elem));
        partial = scratch.reserve(few_rows ? k_slabs * block_rows * rp * sizeof(float) : 0);
        scratch.allocate();
    }

    void run() {
        if (p.out.data != p.base.data && p.out.col_stride == 1 && p.out.row_stride == p.n)
            advise_huge_pages(p.out.data, p.m * p.n * static_cast<int64_t>(sizeof(T)));
        run_team(threads, 2, [&](Team team) {
            [[maybe_unused]] typename E::Scope scope;
            if (few_rows)
                by_slabs(team);
            else
                by_rows(team);
            if (streams)
                stream_fence();
        });
    }

  private:
    void by_rows(Team& team) {
        team.share(k_slabs + n_slabs, [&](int64_t i) {
            if (i < k_slabs)
                pack_a(i, a_panel(i));
            else
                pack_b(i - k_slabs, b_panel(i - k_slabs));
        });
        team.barrier();
        float* z = rows_of(team);
        // As many blocks for each thread, of nearly as many rows: the last one of a few would
        // otherwise keep everyone waiting.
        const int64_t units = ceil_div(p.m, E::kExpandRows);
        const int64_t blocks = min_of(round_up(ceil_div(p.m, E::kBlockRows), threads), units);
        team.share(blocks, [&](int64_t block) {
            const Range part = part_of_team(units, block, blocks);
            const int64_t row = part.begin * E::kExpandRows;
            const int64_t count = min_of(part.end * E::kExpandRows, p.m) - row;
            memset(z, 0, round_up(count, E::kRowStep) * rp * sizeof(float));
            for (int64_t slab = 0; slab < k_slabs; ++slab)
                dot_slab(team, slab, row, count, a_panel(slab), z);
            const Coefficients<E> h = activate(team, row, count, z, true);
            for (int64_t slab = 0; slab < n_slabs; ++slab)
                expand_slab(slab, row, count, h, b_panel(slab));
        });
    }

    void by_slabs(Team& team) {
        float* sums = scratch.get<float>(partial);
        team.split(k_slabs, [&](int64_t slab) {
            float* z = sums + slab * block_rows * rp;
            memset(z, 0, block_rows * rp * sizeof(float));
            if (!dot_in_place(team, slab, z)) {
                pack_a(slab, a_panel(team.id()));
                dot_slab(team, slab, 0, p.m, a_panel(team.id()), z);
            }
        });
        team.barrier();
        float* z = rows_of(team);
        memcpy(z, sums, p.m * rp * sizeof(float));
        for (int64_t slab = 1; slab < k_slabs; ++slab)
            for (int64_t i = 0; i < p.m * rp; ++i)
                z[i] += sums[slab * block_rows * rp + i];
        const Coefficients<E> h = activate(team, 0, p.m, z, team.id() == 0);
        team.split(n_slabs, [&](int64_t slab) {
            pack_b(slab, b_panel(team.id()));
            expand_slab(slab, 0, p.m, h, b_panel(team.id()));
        });
    }

    void pack_a(int64_t slab, Elem* out) {
        pack_slab<T, E>(p.a, false, slab * E::kSlab, slab_cols(p.k, slab), p.r, rp, out, nullptr);
    }
    void pack_b(int64_t slab, Elem* out) {
        pack_slab<T, E>(p.b, true, slab * E::kSlab, slab_cols(p.n, slab), p.r, rp, nullptr, out);
    }

    void dot_slab(Team& team, int64_t slab, int64_t row, int64_t count, const Elem* packed,
                  float* z) {
        const int64_t cols = slab_cols(p.k, slab);
        const Block<E> x =
            stage<E, T>(p.x, row, count, slab * E::kSlab, cols, dropout, stage_of(team));
        E::dot(x.data, x.ld, count, packed, rp, ceil_div(cols, E::kTile), z, rp);
    }

    // Like dot_slab for a few rows, with A where it lies: each element of A is read only once, so
    // that packing would cost more than it saves. False where a panel is needed.
    bool dot_in_place([[maybe_unused]] Team& team, [[maybe_unused]] int64_t slab,
                      [[maybe_unused]] float* z) {
        if constexpr (E::kHasDotInPlace && sizeof(T) == sizeof(Elem)) {
            const int64_t cols = slab_cols(p.k, slab);
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

    // Rounds z, stores it if wanted, and returns scaling * h; both are rows of rp with zeros beyond
    // r.
    Coefficients<E> activate(Team& team, int64_t row, int64_t count, float* z, bool store_z) {
        for (int64_t i = 0; i < count * rp; ++i)
            z[i] = round_to<T>(dropout.threshold > 0 ? inverse_keep * z[i] : z[i]);
        if (store_z && p.z.data != nullptr)
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < p.r; ++j)
                    from_float(z[m * rp + j], element<T>(p.z, row + m, j));
        float* h = z + block_rows * rp;
        phi(p.activation, z, count * rp, alpha_t, h, nullptr);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = 0; j < rp; ++j)
                h[m * rp + j] = j < p.r ? p.scaling * h[m * rp + j] : 0.0f;
        char* memory =
            scratch.get<char>(coefficients) + team.id() * E::coefficient_bytes(block_rows, rp);
        return E::pack_coefficients(h, count, rp, memory);
    }

    void expand_slab(int64_t slab, int64_t row, int64_t count, const Coefficients<E>& h,
                     const Elem* packed) {
        const int64_t first = slab * E::kSlab, cols = slab_cols(p.n, slab);
        const T* base = p.base.data == nullptr ? nullptr : element<T>(p.base, row, first);
        const Target<T> target{element<T>(p.out, row, first),
                               p.out.row_stride,
                               p.out.col_stride,
                               base,
                               p.base.row_stride,
                               p.base.col_stride,
                               streams};
        E::expand(h, count, rp, p.r, packed, target, cols);
    }

    static int64_t slab_cols(int64_t length, int64_t slab) {
        return min_of<int64_t>(E::kSlab, length - slab * E::kSlab);
    }
    Elem* a_panel(int64_t i) { return scratch.get<Elem>(a_panels) + i * a_slab; }
    Elem* b_panel(int64_t i) { return scratch.get<Elem>(b_panels) + i * b_slab; }
    Elem* stage_of(Team& team) {
        return scratch.get<Elem>(staged) + team.id() * E::kBlockRows * staged_ld<E>();
    }
    float* rows_of(Team& team) {
        return scratch.get<float>(rows) + team.id() * 2 * block_rows * rp;
    }

    const ForwardParams& p;
    int64_t rp, k_slabs, n_slabs;
    bool few_rows;
    float alpha_t;
    Dropout dropout;
    float inverse_keep;
    int64_t block_rows;
    int threads;
    int64_t a_slab, b_slab;
    bool streams;
    Scratch scratch;
    int64_t staged, rows, coefficients, a_panels, b_panels, partial;
};

}  // namespace afa::cpu::AFA_ISA
