// dX = dropout(dz A), dA = dz^T dropout(x), dB = scaling dY^T h in one pass over dY and one over x.
//
// Rows go in blocks of up to super_rows. For each: z and h by rows; dY by slabs of columns, where a
// slab is read once for its part of dY B and for its columns of dB; dz by rows, as the sum over the
// slabs in their order; x by slabs, where a slab gives its columns of dX and of dA. A slab of dA or
// dB belongs to one task at a time and grows in the order of the rows, so nothing is summed across
// threads.
#pragma once

#include "cpu/isa/operands.h"
#include "cpu/isa/phi.h"
#include "cpu/isa/team.h"

namespace afa::cpu::AFA_ISA {

// Fewer at a high rank: the partial sums of dz take super_rows * r floats for each slab of N, and
// with 96 rows they stay below half of the panels.
static inline int64_t super_rows_for(int64_t r4) { return (r4 <= 32 ? 4 : 2) * kBlockRows; }

template <class T, class E>
class Backward {
    using Elem = typename E::Elem;

  public:
    explicit Backward(const BackwardParams& params)
        : p(params), need_dz(p.dx.data != nullptr || p.da.data != nullptr),
          need_db(p.db.data != nullptr), r4(round_up(p.r, kGroup)),
          k_slabs(ceil_div(p.k, E::kSlab)), n_slabs(ceil_div(p.n, E::kSlab)), alpha_t(*p.alpha_t),
          super_rows(super_rows_for(r4)) {
        if (p.dropout > 0)
            dropout = {p.dropout, static_cast<uint64_t>(*p.seed), ceil_div(p.k, kDropoutColumns)};
        inverse_keep = kDropoutLevels / static_cast<float>(kDropoutLevels - p.dropout);
        threads = p.m * p.r * (p.k + p.n) < kWorthThreads ? 1 : p.threads;
        slab_elements = r4 * E::kSlab;
        row_elements = super_rows * r4;
        // Dropped elements are zeroed where they were written.
        streams = p.dropout == 0 && !p.accumulate_dx && p.dx.data != nullptr &&
                  can_stream<T>(p.dx, p.m, p.k);

        staged = scratch.reserve(threads * kBlockRows * staged_ld<E>() * sizeof(Elem));
        outer_tile = scratch.reserve(threads * kBlockRows * E::kTile * sizeof(Elem));
        tile = scratch.reserve(threads * r4 * E::kTile * sizeof(float));
        z = scratch.reserve(row_elements * sizeof(float));
        h = scratch.reserve(row_elements * sizeof(float));
        slope = scratch.reserve(need_dz ? row_elements * sizeof(float) : 0);
        dz = scratch.reserve(need_dz ? row_elements * sizeof(float) : 0);
        h_packed = scratch.reserve(super_blocks_bytes());
        dz_packed = scratch.reserve(super_blocks_bytes());
        b_panels = scratch.reserve(need_dz ? n_slabs * slab_elements * sizeof(Elem) : 0);
        const int64_t a_bytes = k_slabs * slab_elements * sizeof(Elem);
        need_a_expand = p.dx.data != nullptr;
        need_a_dot = p.z.data == nullptr || (E::kOnePanel && need_a_expand);
        a_dot = scratch.reserve(need_a_dot ? a_bytes : 0);
        a_expand = E::kOnePanel ? a_dot : scratch.reserve(need_a_expand ? a_bytes : 0);
        partial = scratch.reserve(need_dz ? n_slabs * row_elements * sizeof(float) : 0);
        db_sums = scratch.reserve(need_db ? n_slabs * slab_elements * sizeof(float) : 0);
        da_sums =
            scratch.reserve(p.da.data != nullptr ? k_slabs * slab_elements * sizeof(float) : 0);
        scratch.allocate();
    }

    void run() {
        if (p.dx.data != nullptr && !p.accumulate_dx)
            advise_huge_pages(p.dx.data, p.m * p.k * static_cast<int64_t>(sizeof(T)));
        const int64_t blocks = ceil_div(p.m, super_rows);
        run_team(threads, 1 + 4 * blocks, [&](Team team) {
            pack(team);
            if (p.z.data == nullptr)
                team.barrier();
            for (int64_t row = 0; row < p.m; row += super_rows) {
                const int64_t count = min_of(super_rows, p.m - row);
                by_rows(team, count,
                        [&](int64_t i, int64_t rows) { activate(team, row, i, rows); });
                team.barrier();
                team.share(n_slabs, [&](int64_t slab) { dy_slab(team, slab, row, count); });
                // The next rows of h overwrite what these products read.
                team.barrier();
                if (!need_dz)
                    continue;
                by_rows(team, count, [&](int64_t i, int64_t rows) { finish_dz(i, rows); });
                team.barrier();
                // No barrier behind: until the next block's dz the other phases touch nothing that
                // this one reads.
                team.share(k_slabs, [&](int64_t slab) { x_slab(team, slab, row, count); });
            }
            if (streams)
                stream_fence();
        });
    }

