// dX = dropout(dz A), dA = dz^T dropout(x), dB = scaling dY^T h in one pass over dY and one over x.
//
// Rows go through five phases together, plan.super_rows of them at a time:
//   1. by rows: z, h and the slope
//   2. by slabs of the columns of dY: the slab's part of dY B, and its columns of dB
//   3. by rows: dz from the parts of dY B, added up in the order of the slabs
//   4. by columns of x: its columns of dA
//   5. by rows: dX
// A column of dA or dB belongs to one thread and is summed in the order of the rows. So no result
// depends on the number of threads, and a row of dX not on the rows around it.
#pragma once

#include "cpu/isa/phi.h"
#include "cpu/isa/plan.h"

namespace afa::cpu::AFA_ISA {

template <class T, class E>
class Backward {
    using Elem = typename E::Elem;

  public:
    explicit Backward(const BackwardParams& params)
        : p(params), plan(params), rp(plan.rp), dropout(dropout_of(params)),
          inverse_keep(inverse_keep_of(params)), alpha_t(alpha_of(params)), scratch(plan.layout) {}

    void run() {
        if (plan.need_dx && !p.accumulate_dx)
            advise_huge_pages(p.dx.data, p.m * p.k * static_cast<int64_t>(sizeof(T)));
        const int64_t blocks = ceil_div(p.m, plan.super_rows);
        run_team(plan.threads, 1 + 2 * blocks, [&](Team team) {
            [[maybe_unused]] typename E::Scope scope;
            pack(team);
            if (plan.recompute_z)
                team.barrier();
            for (int64_t row = 0; row < p.m; row += plan.super_rows) {
                const int64_t count = min_of(plan.super_rows, p.m - row);
                by_rows(team, count,
                        [&](int64_t i, int64_t rows) { activate(team, row, i, rows); });
                team.barrier();
                by_columns(team, p.n, E::kSlab, count,
                           [&](const Part& part) { dy_slab(team, row, part); });
                // The next rows of h overwrite what these products read.
                team.barrier();
                if (!plan.need_dz)
                    continue;
                by_rows(team, count, [&](int64_t i, int64_t rows) { finish_dz(i, rows); });
                team.barrier();
                // No barrier follows: what the last two phases read is written in the third, and
                // the barriers of the next round's first two come before that.
                if (plan.need_da)
                    by_columns(team, p.k, E::kTile, count,
                               [&](const Part& part) { x_part(team, row, part); });
                if (plan.need_dx)
                    write_dx(team, row, count);
            }
            if (plan.streams)
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

    // Columns [col, col + cols), within one slab, of rows [i, i + rows). next_col and next_i are
    // where the part begins that the same thread takes next.
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
        const int64_t a_count = plan.need_a_dot || plan.need_dx ? plan.k_slabs : 0;
        team.share(a_count + (plan.need_dz ? plan.n_slabs : 0), [&](int64_t i) {
            if (i < a_count) {
                Elem* for_dot = plan.need_a_dot ? panel(plan.a_dot, i) : nullptr;
                Elem* for_expand = plan.need_dx ? a_expand_panel(i) : nullptr;
                pack_slab<T, E>(p.a, false, i * E::kSlab, slab_cols<E>(p.k, i), p.r, rp, for_dot,
                                for_expand);
            } else {
                const int64_t slab = i - a_count;
                pack_slab<T, E>(p.b, true, slab * E::kSlab, slab_cols<E>(p.n, slab), p.r, rp,
                                panel(plan.b_panels, slab), nullptr);
            }
        });
    }

    // z, h and the slope of rows [row + i, row + i + count).
    void activate(Team& team, int64_t row, int64_t i, int64_t count) {
        float* zs = scratch[plan.z] + i * rp;
        if (!plan.recompute_z) {
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < rp; ++j)
                    zs[m * rp + j] = j < p.r ? to_float(*element<T>(p.z, row + i + m, j)) : 0.0f;
        } else {
            memset(zs, 0, round_up(count, E::kRowStep) * rp * sizeof(float));
            for (int64_t slab = 0; slab < plan.k_slabs; ++slab) {
                const int64_t cols = slab_cols<E>(p.k, slab);
                const Block<E> x = stage<E, T>(p.x, row + i, count, slab * E::kSlab, cols, dropout,
                                               stage_of(team));
                E::dot(x.data, x.ld, count, panel(plan.a_dot, slab), rp, ceil_div(cols, E::kTile),
                       zs, rp);
            }
            for (int64_t e = 0; e < count * rp; ++e)
                zs[e] = round_to<T>(dropout.threshold > 0 ? inverse_keep * zs[e] : zs[e]);
        }
        float* hs = scratch[plan.h] + i * rp;
        phi(p.activation, zs, count * rp, alpha_t, hs,
            plan.need_dz ? scratch[plan.slope] + i * rp : nullptr);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = p.r; j < rp; ++j)
                hs[m * rp + j] = 0.0f;
        if (plan.need_db)
            E::pack_coefficients(hs, count, rp, packed(plan.h_packed, i));
    }

