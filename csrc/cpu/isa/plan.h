// What follows from the sizes and types of a call before it runs: how it is cut into blocks and
// slabs, on how many threads it runs, and where its scratch lies.
//
// Rows come in blocks of E::kBlockRows, columns in slabs of E::kSlab, r is padded to rp. What is
// multiplied by x or makes dX, A and dz, is there once for all members: their ranks lie side by
// side, each padded. The rest is there for each member.
#pragma once

#include <vector>

#include "cpu/isa/operands.h"
#include "cpu/isa/scratch.h"
#include "cpu/isa/team.h"

namespace afa::cpu::AFA_ISA {

template <class E>
static inline int64_t slab_cols(int64_t length, int64_t slab) {
    return min_of<int64_t>(E::kSlab, length - slab * E::kSlab);
}

static inline Dropout dropout_of(const CommonParams& p) {
    if (p.dropout == 0)
        return {};
    return {p.dropout, static_cast<uint64_t>(*p.seed), ceil_div(p.k, kDropoutColumns), p.first_row};
}
static inline float alpha_of(const Member& member) {
    return member.alpha_t == nullptr ? 0.0f : *member.alpha_t;
}
static inline float inverse_keep_of(const CommonParams& p) {
    return kDropoutLevels / static_cast<float>(kDropoutLevels - p.dropout);
}

// What counts is the largest member: so several members never run on threads that none of them
// would take alone, and are not slower together for the sake of a barrier.
template <class Params>
static inline int threads_for(const Params& p) {
    int64_t most = 0;
    for (int64_t i = 0; i < p.count; ++i)
        most = max_of(most, p.m * p.members[i].r * (p.k + p.members[i].n));
    return most < kWorthThreads ? 1 : p.threads;
}

// Where a member lies among the others: the padded ranks of one behind those of the other, and the
// slabs of N likewise.
struct Place {
    int64_t first_rank, rp;
    int64_t first_slab, n_slabs;
};

// Of all members together.
struct Totals {
    int64_t rp = 0, n_slabs = 0;
    int64_t r = 0;        // rp without the padding of the last member
    int64_t most_rp = 0;  // of one member
};

// Gives each member its place, the base of an Of.
template <class E, class Params, class Of>
static Totals place_members(const Params& p, std::vector<Of>& of) {
    Totals all;
    of.resize(p.count);
    for (int64_t i = 0; i < p.count; ++i) {
        const int64_t n_slabs = ceil_div(p.members[i].n, E::kSlab);
        const int64_t rp = round_up(p.members[i].r, E::kRankStep);
        static_cast<Place&>(of[i]) = {all.rp, rp, all.n_slabs, n_slabs};
        all.r = all.rp + p.members[i].r;
        all.rp += rp;
        all.n_slabs += n_slabs;
        all.most_rp = max_of(all.most_rp, rp);
    }
    return all;
}

// Calls f(sums, values, count) for neighbouring elements of a member: `sums` lies among those of
// all members, in rows of ld, `values` are its own, in rows of rp. A lone member is one run.
template <class Sum, class Value, class F>
static inline void for_each_run(Sum* sums, int64_t ld, Value* values, int64_t rp, int64_t rows,
                                F&& f) {
    if (ld == rp)
        return f(sums, values, rows * rp);
    for (int64_t m = 0; m < rows; ++m)
        f(sums + m * ld, values + m * rp, rp);
}

// z of a member from its part of x A^T, whose rows are ld apart. Without dropout inverse_keep is 1.
template <class T>
static inline void round_z(const float* sums, int64_t ld, int64_t rows, int64_t rp,
                           float inverse_keep, float* z) {
    for_each_run(sums, ld, z, rp, rows, [&](const float* from, float* to, int64_t count) {
        for (int64_t e = 0; e < count; ++e)
            to[e] = round_to<T>(inverse_keep * from[e]);
    });
}

template <class T, class E>
struct ForwardPlan {
    using Elem = typename E::Elem;

    // Of one member.
    struct Of : Place {
        int64_t b_slab;        // elements of a panel
        bool streams;          // y bypasses the cache
        Piece<Elem> b_panels;  // of each slab of N; with few rows of each thread
    };