  private:
    template <class F>
    void by_rows(Team& team, int64_t count, F&& f) {
        team.share(ceil_div(count, kBlockRows), [&](int64_t i) {
            f(i * kBlockRows, min_of(kBlockRows, count - i * kBlockRows));
        });
    }

    void pack(Team& team) {
        float* memory = scratch.get<float>(tile) + team.id() * r4 * E::kTile;
        const int64_t a_count = need_a_dot || need_a_expand ? k_slabs : 0;
        team.share(a_count + (need_dz ? n_slabs : 0), [&](int64_t i) {
            if (i < a_count) {
                Elem* for_dot = need_a_dot ? panel(a_dot, i) : nullptr;
                Elem* for_expand = need_a_expand ? panel(a_expand, i) : nullptr;
                pack_slab<T, E>(p.a, false, i * E::kSlab, slab_cols(p.k, i), p.r, r4, memory,
                                for_dot, for_expand);
            } else {
                const int64_t slab = i - a_count;
                pack_slab<T, E>(p.b, true, slab * E::kSlab, slab_cols(p.n, slab), p.r, r4, memory,
                                panel(b_panels, slab), nullptr);
            }
        });
    }

    // z, h and the slope of rows [row + i, row + i + count).
    void activate(Team& team, int64_t row, int64_t i, int64_t count) {
        float* zs = scratch.get<float>(z) + i * r4;
        if (p.z.data != nullptr) {
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < r4; ++j)
                    zs[m * r4 + j] = j < p.r ? to_float(*element<T>(p.z, row + i + m, j)) : 0.0f;
        } else {
            memset(zs, 0, count * r4 * sizeof(float));
            for (int64_t slab = 0; slab < k_slabs; ++slab) {
                const int64_t cols = slab_cols(p.k, slab);
                const Block<E> x = stage<E, T>(p.x, row + i, count, slab * E::kSlab, cols, dropout,
                                               stage_of(team));
                dot<E>(x.data, x.ld, count, panel(a_dot, slab), r4, ceil_div(cols, E::kTile), zs,
                       r4);
            }
            for (int64_t e = 0; e < count * r4; ++e)
                zs[e] = round_to<T>(dropout.threshold > 0 ? inverse_keep * zs[e] : zs[e]);
        }
        float* hs = scratch.get<float>(h) + i * r4;
        phi(p.activation, zs, count * r4, alpha_t, hs,
            need_dz ? scratch.get<float>(slope) + i * r4 : nullptr);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = p.r; j < r4; ++j)
                hs[m * r4 + j] = 0.0f;
        if (need_db)
            E::pack_coefficients(hs, count, r4, packed(h_packed, i));
    }

    void dy_slab(Team& team, int64_t slab, int64_t row, int64_t count) {
        const int64_t cols = slab_cols(p.n, slab);
        float* sums = scratch.get<float>(db_sums) + slab * slab_elements;
        if (need_db && row == 0)
            memset(sums, 0, slab_elements * sizeof(float));
        float* dots = scratch.get<float>(partial) + slab * row_elements;
        if (need_dz)
            memset(dots, 0, count * r4 * sizeof(float));
        for (int64_t i = 0; i < count; i += kBlockRows) {
            const int64_t rows = min_of(kBlockRows, count - i);
            const Block<E> dy =
                stage<E, T>(p.dy, row + i, rows, slab * E::kSlab, cols, Dropout{}, stage_of(team));
            if (need_dz)
                dot<E>(dy.data, dy.ld, rows, panel(b_panels, slab), r4, ceil_div(cols, E::kTile),
                       dots + i * r4, r4);
            if (need_db)
                add_outer(team, coefficients(h, h_packed, i, rows), rows, dy, cols, sums);
        }
        if (need_db && row + count == p.m)
            write_db(team, slab, cols, sums);
    }

    void finish_dz(int64_t i, int64_t count) {
        const float* dots = scratch.get<float>(partial) + i * r4;
        const float* slopes = scratch.get<float>(slope) + i * r4;
        float* dz_rows = scratch.get<float>(dz) + i * r4;
        const float scale = dropout.threshold > 0 ? p.scaling * inverse_keep : p.scaling;
        for (int64_t e = 0; e < count * r4; ++e)
            dz_rows[e] = dots[e];
        for (int64_t slab = 1; slab < n_slabs; ++slab)
            for (int64_t e = 0; e < count * r4; ++e)
                dz_rows[e] += dots[slab * row_elements + e];
        for (int64_t e = 0; e < count * r4; ++e)
            dz_rows[e] *= scale * slopes[e];
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = p.r; j < r4; ++j)
                dz_rows[m * r4 + j] = 0.0f;
        E::pack_coefficients(dz_rows, count, r4, packed(dz_packed, i));
    }

    void x_slab(Team& team, int64_t slab, int64_t row, int64_t count) {
        const int64_t first = slab * E::kSlab, cols = slab_cols(p.k, slab);
        float* sums = scratch.get<float>(da_sums) + slab * slab_elements;
        const bool need_da = p.da.data != nullptr;
        if (need_da && row == 0)
            memset(sums, 0, slab_elements * sizeof(float));
        for (int64_t i = 0; i < count; i += kBlockRows) {
            const int64_t rows = min_of(kBlockRows, count - i);
            const Coefficients<E> dz_rows = coefficients(dz, dz_packed, i, rows);
            if (need_da) {
                const Block<E> x =
                    stage<E, T>(p.x, row + i, rows, first, cols, dropout, stage_of(team));
                add_outer(team, dz_rows, rows, x, cols, sums);
            }
            if (p.dx.data == nullptr)
                continue;
            T* dx = element<T>(p.dx, row + i, first);
            const T* dx_base = p.accumulate_dx ? dx : nullptr;
            const Target<T> target{dx,      p.dx.row_stride, p.dx.col_stride,
                                   dx_base, p.dx.row_stride, p.dx.col_stride,
                                   1.0f,    streams};
            for (int64_t c = 0; c < cols; c += E::kTile)
                expand<E>(dz_rows, 0, rows, r4, p.r, panel(a_expand, slab) + c * r4, target, 0, c,
                          static_cast<int>(min_of<int64_t>(E::kTile, cols - c)));
            if (dropout.threshold > 0)
                drop(dropout, row + i, rows, first, cols, dx, p.dx.row_stride);
        }
        if (need_da && row + count == p.m)
            write_da(slab, cols, sums);
    }

    void add_outer(Team& team, const Coefficients<E>& left, int64_t rows, const Block<E>& x,
                   int64_t cols, float* sums) {
        Elem* packed = scratch.get<Elem>(outer_tile) + team.id() * kBlockRows * E::kTile;
        for (int64_t c = 0; c < cols; c += E::kTile) {
            E::pack_outer(x.data + c, x.ld, rows, packed);
            E::outer(left, rows, r4, packed, r4, sums + c, E::kSlab);
        }
    }

    void write_da(int64_t slab, int64_t cols, const float* sums) {
        with_dtype(p.da.dtype, [&](auto* type) {
            using Dst = std::remove_pointer_t<decltype(type)>;
            for (int64_t j = 0; j < p.r; ++j)
                for (int64_t c = 0; c < cols; ++c)
                    from_float(sums[j * E::kSlab + c], element<Dst>(p.da, j, slab * E::kSlab + c));
        });
    }

    void write_db(Team& team, int64_t slab, int64_t cols, const float* sums) {
        float* rows = scratch.get<float>(tile) + team.id() * r4 * E::kTile;
        with_dtype(p.db.dtype, [&](auto* type) {
            using Dst = std::remove_pointer_t<decltype(type)>;
            for (int64_t c = 0; c < cols; c += E::kTile) {
                for (int64_t j = 0; j < r4; j += kGroup)
                    transpose4(sums + j * E::kSlab + c, E::kSlab, E::kTile, rows + j, r4);
                const int64_t count = min_of<int64_t>(E::kTile, cols - c);
                for (int64_t i = 0; i < count; ++i) {
                    Dst* out = element<Dst>(p.db, slab * E::kSlab + c + i, 0);
                    for (int64_t j = 0; j < p.r; ++j)
                        from_float(p.scaling * rows[i * r4 + j], out + j);
                }
            }
        });
    }

    int64_t super_blocks_bytes() const {
        return ceil_div(super_rows, kBlockRows) * E::coefficient_bytes(kBlockRows, r4);
    }
    char* packed(int64_t offset, int64_t i) {
        return scratch.get<char>(offset) + i / kBlockRows * E::coefficient_bytes(kBlockRows, r4);
    }
    Coefficients<E> coefficients(int64_t wide, int64_t offset, int64_t i, int64_t rows) {
        return E::view_coefficients(scratch.get<float>(wide) + i * r4, rows, r4, packed(offset, i));
    }
    static int64_t slab_cols(int64_t length, int64_t slab) {
        return min_of<int64_t>(E::kSlab, length - slab * E::kSlab);
    }
    Elem* panel(int64_t offset, int64_t i) { return scratch.get<Elem>(offset) + i * slab_elements; }
    Elem* stage_of(Team& team) {
        return scratch.get<Elem>(staged) + team.id() * kBlockRows * staged_ld<E>();
    }

    const BackwardParams& p;
    bool need_dz, need_db, need_a_dot, need_a_expand;
    int64_t r4, k_slabs, n_slabs;
    float alpha_t;
    int64_t super_rows;
    Dropout dropout;
    float inverse_keep;
    int threads;
    bool streams;
    int64_t slab_elements, row_elements;
    Scratch scratch;
    int64_t staged, outer_tile, tile, z, h, slope, dz, h_packed, dz_packed, b_panels, a_dot,
        a_expand, partial, db_sums, da_sums;
};

}  // namespace afa::cpu::AFA_ISA
