// dX = dropout(dz A), dA = dz^T dropout(x), dB = scaling dY^T h in one pass over dY and one over x.
//
// Rows go in blocks of up to super_rows. For each: z and h by rows; dY by slabs of columns, where a
// slab is read once for its part of dY B and for its columns of dB; dz by rows, as the sum over the
// slabs in their order; x by slabs, where a slab gives its columns of dA; dX by rows. A slab of dA
// or dB belongs to one thread and grows in the order of the rows, so nothing is summed across
// threads.
#pragma once

#include "cpu/isa/operands.h"
#include "cpu/isa/phi.h"
#include "cpu/isa/team.h"

namespace afa::cpu::AFA_ISA {

// Fewer at a high rank: the partial sums of dz take super_rows * r floats for each slab of N, and
// are to stay well below the panels.
template <class E>
static inline int64_t super_rows_for(int64_t rp) {
    return (rp <= 32 ? 4 : rp <= 64 ? 2 : 1) * E::kBlockRows;
}

template <class T, class E>
class Backward {
    using Elem = typename E::Elem;

  public:
    explicit Backward(const BackwardParams& params)
        : p(params), need_dz(p.dx.data != nullptr || p.da.data != nullptr),
          need_db(p.db.data != nullptr), rp(round_up(p.r, E::kRankStep)),
          k_slabs(ceil_div(p.k, E::kSlab)), n_slabs(ceil_div(p.n, E::kSlab)), alpha_t(*p.alpha_t),
          super_rows(super_rows_for<E>(rp)) {
        if (p.dropout > 0)
            dropout = {p.dropout, static_cast<uint64_t>(*p.seed), ceil_div(p.k, kDropoutColumns)};
        inverse_keep = kDropoutLevels / static_cast<float>(kDropoutLevels - p.dropout);
        threads = p.m * p.r * (p.k + p.n) < kWorthThreads ? 1 : p.threads;
        slab_elements = rp * E::kSlab;
        row_elements = super_rows * rp;
        // Dropped elements are zeroed where they were written.
        streams = p.dropout == 0 && !p.accumulate_dx && p.dx.data != nullptr &&
                  can_stream<T>(p.dx, p.m, p.k);

        staged = scratch.reserve(threads * E::kBlockRows * staged_ld<E>() * sizeof(Elem));
        outer_tile = scratch.reserve(threads * 2 * E::kBlockRows * E::kTile * sizeof(Elem));
        tile = scratch.reserve(threads * rp * E::kTile * sizeof(float));
        h = scratch.reserve(row_elements * sizeof(float));
        slope = scratch.reserve(need_dz ? row_elements * sizeof(float) : 0);
        dz = scratch.reserve(need_dz ? row_elements * sizeof(float) : 0);
        h_packed = scratch.reserve(super_blocks_bytes());
        dz_packed = scratch.reserve(super_blocks_bytes());
        b_panels = scratch.reserve(need_dz ? n_slabs * slab_elements * sizeof(Elem) : 0);
        need_a_expand = p.dx.data != nullptr;
        need_a_dot = p.z.data == nullptr || (E::kOnePanel && need_a_expand);
        a_dot = scratch.reserve(need_a_dot ? k_slabs * slab_elements * sizeof(Elem) : 0);
        expand_elements = E::expand_rank(rp) * E::kSlab;
        a_expand =
            E::kOnePanel
                ? a_dot
                : scratch.reserve(need_a_expand ? k_slabs * expand_elements * sizeof(Elem) : 0);
        own_slabs = n_slabs > threads ? part_of_team(n_slabs, 0, threads).end : 1;
        const int64_t sums = need_dz ? 1 + n_slabs - own_slabs : 1;
        partial = scratch.reserve(sums * row_elements * sizeof(float));
        z = partial;  // z is done with when the sums begin
        dots = scratch.reserve(need_dz ? E::kBlockRows * rp * sizeof(float) : 0);
        // The sums of a tile and its rows of dB take the same memory, if both are of float32.
        db_in_place = p.db.dtype == Dtype::f32 && rp == p.r && p.n % E::kTile == 0;
        db_sums =
            scratch.reserve(need_db && !db_in_place ? n_slabs * slab_elements * sizeof(float) : 0);
        // Those of dA are its rows.
        da_in_place = p.da.dtype == Dtype::f32 && rp == p.r && p.k % E::kTile == 0;
        da_sums = scratch.reserve(
            p.da.data != nullptr && !da_in_place ? k_slabs * slab_elements * sizeof(float) : 0);
        scratch.allocate();
    }