    // One slab of dY: its part of dY B and its columns of dB.
    void dy_slab(Team& team, int64_t row, const Part& part) {
        const int64_t slab = part.col / E::kSlab, cols = part.cols, i = part.i, rows = part.rows;
        const Block<E> dy =
            stage<E, T>(p.dy, row + i, rows, slab * E::kSlab, cols, Dropout{}, stage_of(team));
        if (plan.need_dz)
            add_dots(slab, i, rows, dy, cols);
        if (!plan.need_db)
            return;
        const Sums sums =
            tiles_of((plan.db_in_place ? static_cast<float*>(p.db.data) : scratch[plan.db_sums]) +
                     slab * plan.panel_elements);
        if (row + i == 0)
            clear(sums, cols);
        add_outer(team, coefficients(plan.h, plan.h_packed, i, rows), rows, dy, cols, sums,
                  nullptr);
        if (row + i + rows == p.m) {
            E::finish_sums(sums, rp, cols);
            write_db(team, slab, cols, sums.data);
        }
    }

    // A slab's part of dY B. The parts are added up in the order of the slabs, whoever computes
    // them: the first thread, whose slabs come first, adds its parts to one sum as it goes; every
    // further slab keeps its part, and finish_dz adds them.
    void add_dots(int64_t slab, int64_t i, int64_t rows, const Block<E>& dy, int64_t cols) {
        const int64_t elements = round_up(rows, E::kRowStep) * rp;
        float* sum = scratch[plan.dz_sums] + i * rp;
        if (slab >= plan.own_slabs)
            sum += (1 + slab - plan.own_slabs) * plan.super_elements;
        float* out = slab > 0 && slab < plan.own_slabs ? scratch[plan.dots] : sum;
        memset(out, 0, elements * sizeof(float));
        E::dot(dy.data, dy.ld, rows, panel(plan.b_panels, slab), rp, ceil_div(cols, E::kTile), out,
               rp);
        for (int64_t e = 0; e < elements && out != sum; ++e)
            sum[e] += out[e];
    }

    void finish_dz(int64_t i, int64_t count) {
        float* sum = scratch[plan.dz_sums] + i * rp;
        const float* slopes = scratch[plan.slope] + i * rp;
        float* dz_rows = scratch[plan.dz] + i * rp;
        const float scale = dropout.threshold > 0 ? p.scaling * inverse_keep : p.scaling;
        for (int64_t slab = plan.own_slabs; slab < plan.n_slabs; ++slab) {
            const float* other = sum + (1 + slab - plan.own_slabs) * plan.super_elements;
            for (int64_t e = 0; e < count * rp; ++e)
                sum[e] += other[e];
        }
        for (int64_t e = 0; e < count * rp; ++e)
            dz_rows[e] = sum[e] * (scale * slopes[e]);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = p.r; j < rp; ++j)
                dz_rows[m * rp + j] = 0.0f;
        E::pack_coefficients(dz_rows, count, rp, packed(plan.dz_packed, i));
    }

