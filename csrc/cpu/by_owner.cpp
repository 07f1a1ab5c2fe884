// The rows of an owner are an ordinary call of the kernels: many on all threads, one owner after
// the other; few on one thread, and the threads take such owners as they come.
#include "cpu/by_owner.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

#include "cpu/cpu.h"

namespace afa::cpu {

namespace {

int64_t bytes_of(Dtype dtype) {
    switch (dtype) {
    case Dtype::f32:
        return 4;
    case Dtype::f64:
        return 8;
    default:
        return 2;
    }
}

char* address(const Matrix& matrix, int64_t elements) {
    return static_cast<char*>(matrix.data) + elements * bytes_of(matrix.dtype);
}

// The same matrix from a row on, or absent.
Matrix from_row(const Matrix& matrix, int64_t row) {
    Matrix rest = matrix;
    if (matrix.data != nullptr)
        rest.data = address(matrix, row * matrix.row_stride);
    return rest;
}

// Zero is the same in every dtype: all bits are.
void clear(const Matrix& matrix, int64_t rows, int64_t first_col, int64_t cols) {
    for (int64_t row = 0; row < rows && cols > first_col; ++row)
        memset(address(matrix, row * matrix.row_stride + first_col), 0,
               static_cast<size_t>((cols - first_col) * bytes_of(matrix.dtype)));
}

// Copies rows of y, whose strides can be anything; from an absent matrix zeros.
template <class Bits>
void copy(const Matrix& from, const Matrix& to, int64_t rows, int64_t cols) {
    const auto* source = static_cast<const Bits*>(from.data);
    auto* target = static_cast<Bits*>(to.data);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < cols; ++col)
            target[row * to.row_stride + col * to.col_stride] =
                source == nullptr ? Bits{0} : source[row * from.row_stride + col * from.col_stride];
}

// Neighbouring rows: those of an owner, or rows without a branch.
struct Rows {
    int64_t owner, begin, count;
    int64_t rank;
    int64_t products;  // multiply-adds
};

// Who takes what. An owner on all threads has a barrier or two, and one on a single thread may be
// the last that is still running: with owners of at most a quarter of a thread's share that is
// little.
class Work {
  public:
    explicit Work(const ByOwnerParams& p) {
        int64_t begin = 0, products = 0;
        for (int64_t owner = 0; owner < p.owners; ++owner) {
            const int64_t end = *p.offsets.at(owner), rank = p.rank_of(owner);
            const Rows rows{owner, begin, end - begin, rank, (end - begin) * rank * (p.k + p.n)};
            if (rows.products == 0) {
                idle.push_back(owner);
                add_bare(begin, end);
            } else {
                alone.push_back(rows);
                products += rows.products;
            }
            begin = end;
        }
        add_bare(begin, p.m);
        threads = products < kWorthThreads ? 1 : p.threads;
        // The largest first: the later an owner begins, the less there is to wait for at the end.
        std::stable_sort(alone.begin(), alone.end(),
                         [](const Rows& a, const Rows& b) { return a.products > b.products; });
        const auto is_small = [&](const Rows& rows) {
            return 4 * threads * rows.products <= products || rows.products < kWorthThreads;
        };
        const auto first =
            threads == 1 ? alone.begin() : std::find_if(alone.begin(), alone.end(), is_small);
        together.assign(alone.begin(), first);
        alone.erase(alone.begin(), first);
    }

    int threads;
    std::vector<Rows> together, alone;  // owners with a branch: on all threads, on one each
    std::vector<Rows> bare;             // rows without a branch, a few at a time
    std::vector<int64_t> idle;          // owners without rows or without a rank