    void run() {
        if (p.dx.data != nullptr && !p.accumulate_dx)
            advise_huge_pages(p.dx.data, p.m * p.k * static_cast<int64_t>(sizeof(T)));
        const int64_t blocks = ceil_div(p.m, super_rows);
        run_team(threads, 1 + 2 * blocks, [&](Team team) {
            [[maybe_unused]] typename E::Scope scope;
            pack(team);
            if (p.z.data == nullptr)
                team.barrier();
            for (int64_t row = 0; row < p.m; row += super_rows) {
                const int64_t count = min_of(super_rows, p.m - row);
                by_rows(team, count,
                        [&](int64_t i, int64_t rows) { activate(team, row, i, rows); });
                team.barrier();
                by_columns(team, p.n, E::kSlab, count,
                           [&](const Part& part) { dy_slab(team, row, part); });
                // The next rows of h overwrite what these products read.
                team.barrier();
                if (!need_dz)
                    continue;
                by_rows(team, count, [&](int64_t i, int64_t rows) { finish_dz(i, rows); });
                team.barrier();
                // No barrier behind: until the next block's dz the other phases touch nothing that
                // this one reads.
                if (p.da.data != nullptr)
                    by_columns(team, p.k, E::kTile, count,
                               [&](const Part& part) { x_part(team, row, part); });
                if (p.dx.data != nullptr)
                    write_dx(team, row, count);
            }
            if (streams)
                stream_fence();
        });
    }

  private:
    template <class F>
    void by_rows(Team& team, int64_t count, F&& f) {
        team.share(ceil_div(count, E::kBlockRows), [&](int64_t i) {
            f(i * E::kBlockRows, min_of(E::kBlockRows, count - i * E::kBlockRows));
        });
    }

    // Columns [col, col + cols), within one slab, of rows [i, i + rows) of a super block, and where
    // the part begins that the same thread takes next.
    struct Part {
        int64_t col, cols, i, rows, next_col, next_i;
    };

    // Each thread takes a run of columns, in multiples of `unit`, through all blocks of rows, so
    // that its columns of dA or dB stay in its caches.
    template <class F>
    void by_columns(Team& team, int64_t length, int64_t unit, int64_t count, F&& f) {
        const Range run = team.part(ceil_div(length, unit));
        for (int64_t i = 0; i < count; i += E::kBlockRows)
            for (int64_t col = run.begin * unit; col < min_of(run.end * unit, length);) {
                const int64_t end =
                    min_of(round_down(col, E::kSlab) + E::kSlab, min_of(run.end * unit, length));
                const bool last = end == min_of(run.end * unit, length);
                f(Part{col, end - col, i, min_of(E::kBlockRows, count - i),
                       last ? run.begin * unit : end, last ? i + E::kBlockRows : i});
                col = end;
            }
    }

    void pack(Team& team) {
        const int64_t a_count = need_a_dot || need_a_expand ? k_slabs : 0;
        team.share(a_count + (need_dz ? n_slabs : 0), [&](int64_t i) {
            if (i < a_count) {
                Elem* for_dot = need_a_dot ? panel(a_dot, i) : nullptr;
                Elem* for_expand = need_a_expand ? a_expand_panel(i) : nullptr;
                pack_slab<T, E>(p.a, false, i * E::kSlab, slab_cols(p.k, i), p.r, rp, for_dot,
                                for_expand);
            } else {
                const int64_t slab = i - a_count;
                pack_slab<T, E>(p.b, true, slab * E::kSlab, slab_cols(p.n, slab), p.r, rp,
                                panel(b_panels, slab), nullptr);
            }
        });
    }