    // One part of x: its columns of dA.
    void x_part(Team& team, int64_t row, const Part& part) {
        const int64_t col = part.col, cols = part.cols, i = part.i, rows = part.rows;
        const Sums sums = plan.da_in_place
                              ? Sums{element<float>(p.da, 0, col), E::kTile, p.da.row_stride}
                              : tiles_of(scratch[plan.da_sums] + col * rp);
        if (row + i == 0)
            clear(sums, cols);
        const Block<E> x = stage<E, T>(p.x, row + i, rows, col, cols, dropout, stage_of(team));
        const Elem* after = nullptr;
        if constexpr (sizeof(T) == sizeof(Elem))
            if (x.data == reinterpret_cast<const Elem*>(element<T>(p.x, row + i, col)))
                after = reinterpret_cast<const Elem*>(
                    element<T>(p.x, row + part.next_i, part.next_col));
        add_outer(team, coefficients(plan.dz, plan.dz_packed, i, rows), rows, x, cols, sums, after);
        if (row + i + rows == p.m) {
            E::finish_sums(sums, rp, cols);
            if (!plan.da_in_place)
                write_da(col, cols, sums);
        }
    }

    // Rows [row, row + count) of dX. They are shared out by rows, not by columns as those of x are:
    // a core prefetches beyond the end of its part of a row, and would take away the lines that
    // another one is writing (up to 2.5 times as long was measured).
    void write_dx(const Team& team, int64_t row, int64_t count) {
        const Cell cell = team.grid(ceil_div(count, E::kExpandRows), plan.k_slabs);
        const int64_t last = min_of(cell.rows.end * E::kExpandRows, count);
        for (int64_t i = cell.rows.begin * E::kExpandRows; i < last;) {
            const int64_t block = round_down(i, E::kBlockRows);
            const int64_t end = min_of(block + E::kBlockRows, last);
            const Coefficients<E> dz_rows = from_row(
                coefficients(plan.dz, plan.dz_packed, block, min_of(E::kBlockRows, count - block)),
                i - block, rp);
            for (int64_t slab = cell.cols.begin; slab < cell.cols.end; ++slab)
                write_dx_slab(slab, row + i, end - i, dz_rows);
            i = end;
        }
    }
    void write_dx_slab(int64_t slab, int64_t row, int64_t rows, const Coefficients<E>& dz_rows) {
        const int64_t col = slab * E::kSlab, cols = slab_cols<E>(p.k, slab);
        T* dx = element<T>(p.dx, row, col);
        const Target<T> target{dx,
                               p.dx.row_stride,
                               p.dx.col_stride,
                               p.accumulate_dx ? dx : nullptr,
                               p.dx.row_stride,
                               p.dx.col_stride,
                               plan.streams};
        E::expand(dz_rows, rows, rp, p.r, a_expand_panel(slab), target, cols);
        if (dropout.threshold > 0)
            drop(dropout, row, rows, col, cols, dx, p.dx.row_stride);
    }

    void add_outer(Team& team, const Coefficients<E>& left, int64_t rows, const Block<E>& x,
                   int64_t cols, const Sums& sums, const Elem* after) {
        E::outer(left, rows, rp, x.data, x.ld, cols, sums,
                 scratch[plan.outer_tiles] + team.id() * 2 * E::kBlockRows * E::kTile, after);
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

    // Transposes the sums into dB, tile by tile through a copy, since they may lie where dB goes.
    void write_db(Team& team, int64_t slab, int64_t cols, const float* sums) {
        float* rows = scratch[plan.db_tile] + team.id() * rp * E::kTile;
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

    char* packed(Piece<char> of, int64_t i) {
        return scratch[of] + i / E::kBlockRows * E::coefficient_bytes(E::kBlockRows, rp);
    }
    Coefficients<E> coefficients(Piece<float> of, Piece<char> packed_of, int64_t i, int64_t rows) {
        return E::view_coefficients(scratch[of] + i * rp, rows, rp, packed(packed_of, i));
    }
    Elem* panel(Piece<Elem> of, int64_t i) { return scratch[of] + i * plan.panel_elements; }
    Elem* a_expand_panel(int64_t i) { return scratch[plan.a_expand] + i * plan.expand_elements; }
    Elem* stage_of(const Team& team) {
        return scratch[plan.staged] + team.id() * E::kBlockRows * staged_ld<E>();
    }

    const BackwardParams& p;
    const BackwardPlan<T, E> plan;
    const int64_t rp;
    const Dropout dropout;
    const float inverse_keep, alpha_t;
    const Scratch scratch;
};

}  // namespace afa::cpu::AFA_ISA