  private:
    void add_bare(int64_t begin, int64_t end) {
        constexpr int64_t kRows = 64;
        for (; begin < end; begin += kRows)
            bare.push_back({-1, begin, std::min(kRows, end - begin), 0, 0});
    }
};

// Calls f(0) .. f(count - 1) on up to `threads` threads, and throws what one of them threw.
template <class F>
void share(int threads, int64_t count, F&& f) {
    std::exception_ptr failure;
    const auto guarded = [&](int64_t i) {
        try {
            f(i);
        } catch (...) {
#if defined(_OPENMP)
#pragma omp critical(afa_by_owner_failure)
#endif
            failure = std::current_exception();
        }
    };
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
#else
    (void)threads;
#endif
    for (int64_t i = 0; i < count; ++i)
        guarded(i);
    if (failure)
        std::rethrow_exception(failure);
}

// Calls of_owner(rows, threads) for each owner with a branch, of_bare(rows) for the rows without
// one and of_idle(owner) for the owners without one.
template <class OfOwner, class OfBare, class OfIdle>
void run(const ByOwnerParams& p, OfOwner&& of_owner, OfBare&& of_bare, OfIdle&& of_idle) {
    const Work work(p);
    for (const Rows& rows : work.together)
        of_owner(rows, work.threads);
    const auto alone = static_cast<int64_t>(work.alone.size());
    const auto bare = static_cast<int64_t>(work.bare.size());
    const auto idle = static_cast<int64_t>(work.idle.size());
    share(work.threads, alone + bare + idle, [&](int64_t i) {
        if (i < alone)
            of_owner(work.alone[i], 1);
        else if (i < alone + bare)
            of_bare(work.bare[i - alone]);
        else
            of_idle(work.idle[i - alone - bare]);
    });
}

// What an ordinary call and its only member get from an owner, in both directions.
template <class Params, class Member>
void set_owner(const ByOwnerParams& p, const Rows& rows, int threads, Params& call,
               Member& member) {
    static_cast<CommonParams&>(call) = p;
    call.m = rows.count;
    call.x = from_row(p.x, rows.begin);
    call.first_row = p.first_row + rows.begin;
    call.threads = threads;
    call.members = &member;
    call.count = 1;
    member.n = p.n;
    member.r = rows.rank;
    member.a = p.a.at(rows.owner);
    member.b = p.b.at(rows.owner);
    member.alpha_t = p.alpha_t.data ? p.alpha_t.at(rows.owner) : nullptr;
    member.activation = p.activation;
    member.scaling = p.scalings.data ? *p.scalings.at(rows.owner) : p.scaling;
}

}  // namespace

Matrix Stack::at(int64_t owner) const {
    Matrix own = first;
    if (present())
        own.data = address(first, owner * stride);
    return own;
}

void forward(const ByOwnerForwardParams& p) {
    run(
        p,
        [&](const Rows& rows, int threads) {
            ForwardParams call;
            ForwardMember member;
            set_owner(p, rows, threads, call, member);
            member.base = from_row(p.base, rows.begin);
            member.out = from_row(p.out, rows.begin);
            member.z = from_row(p.z, rows.begin);
            forward(call);
            if (p.z.data != nullptr)
                clear(member.z, rows.count, rows.rank, p.r);
        },
        [&](const Rows& rows) {
            const Matrix base = from_row(p.base, rows.begin), out = from_row(p.out, rows.begin);
            if (p.z.data != nullptr)
                clear(from_row(p.z, rows.begin), rows.count, 0, p.r);
            if (base.data == out.data)
                return;
            if (p.dtype == Dtype::f32)
                copy<uint32_t>(base, out, rows.count, p.n);
            else
                copy<uint16_t>(base, out, rows.count, p.n);
        },
        [](int64_t) {});
}

void backward(const ByOwnerBackwardParams& p) {
    run(
        p,
        [&](const Rows& rows, int threads) {
            BackwardParams call;
            BackwardMember member;
            set_owner(p, rows, threads, call, member);
            call.dx = from_row(p.dx, rows.begin);
            call.accumulate_dx = p.accumulate_dx;
            member.dy = from_row(p.dy, rows.begin);
            member.z = from_row(p.z, rows.begin);
            member.da = p.da.at(rows.owner);
            member.db = p.db.at(rows.owner);
            backward(call);
            if (p.da.present())
                clear(from_row(member.da, rows.rank), p.r - rows.rank, 0, p.k);
            if (p.db.present())
                clear(member.db, p.n, rows.rank, p.r);
        },
        [&](const Rows& rows) {
            if (p.dx.data != nullptr && !p.accumulate_dx)
                clear(from_row(p.dx, rows.begin), rows.count, 0, p.k);
        },
        [&](int64_t owner) {
            if (p.da.present())
                clear(p.da.at(owner), p.r, 0, p.k);
            if (p.db.present())
                clear(p.db.at(owner), p.n, 0, p.r);
        });
}

}  // namespace afa::cpu