    // z, h and the slope of rows [row + i, row + i + count).
    void activate(Team& team, int64_t row, int64_t i, int64_t count) {
        float* zs = scratch.get<float>(z) + i * rp;
        if (p.z.data != nullptr) {
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < rp; ++j)
                    zs[m * rp + j] = j < p.r ? to_float(*element<T>(p.z, row + i + m, j)) : 0.0f;
        } else {
            memset(zs, 0, round_up(count, E::kRowStep) * rp * sizeof(float));
            for (int64_t slab = 0; slab < k_slabs; ++slab) {
                const int64_t cols = slab_cols(p.k, slab);
                const Block<E> x = stage<E, T>(p.x, row + i, count, slab * E::kSlab, cols, dropout,
                                               stage_of(team));
                E::dot(x.data, x.ld, count, panel(a_dot, slab), rp, ceil_div(cols, E::kTile), zs,
                       rp);
            }
            for (int64_t e = 0; e < count * rp; ++e)
                zs[e] = round_to<T>(dropout.threshold > 0 ? inverse_keep * zs[e] : zs[e]);
        }
        float* hs = scratch.get<float>(h) + i * rp;
        phi(p.activation, zs, count * rp, alpha_t, hs,
            need_dz ? scratch.get<float>(slope) + i * rp : nullptr);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = p.r; j < rp; ++j)
                hs[m * rp + j] = 0.0f;
        if (need_db)
            E::pack_coefficients(hs, count, rp, packed(h_packed, i));
    }

    // One slab of dY: its part of dY B and its columns of dB.
    void dy_slab(Team& team, int64_t row, const Part& part) {
        const int64_t slab = part.col / E::kSlab, cols = part.cols, i = part.i, rows = part.rows;
        const Block<E> dy =
            stage<E, T>(p.dy, row + i, rows, slab * E::kSlab, cols, Dropout{}, stage_of(team));
        if (need_dz)
            add_dots(slab, i, rows, dy, cols);
        if (!need_db)
            return;
        const Sums sums =
            tiles_of((db_in_place ? static_cast<float*>(p.db.data) : scratch.get<float>(db_sums)) +
                     slab * slab_elements);
        if (row + i == 0)
            clear(sums, cols);
        add_outer(team, coefficients(h, h_packed, i, rows), rows, dy, cols, sums, nullptr);
        if (row + i + rows == p.m) {
            E::finish_sums(sums, rp, cols);
            write_db(team, slab, cols, sums.data);
        }
    }

    // The slabs are added up in their order whoever computes them. The first thread's run comes
    // first, so it needs only one sum; each further slab keeps its own.
    void add_dots(int64_t slab, int64_t i, int64_t rows, const Block<E>& dy, int64_t cols) {
        const int64_t elements = round_up(rows, E::kRowStep) * rp;
        float* sum = scratch.get<float>(partial) + i * rp;
        if (slab >= own_slabs)
            sum += (1 + slab - own_slabs) * row_elements;
        float* out = slab > 0 && slab < own_slabs ? scratch.get<float>(dots) : sum;
        memset(out, 0, elements * sizeof(float));
        E::dot(dy.data, dy.ld, rows, panel(b_panels, slab), rp, ceil_div(cols, E::kTile), out, rp);
        for (int64_t e = 0; e < elements && out != sum; ++e)
            sum[e] += out[e];
    }

    void finish_dz(int64_t i, int64_t count) {
        float* sum = scratch.get<float>(partial) + i * rp;
        const float* slopes = scratch.get<float>(slope) + i * rp;
        float* dz_rows = scratch.get<float>(dz) + i * rp;
        const float scale = dropout.threshold > 0 ? p.scaling * inverse_keep : p.scaling;
        for (int64_t slab = own_slabs; slab < n_slabs; ++slab) {
            const float* other = sum + (1 + slab - own_slabs) * row_elements;
            for (int64_t e = 0; e < count * rp; ++e)
                sum[e] += other[e];
        }
        for (int64_t e = 0; e < count * rp; ++e)
            dz_rows[e] = sum[e] * (scale * slopes[e]);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = p.r; j < rp; ++j)
                dz_rows[m * rp + j] = 0.0f;
        E::pack_coefficients(dz_rows, count, rp, packed(dz_packed, i));
    }

    // One part of x: its columns of dA.
    void x_part(Team& team, int64_t row, const Part& part) {
        const int64_t col = part.col, cols = part.cols, i = part.i, rows = part.rows;
        const Sums sums = da_in_place
                              ? Sums{element<float>(p.da, 0, col), E::kTile, p.da.row_stride}
                              : tiles_of(scratch.get<float>(da_sums) + col * rp);
        if (row + i == 0)
            clear(sums, cols);
        const Block<E> x = stage<E, T>(p.x, row + i, rows, col, cols, dropout, stage_of(team));
        const Elem* after = nullptr;
        if constexpr (sizeof(T) == sizeof(Elem))
            if (x.data == reinterpret_cast<const Elem*>(element<T>(p.x, row + i, col)))
                after = reinterpret_cast<const Elem*>(
                    element<T>(p.x, row + part.next_i, part.next_col));
        add_outer(team, coefficients(dz, dz_packed, i, rows), rows, x, cols, sums, after);
        if (row + i + rows == p.m) {
            E::finish_sums(sums, rp, cols);
            if (!da_in_place)
                write_da(col, cols, sums);
        }
    }

    // Rows [row, row + count) of dX, shared out by rows, not by columns as x is: a core prefetches
    // beyond the end of its part of a row, and would take away the lines that another one is
    // writing. Up to 2.5 times as long was measured.
    void write_dx(const Team& team, int64_t row, int64_t count) {
        const Cell cell = team.grid(ceil_div(count, E::kExpandRows), k_slabs);
        const int64_t last = min_of(cell.rows.end * E::kExpandRows, count);
        for (int64_t i = cell.rows.begin * E::kExpandRows; i < last;) {
            const int64_t block = round_down(i, E::kBlockRows);
            const int64_t end = min_of(block + E::kBlockRows, last);
            const Coefficients<E> dz_rows =
                from_row(coefficients(dz, dz_packed, block, min_of(E::kBlockRows, count - block)),
                         i - block, rp);
            for (int64_t slab = cell.cols.begin; slab < cell.cols.end; ++slab)
                write_dx_slab(slab, row + i, end - i, dz_rows);
            i = end;
        }
    }
    void write_dx_slab(int64_t slab, int64_t row, int64_t rows, const Coefficients<E>& dz_rows) {
        const int64_t col = slab * E::kSlab, cols = slab_cols(p.k, slab);
        T* dx = element<T>(p.dx, row, col);
        const Target<T> target{dx,
                               p.dx.row_stride,
                               p.dx.col_stride,
                               p.accumulate_dx ? dx : nullptr,
                               p.dx.row_stride,
                               p.dx.col_stride,
                               streams};
        E::expand(dz_rows, rows, rp, p.r, a_expand_panel(slab), target, cols);
        if (dropout.threshold > 0)
            drop(dropout, row, rows, col, cols, dx, p.dx.row_stride);
    }

    void add_outer(Team& team, const Coefficients<E>& left, int64_t rows, const Block<E>& x,
                   int64_t cols, const Sums& sums, const Elem* after) {
        E::outer(left, rows, rp, x.data, x.ld, cols, sums,
                 scratch.get<Elem>(outer_tile) + team.id() * 2 * E::kBlockRows * E::kTile, after);
    }

    Sums tiles_of(float* data) const { return {data, rp * E::kTile, E::kTile}; }
    void clear(const Sums& sums, int64_t cols) const {
        for_each_row<E>(sums, rp, cols,
                        [](float* row) { memset(row, 0, E::kTile * sizeof(float)); });
    }

    void write_da(int64_t col, int64_t cols, const Sums& sums) {
        with_dtype(p.da.dtype, [&](auto* type) {
            using Dst = std::remove_pointer_t<decltype(type)>;
            for (int64_t c = 0; c < cols; c += E::kTile)
                for (int64_t j = 0; j < p.r; ++j) {
                    const float* row = sums.data + c / E::kTile * sums.tile + j * sums.row;
                    Dst* out = element<Dst>(p.da, j, col + c);
                    for (int64_t i = 0; i < min_of<int64_t>(E::kTile, cols - c); ++i)
                        from_float(row[i], out + i);
                }
        });
    }

    // Tile by tile through a transposed copy, since the sums may lie where the rows go.
    void write_db(Team& team, int64_t slab, int64_t cols, const float* sums) {
        float* rows = scratch.get<float>(tile) + team.id() * rp * E::kTile;
        with_dtype(p.db.dtype, [&](auto* type) {
            using Dst = std::remove_pointer_t<decltype(type)>;
            for (int64_t c = 0; c < cols; c += E::kTile) {
                for (int64_t j = 0; j < rp; j += kGroup)
                    transpose4(sums + c * rp + j * E::kTile, E::kTile, E::kTile, rows + j, rp);
                const int64_t count = min_of<int64_t>(E::kTile, cols - c);
                for (int64_t i = 0; i < count; ++i) {
                    Dst* out = element<Dst>(p.db, slab * E::kSlab + c + i, 0);
                    for (int64_t j = 0; j < p.r; ++j)
                        from_float(p.scaling * rows[i * rp + j], out + j);
                }
            }
        });
    }

    int64_t super_blocks_bytes() const {
        return ceil_div(super_rows, E::kBlockRows) * E::coefficient_bytes(E::kBlockRows, rp);
    }
    char* packed(int64_t offset, int64_t i) {
        return scratch.get<char>(offset) +
               i / E::kBlockRows * E::coefficient_bytes(E::kBlockRows, rp);
    }
    Coefficients<E> coefficients(int64_t wide, int64_t offset, int64_t i, int64_t rows) {
        return E::view_coefficients(scratch.get<float>(wide) + i * rp, rows, rp, packed(offset, i));
    }
    static int64_t slab_cols(int64_t length, int64_t slab) {
        return min_of<int64_t>(E::kSlab, length - slab * E::kSlab);
    }
    Elem* a_expand_panel(int64_t i) { return scratch.get<Elem>(a_expand) + i * expand_elements; }
    Elem* panel(int64_t offset, int64_t i) { return scratch.get<Elem>(offset) + i * slab_elements; }
    Elem* stage_of(Team& team) {
        return scratch.get<Elem>(staged) + team.id() * E::kBlockRows * staged_ld<E>();
    }

    const BackwardParams& p;
    bool need_dz, need_db, need_a_dot, need_a_expand, db_in_place, da_in_place;
    int64_t rp, k_slabs, n_slabs;
    float alpha_t;
    int64_t super_rows;
    Dropout dropout;
    float inverse_keep;
    int threads;
    bool streams;
    int64_t slab_elements, expand_elements, row_elements, own_slabs;
    Scratch scratch;
    int64_t staged, outer_tile, tile, z, h, slope, dz, h_packed, dz_packed, b_panels, a_dot,
        a_expand, partial, dots, db_sums, da_sums;
};

}  // namespace afa::cpu::AFA_ISA