    explicit ForwardPlan(const ForwardParams& p)
        : threads(threads_for(p)), k_slabs(ceil_div(p.k, E::kSlab)), few_rows(p.m <= E::kBlockRows),
          block_rows(min_of(round_up(p.m, E::kRowStep), E::kBlockRows)) {
        const Totals all = place_members<E>(p, of);
        rp = all.rp, n_slabs = all.n_slabs, most_rp = all.most_rp;
        a_slab = (few_rows ? most_rp : rp) * E::kSlab;
        staged = layout.reserve<Elem>(threads * E::kBlockRows * staged_ld<E>());
        projected = layout.reserve<float>(threads * block_rows * rp);
        rows = layout.reserve<float>(threads * 2 * block_rows * most_rp);
        coefficients = layout.reserve<char>(threads * E::coefficient_bytes(block_rows, most_rp));
        a_panels = layout.reserve<Elem>((few_rows ? threads : k_slabs) * a_slab);
        partial = layout.reserve<float>(few_rows ? k_slabs * block_rows * rp : 0);
        for (int64_t i = 0; i < p.count; ++i) {
            const ForwardMember& member = p.members[i];
            of[i].b_slab = E::expand_rank(of[i].rp) * E::kSlab;
            of[i].b_panels =
                layout.reserve<Elem>((few_rows ? threads : of[i].n_slabs) * of[i].b_slab);
            of[i].streams =
                member.out.data != member.base.data && can_stream<T>(member.out, p.m, member.n);
            streams |= of[i].streams;
        }
    }

    int threads;
    int64_t k_slabs;
    bool few_rows;                 // tasks are slabs of columns, not blocks of rows
    int64_t block_rows;            // of scratch: M or a block
    int64_t rp, n_slabs, most_rp;  // see Totals
    int64_t a_slab;                // elements of a panel of A: of all members, with few rows of one
    bool streams = false;          // some y does
    std::vector<Of> of;            // of each member

    Layout layout;
    Piece<Elem> staged;        // of each thread: [kBlockRows][staged_ld]
    Piece<float> projected;    // of each thread: x A^T, [block_rows][rp]
    Piece<float> rows;         // of each thread: z and h of one member, [2][block_rows][most_rp]
    Piece<char> coefficients;  // of each thread: E::Coefficients of that h
    Piece<Elem> a_panels;      // of each slab of K; with few rows one for each thread
    Piece<float> partial;  // with few rows, sums of x A^T of each slab of K: [slab][block_rows][rp]
};

// Blocks of rows that the backward takes through all its phases at once: three barriers for each
// such lot, so the more the better. Fewer at a high rank: the partial sums of dz take this many
// rows of r floats for each slab of N, and are to stay well below the panels.
static inline int64_t super_blocks_for(int64_t rp) {
    return max_of<int64_t>(1, min_of<int64_t>(8, 128 / rp));
}

template <class T, class E>
struct BackwardPlan {
    using Elem = typename E::Elem;

    // Of one member.
    struct Of : Place {
        int64_t own_slabs;       // of N, in the run of the first thread; at least 1
        int64_t panel_elements;  // of a panel of B
        int64_t super_elements;  // of super_rows rows of rp
        bool need_db, db_in_place;
        Piece<float> h, slope;  // [super_rows][rp]
        Piece<char> h_packed;   // of each block: E::Coefficients
        Piece<float> dz_sums;   // dY B: the first thread's run, then slab by slab of N, each
                                // [super_rows][rp]
        Piece<float> z;         // [super_rows][rp]; done with when dz_sums begin
        Piece<Elem> b_panels;   // of each slab of N
        Piece<float> db_sums;   // of each slab of N: [tile][rp][kTile]
    };

