// A random call of the operator with exact-size, NaN-filled buffers, and the truth in double
// precision.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/host/ops.h"

namespace afa::test {

// Memory of exactly the size that the kernels are told, so that the sanitizers see the first byte
// beyond it.
class Bytes {
  public:
    Bytes() = default;
    explicit Bytes(size_t size)
        : size_(size), data_(std::aligned_alloc(256, (size + 255) / 256 * 256), &std::free) {
        std::memset(data_.get(), 0xFF, size_);  // NaN in all formats
    }
    template <typename T = void>
    T* as() const {
        return reinterpret_cast<T*>(data_.get());
    }
    size_t size() const { return size_; }

  private:
    size_t size_ = 0;
    std::shared_ptr<void> data_;
};

struct Options {
    bool float_weights = false;
    bool bias = false;      // base is one row
    bool in_place = false;  // base is y
    bool strided = false;   // rows of x, dy and y are further apart than their length
    bool recompute_z = false;
    bool need_dx = true, need_da = true, need_db = true;
    int threshold = 0;
    int chunk_limit = 0, round_limit = 0;
};

// A matrix of T on the emulated device and its values.
struct Matrix {
    int64_t rows = 0, cols = 0, stride = 0;
    Bytes bytes;
    std::vector<double> value;  // [rows, cols]
};

// What one layer brings, what it gets, and what it should get.
struct Member {
    Matrix a, b, base, dy, y, z;
    Bytes a_floats, b_floats, da, db;
    WeightOperand a_operand, b_operand;
    int activation = 0;
    float alpha_t = 0.0f, scaling = 0.0f;
    std::vector<double> true_y, true_z, true_da, true_db;
};

class Problem {
  public:
    Problem(const Shape& shape, DType dtype, int activation, const Options& options, uint64_t seed);

    // Runs forward and backward into fresh buffers; `problem` is what they got wrong, or empty.
    std::string run();
    // All outputs of the last run, byte for byte.
    std::vector<uint8_t> outputs() const;
    std::string name() const;

  private:
    Matrix random_matrix(int64_t rows, int64_t cols, double scale, int64_t stride);
    Matrix empty_matrix(int64_t rows, int64_t cols, int64_t stride) const;
    WeightOperand weight(const Matrix& m, Bytes& floats);
    void compute_truth(Member& member, const std::vector<double>& mask);
    void fill(BranchCall& call) const;
    void run_forward();
    void run_backward();
    std::string compare(const char* what, const Bytes& got, bool is_float,
                        const std::vector<double>& truth, int64_t cols, int64_t stride) const;
    std::string compare_member(const Member& member) const;

    Shape shape_;
    DType dtype_;
    Options options_;
    std::mt19937_64 random_;
    int64_t dropout_seed_ = 0x123456789ABCDEF;
    Matrix x_, dx_;
    std::vector<double> true_dx_;
    std::vector<Member> members_;
};

}  // namespace afa::test
