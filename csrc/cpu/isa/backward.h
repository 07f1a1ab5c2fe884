// dX = dropout(dz A), dA = dz^T dropout(x), dB = scaling dY^T h in one pass over dY and one over x.
// With several members dX is the sum of theirs: their dz lie side by side, as their A do.
//
// Rows go through five phases together, plan.super_rows of them at a time:
//   1. by rows: z, h and the slope
//   2. by slabs of the columns of every dY: the slab's part of dY B, and its columns of dB
//   3. by rows: dz from the parts of dY B, added up in the order of the slabs
//   4. by columns of x: its columns of dA
//   5. by rows: dX
// z, h and sums are those of each member. A column of dA or dB belongs to one thread and is summed
// in the order of the rows. So no result depends on the number of threads, and a row of dX not on
// the rows around it.
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
          inverse_keep(inverse_keep_of(params)), scratch(plan.layout) {}

    void run() {
        if (plan.need_dx && !p.accumulate_dx)
            advise_huge_pages(p.dx.data, p.m * p.k * static_cast<int64_t>(sizeof(T)));
        const int64_t blocks = ceil_div(p.m, plan.super_rows);
        run_team(plan.threads, 1 + 2 * blocks, [&](Team team) {
            [[maybe_unused]] typename E::Scope scope;
            pack(team);
            for (int64_t row = 0; row < p.m; row += plan.super_rows) {
                const int64_t count = min_of(plan.super_rows, p.m - row);
                by_rows(team, count, [&](int64_t i, int64_t rows) { activate(row, i, rows); });
                team.barrier();
                dy_slabs(team, row, count);
                // The next rows of h overwrite what these products read.
                team.barrier();
                if (!plan.need_dz)
                    continue;
                by_rows(team, count, [&](int64_t i, int64_t rows) { finish_dz(i, rows); });
                team.barrier();
                // No barrier follows: what the last two phases read is written in the third, and
                // the barriers of the next round's first two come before that.
                if (plan.need_da)
                    by_columns(team.part(ceil_div(p.k, E::kTile)), E::kTile, p.k, count,
                               [&](const Part& part) { x_part(team, row, part); });
                if (plan.need_dx)
                    write_dx(team, row, count);
            }
            if (plan.streams)
                stream_fence();
        });
    }

  private:
    // A member with what was planned for it.
    struct View {
        const BackwardMember& of;
        const typename BackwardPlan<T, E>::Of& plan;
    };
    View member(int64_t i) const { return {p.members[i], plan.of[i]}; }

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

    // Takes a thread's run of columns, in multiples of `unit`, through all blocks of rows, so that
    // its columns of dA or dB stay in its caches.
    template <class F>
    void by_columns(const Range& run, int64_t unit, int64_t length, int64_t count, F&& f) {
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
        const int64_t a_count = plan.need_dx ? plan.k_slabs : 0;
        team.share(a_count + (plan.need_dz ? plan.n_slabs : 0), [&](int64_t i) {
            for (int64_t j = 0; j < p.count; ++j) {
                const View one = member(j);
                const int64_t slab = i - a_count - one.plan.first_slab;
                if (i < a_count)
                    pack_slab<T, E>(one.of.a, false, i * E::kSlab, slab_cols<E>(p.k, i), one.of.r,
                                    {one.plan.first_rank, one.plan.rp, rp}, nullptr,
                                    a_expand_panel(i));
                else if (slab >= 0 && slab < one.plan.n_slabs)
                    pack_slab<T, E>(one.of.b, true, slab * E::kSlab, slab_cols<E>(one.of.n, slab),
                                    one.of.r, all_rows(one.plan.rp), b_panel(one, slab), nullptr);
            }
        });
    }

    // z, h and the slope of rows [row + i, row + i + count), of every member.
    void activate(int64_t row, int64_t i, int64_t count) {
        for (int64_t j = 0; j < p.count; ++j)
            activate_member(member(j), row, i, count);
    }
    void activate_member(const View& one, int64_t row, int64_t i, int64_t count) {
        const int64_t own = one.plan.rp, r = one.of.r;
        float* zs = scratch[one.plan.z] + i * own;
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = 0; j < own; ++j)
                zs[m * own + j] = j < r ? to_float(*element<T>(one.of.z, row + i + m, j)) : 0.0f;
        float* hs = scratch[one.plan.h] + i * own;
        phi(one.of.activation, zs, count * own, alpha_of(one.of), hs,
            plan.need_dz ? scratch[one.plan.slope] + i * own : nullptr);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = r; j < own; ++j)
                hs[m * own + j] = 0.0f;
        if (one.plan.need_db)
            E::pack_coefficients(hs, count, own, packed_h(one, i));
    }

    // This thread's run of the slabs of all members.
    void dy_slabs(Team& team, int64_t row, int64_t count) {
        const Range run = team.part(plan.n_slabs);
        for (int64_t j = 0; j < p.count; ++j) {
            const View one = member(j);
            const int64_t begin = run.begin - one.plan.first_slab,
                          end = run.end - one.plan.first_slab;
            by_columns({max_of<int64_t>(begin, 0), min_of(end, one.plan.n_slabs)}, E::kSlab,
                       one.of.n, count, [&](const Part& part) { dy_slab(team, one, row, part); });
        }
    }

    // One slab of dY: its part of dY B and its columns of dB.
    void dy_slab(Team& team, const View& one, int64_t row, const Part& part) {
        const int64_t slab = part.col / E::kSlab, cols = part.cols, i = part.i, rows = part.rows;
        const Block<E> dy =
            stage<E, T>(one.of.dy, row + i, rows, slab * E::kSlab, cols, Dropout{}, stage_of(team));
        if (plan.need_dz)
            add_dots(one, slab, i, rows, dy, cols);
        if (!one.plan.need_db)
            return;
        float* data =
            one.plan.db_in_place ? static_cast<float*>(one.of.db.data) : scratch[one.plan.db_sums];
        const Sums sums = tiles_of(data + slab * one.plan.panel_elements, one.plan.rp);
        if (row + i == 0)
            clear(sums, one.plan.rp, cols);
        const Coefficients<E> h = E::view_coefficients(scratch[one.plan.h] + i * one.plan.rp, rows,
                                                       one.plan.rp, packed_h(one, i));
        add_outer<Elem>(team, h, one.plan.rp, rows, dy.data, dy.ld, cols, sums, nullptr);
        if (row + i + rows == p.m) {
            E::finish_sums(sums, one.plan.rp, cols);
            write_db(team, one, slab, cols, sums.data);
        }
    }

    // A slab's part of dY B. The parts are added up in the order of the slabs, whoever computes
    // them: the first thread, whose slabs come first, adds its parts to one sum as it goes; every
    // further slab keeps its part, and finish_dz adds them.
    void add_dots(const View& one, int64_t slab, int64_t i, int64_t rows, const Block<E>& dy,
                  int64_t cols) {
        const int64_t own = one.plan.rp, elements = round_up(rows, E::kRowStep) * own;
        float* sum = scratch[one.plan.dz_sums] + i * own;
        if (slab >= one.plan.own_slabs)
            sum += (1 + slab - one.plan.own_slabs) * one.plan.super_elements;
        float* out = slab > 0 && slab < one.plan.own_slabs ? scratch[plan.dots] : sum;
        memset(out, 0, elements * sizeof(float));
        E::dot(dy.data, dy.ld, rows, b_panel(one, slab), own, ceil_div(cols, E::kTile), out, own);
        for (int64_t e = 0; e < elements && out != sum; ++e)
            sum[e] += out[e];
    }

    // dz of rows [i, i + count), of every member.
    void finish_dz(int64_t i, int64_t count) {
        for (int64_t j = 0; j < p.count; ++j)
            finish_member(member(j), i, count);
        E::pack_coefficients(scratch[plan.dz] + i * rp, count, rp, packed_dz(i));
    }
    void finish_member(const View& one, int64_t i, int64_t count) {
        const int64_t own = one.plan.rp;
        float* sum = scratch[one.plan.dz_sums] + i * own;
        const float* slopes = scratch[one.plan.slope] + i * own;
        const float scale = dropout.threshold > 0 ? one.of.scaling * inverse_keep : one.of.scaling;
        for (int64_t slab = one.plan.own_slabs; slab < one.plan.n_slabs; ++slab) {
            const float* other = sum + (1 + slab - one.plan.own_slabs) * one.plan.super_elements;
            for (int64_t e = 0; e < count * own; ++e)
                sum[e] += other[e];
        }
        for (int64_t e = 0; e < count * own; ++e)
            sum[e] *= scale * slopes[e];
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = one.of.r; j < own; ++j)
                sum[m * own + j] = 0.0f;
        float* dz_rows = scratch[plan.dz] + i * rp + one.plan.first_rank;
        for_each_run(dz_rows, rp, sum, own, count, [](float* to, const float* from, int64_t n) {
            memcpy(to, from, n * sizeof(float));
        });
    }

    // One part of x: its columns of dA.
    void x_part(Team& team, int64_t row, const Part& part) {
        const int64_t col = part.col, cols = part.cols, i = part.i, rows = part.rows;
        const Matrix& da = p.members[0].da;
        const Sums sums = plan.da_in_place
                              ? Sums{element<float>(da, 0, col), E::kTile, da.row_stride}
                              : tiles_of(scratch[plan.da_sums] + col * rp, rp);
        if (row + i == 0)
            clear(sums, rp, cols);
        if (lies_ready<E>(p.x, rows, cols, dropout)) {
            add_outer(team, dz_of(i, rows), rp, rows, element<T>(p.x, row + i, col), p.x.row_stride,
                      cols, sums, element<T>(p.x, row + part.next_i, part.next_col));
        } else {
            const Block<E> x = stage<E, T>(p.x, row + i, rows, col, cols, dropout, stage_of(team));
            add_outer<Elem>(team, dz_of(i, rows), rp, rows, x.data, x.ld, cols, sums, nullptr);
        }
        if (row + i + rows == p.m) {
            E::finish_sums(sums, rp, cols);
            for (int64_t j = 0; j < p.count && !plan.da_in_place; ++j)
                write_da(member(j), col, cols, sums);
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
            const Coefficients<E> dz_rows =
                from_row(dz_of(block, min_of(E::kBlockRows, count - block)), i - block, rp);
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
        E::expand(dz_rows, rows, rp, plan.r, a_expand_panel(slab), target, cols);
        if (dropout.threshold > 0)
            drop(dropout, row, rows, col, cols, dx, p.dx.row_stride);
    }

    template <class Src>
    void add_outer(Team& team, const Coefficients<E>& left, int64_t ranks, int64_t rows,
                   const Src* x, int64_t ldx, int64_t cols, const Sums& sums, const Src* after) {
        E::outer(left, rows, ranks, x, ldx, cols, sums,
                 scratch[plan.outer_tiles] + team.id() * 2 * E::kBlockRows * E::kTile, after);
    }

    static Sums tiles_of(float* data, int64_t ranks) { return {data, ranks * E::kTile, E::kTile}; }
    static void clear(const Sums& sums, int64_t ranks, int64_t cols) {
        for_each_row<E>(sums, ranks, cols,
                        [](float* row) { memset(row, 0, E::kTile * sizeof(float)); });
    }

    void write_da(const View& one, int64_t col, int64_t cols, const Sums& sums) {
        if (one.of.da.data == nullptr)
            return;
        with_dtype(one.of.da.dtype, [&](auto* type) {
            using Dst = std::remove_pointer_t<decltype(type)>;
            for (int64_t c = 0; c < cols; c += E::kTile)
                for (int64_t j = 0; j < one.of.r; ++j) {
                    const float* row =
                        sums.data + c / E::kTile * sums.tile + (one.plan.first_rank + j) * sums.row;
                    Dst* out = element<Dst>(one.of.da, j, col + c);
                    for (int64_t i = 0; i < min_of<int64_t>(E::kTile, cols - c); ++i)
                        from_float(row[i], out + i);
                }
        });
    }

    // Transposes the sums into dB, tile by tile through a copy, since they may lie where dB goes.
    void write_db(Team& team, const View& one, int64_t slab, int64_t cols, const float* sums) {
        const int64_t own = one.plan.rp;
        float* rows = scratch[plan.db_tile] + team.id() * plan.most_rp * E::kTile;
        with_dtype(one.of.db.dtype, [&](auto* type) {
            using Dst = std::remove_pointer_t<decltype(type)>;
            for (int64_t c = 0; c < cols; c += E::kTile) {
                for (int64_t j = 0; j < own; j += kGroup)
                    transpose4(sums + c * own + j * E::kTile, E::kTile, E::kTile, rows + j, own);
                const int64_t count = min_of<int64_t>(E::kTile, cols - c);
                for (int64_t i = 0; i < count; ++i) {
                    Dst* out = element<Dst>(one.of.db, slab * E::kSlab + c + i, 0);
                    for (int64_t j = 0; j < one.of.r; ++j)
                        from_float(one.of.scaling * rows[i * own + j], out + j);
                }
            }
        });
    }

    char* packed_h(const View& one, int64_t i) {
        return scratch[one.plan.h_packed] +
               i / E::kBlockRows * E::coefficient_bytes(E::kBlockRows, one.plan.rp);
    }
    char* packed_dz(int64_t i) {
        return scratch[plan.dz_packed] +
               i / E::kBlockRows * E::coefficient_bytes(E::kBlockRows, rp);
    }
    Coefficients<E> dz_of(int64_t i, int64_t rows) {
        return E::view_coefficients(scratch[plan.dz] + i * rp, rows, rp, packed_dz(i));
    }
    Elem* a_expand_panel(int64_t i) { return scratch[plan.a_expand] + i * plan.expand_elements; }
    Elem* b_panel(const View& one, int64_t i) {
        return scratch[one.plan.b_panels] + i * one.plan.panel_elements;
    }
    Elem* stage_of(const Team& team) {
        return scratch[plan.staged] + team.id() * E::kBlockRows * staged_ld<E>();
    }

    const BackwardParams& p;
    const BackwardPlan<T, E> plan;
    const int64_t rp;
    const Dropout dropout;
    const float inverse_keep;
    const Scratch scratch;
};

}  // namespace afa::cpu::AFA_ISA