    explicit BackwardPlan(const BackwardParams& p)
        : threads(threads_for(p)), k_slabs(ceil_div(p.k, E::kSlab)), need_dx(p.dx.data != nullptr),
          streams(need_dx && p.dropout == 0 && !p.accumulate_dx && can_stream<T>(p.dx, p.m, p.k)) {
        const Totals all = place_members<E>(p, of);
        rp = all.rp, r = all.r, n_slabs = all.n_slabs, most_rp = all.most_rp;
        super_rows = super_blocks_for(rp) * E::kBlockRows;
        panel_elements = rp * E::kSlab;
        expand_elements = E::expand_rank(rp) * E::kSlab;
        for (int64_t i = 0; i < p.count; ++i)
            need_da |= p.members[i].da.data != nullptr;
        need_dz = need_dx || need_da;
        const Matrix& da = p.members[0].da;
        da_in_place =
            need_da && p.count == 1 && da.dtype == Dtype::f32 && rp == r && p.k % E::kTile == 0;

        staged = layout.reserve<Elem>(threads * E::kBlockRows * staged_ld<E>());
        outer_tiles = layout.reserve<Elem>(threads * 2 * E::kBlockRows * E::kTile);
        db_tile = layout.reserve<float>(threads * most_rp * E::kTile);
        dz = layout.reserve<float>(need_dz ? super_rows * rp : 0);
        dz_packed =
            layout.reserve<char>(super_blocks_for(rp) * E::coefficient_bytes(E::kBlockRows, rp));
        dots = layout.reserve<float>(need_dz ? E::kBlockRows * all.most_rp : 0);
        a_expand = layout.reserve<Elem>(need_dx ? k_slabs * expand_elements : 0);
        da_sums = layout.reserve<float>(need_da && !da_in_place ? k_slabs * panel_elements : 0);
        for (int64_t i = 0; i < p.count; ++i)
            plan_member(p.members[i], of[i]);
    }

    int threads;
    int64_t k_slabs;
    bool need_dx, need_da = false, need_dz;
    // dX bypasses the cache. Not with dropout, which reads dX again to drop elements.
    bool streams;
    int64_t rp, r, n_slabs, most_rp;          // see Totals
    int64_t super_rows;                       // rows that go through all phases at once
    int64_t panel_elements, expand_elements;  // of the sums of dA, and of a panel of A
    bool da_in_place;                         // the sums of dA lie where the result goes
    std::vector<Of> of;                       // of each member

    Layout layout;
    Piece<Elem> staged;       // of each thread: [kBlockRows][staged_ld]
    Piece<Elem> outer_tiles;  // of each thread: [2][kBlockRows][kTile]
    Piece<float> db_tile;     // of each thread: [kTile][rp], a tile of dB's sums transposed

    Piece<float> dz;        // [super_rows][rp]
    Piece<char> dz_packed;  // of each block: E::Coefficients
    Piece<float> dots;      // [kBlockRows][rp], one slab's part of the first thread's run
    Piece<Elem> a_expand;   // of each slab of K
    Piece<float> da_sums;   // of each slab of K: [tile][rp][kTile]

  private:
    void plan_member(const BackwardMember& member, Of& of) {
        // The first thread's run of all slabs begins with the first member.
        const int64_t run = n_slabs > threads ? part_of_team(n_slabs, 0, threads).end : 1;
        of.own_slabs = max_of<int64_t>(1, min_of(run - of.first_slab, of.n_slabs));
        of.panel_elements = of.rp * E::kSlab;
        of.super_elements = super_rows * of.rp;
        of.need_db = member.db.data != nullptr;
        of.db_in_place = member.db.dtype == Dtype::f32 && of.rp == member.r &&
                         member.db.row_stride == member.r && member.n % E::kTile == 0;
        of.h = layout.reserve<float>(of.super_elements);
        of.slope = layout.reserve<float>(need_dz ? of.super_elements : 0);
        of.h_packed =
            layout.reserve<char>(super_blocks_for(rp) * E::coefficient_bytes(E::kBlockRows, of.rp));
        of.dz_sums = layout.reserve<float>((need_dz ? 1 + of.n_slabs - of.own_slabs : 1) *
                                           of.super_elements);
        of.z = of.dz_sums;
        of.b_panels = layout.reserve<Elem>(need_dz ? of.n_slabs * of.panel_elements : 0);
        of.db_sums = layout.reserve<float>(
            of.need_db && !of.db_in_place ? of.n_slabs * of.panel_elements : 0);
    }
};

}  // namespace afa::cpu::AFA_ISA
