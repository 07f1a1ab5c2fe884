#include "emulator/tests/problem.h"

#include <cmath>

#include "common/activation.h"
#include "common/philox.h"
#include "emulator/simt.h"

namespace afa::test {
namespace {

simt::Format format(DType dtype) {
    return dtype == DType::bf16 ? simt::Format::bf16 : simt::Format::fp16;
}

double round_to(double value, DType dtype) {
    return simt::to_float(simt::from_float(static_cast<float>(value), format(dtype)),
                          format(dtype));
}

}  // namespace

Problem::Problem(const Shape& shape, DType dtype, int activation, const Options& options,
                 uint64_t seed)
    : shape_(shape), dtype_(dtype), activation_(activation), options_(options), random_(seed) {
    const int64_t extra = options.strided ? 16 : 0;
    x_ = random_matrix(shape.m, shape.k, 1.0, shape.k + extra);
    a_ = random_matrix(shape.r, shape.k, 1.0 / std::sqrt(shape.k), shape.k);
    b_ = random_matrix(shape.n, shape.r, 1.0 / std::sqrt(shape.r), shape.r);
    dy_ = random_matrix(shape.m, shape.n, 1.0, shape.n + extra);
    base_ = random_matrix(options.bias ? 1 : shape.m, shape.n, 1.0, shape.n + extra);
    a_operand_ = weight(a_, a_floats_);
    b_operand_ = weight(b_, b_floats_);
    compute_truth();
}

Matrix Problem::empty_matrix(int64_t rows, int64_t cols, int64_t stride) const {
    Matrix m{rows, cols, stride, Bytes(static_cast<size_t>((rows - 1) * stride + cols) * 2), {}};
    return m;
}

Matrix Problem::random_matrix(int64_t rows, int64_t cols, double scale, int64_t stride) {
    Matrix m = empty_matrix(rows, cols, stride);
    std::normal_distribution<double> normal(0.0, scale);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < cols; ++col) {
            const double value = round_to(normal(random_), dtype_);
            m.value.push_back(value);
            m.bytes.as<uint16_t>()[row * stride + col] =
                simt::from_float(static_cast<float>(value), format(dtype_));
        }
    return m;
}

WeightOperand Problem::weight(const Matrix& m, Bytes& floats) {
    if (!options_.float_weights)
        return {m.bytes.as(), m.stride, 1, false};
    // By columns where other matrices are strided too: then no row is a whole vector.
    const int64_t row_stride = options_.strided ? 1 : m.cols;
    const int64_t col_stride = options_.strided ? m.rows : 1;
    floats = Bytes(m.value.size() * sizeof(float));
    for (int64_t row = 0; row < m.rows; ++row)
        for (int64_t col = 0; col < m.cols; ++col)
            floats.as<float>()[row * row_stride + col * col_stride] =
                static_cast<float>(m.value[row * m.cols + col]);
    return {floats.as(), row_stride, col_stride, true};
}

void Problem::compute_truth() {
    const int64_t m = shape_.m, k = shape_.k, n = shape_.n, r = shape_.r;
    const double inverse_keep = 256.0 / (256 - options_.threshold);
    const auto kept = [&](int64_t row, int64_t col) {
        if (options_.threshold == 0)
            return 1.0;
        const Philox4 bytes =
            dropout_bytes(static_cast<uint64_t>(dropout_seed_), row, (k + 15) / 16, col / 16);
        return dropout_keeps(bytes, static_cast<int>(col % 16), options_.threshold) ? 1.0 : 0.0;
    };
    std::vector<double> mask(m * k);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < k; ++j)
            mask[i * k + j] = kept(i, j);
    true_z_.assign(m * r, 0.0);
    true_y_.assign(m * n, 0.0);
    true_dx_.assign(m * k, 0.0);
    true_da_.assign(r * k, 0.0);
    true_db_.assign(n * r, 0.0);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < r; ++c) {
            double z = 0.0, dh = 0.0;
            for (int64_t j = 0; j < k; ++j)
                z += mask[i * k + j] * x_.value[i * k + j] * a_.value[c * k + j];
            for (int64_t j = 0; j < n; ++j)
                dh += dy_.value[i * n + j] * b_.value[j * r + c];
            z = round_to(inverse_keep * z, dtype_);
            true_z_[i * r + c] = z;
            const ValueSlope phi = anneal_by_id(activation_, static_cast<float>(z), alpha_t_);
            const double h = round_to(phi.value, dtype_);
            const double dz = round_to(scaling_ * inverse_keep * dh * phi.slope, dtype_);
            for (int64_t j = 0; j < n; ++j) {
                true_y_[i * n + j] += scaling_ * h * b_.value[j * r + c];
                true_db_[j * r + c] += scaling_ * dy_.value[i * n + j] * h;
            }
            for (int64_t j = 0; j < k; ++j) {
                true_dx_[i * k + j] += mask[i * k + j] * dz * a_.value[c * k + j];
                true_da_[c * k + j] += mask[i * k + j] * dz * x_.value[i * k + j];
            }
        }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j)
            true_y_[i * n + j] += base_.value[(options_.bias ? 0 : i) * n + j];
}

std::string Problem::name() const {
    return describe(shape_) + (dtype_ == DType::bf16 ? ", bf16" : ", fp16") + ", activation " +
           std::to_string(activation_) + ", dropout " + std::to_string(options_.threshold) +
           "/256" + (options_.float_weights ? ", float32 weights" : "") +
           (options_.bias ? ", bias" : "") + (options_.in_place ? ", in place" : "") +
           (options_.strided ? ", strided" : "") + (options_.recompute_z ? ", z recomputed" : "") +
           (options_.need_dx ? "" : ", no dx") + (options_.chunk_limit ? ", one chunk" : "") +
           (options_.round_limit ? ", several rounds" : "") + (options_.need_da ? "" : ", no dA") +
           (options_.need_db ? "" : ", no dB");
}

std::string Problem::compare(const char* what, const Bytes& got, bool is_float,
                             const std::vector<double>& truth, int64_t cols, int64_t stride) const {
    double largest = 0.0, worst = 0.0;
    for (const double value : truth)
        largest = std::max(largest, std::fabs(value));
    for (size_t i = 0; i < truth.size(); ++i) {
        const size_t at = i / cols * stride + i % cols;
        const double value =
            is_float ? got.as<float>()[at] : simt::to_float(got.as<uint16_t>()[at], format(dtype_));
        const double error = std::fabs(value - truth[i]);
        if (!(error <= worst))  // a NaN is the worst
            worst = error;
    }
    // A float32 sum may round z, h or dz to the other neighbour; outputs are rounded once more.
    const double tolerance = (dtype_ == DType::bf16 ? 1.0 / 128 : 1.0 / 1024) * largest;
    if (worst <= tolerance)
        return "";
    return std::string(what) + ": error " + std::to_string(worst) + ", allowed " +
           std::to_string(tolerance);
}

void Problem::fill(BranchCall& call) const {
    call.dtype = dtype_;
    call.shape = shape_;
    call.x = x_.bytes.as();
    call.x_stride = x_.stride;
    call.members[0] = {a_operand_, b_operand_, &alpha_t_, activation_, scaling_};
    call.seed = options_.threshold ? &dropout_seed_ : nullptr;
    call.threshold = options_.threshold;
    call.device = device_limits(0);
    call.device.chunk_limit = options_.chunk_limit;
    call.device.round_limit = options_.round_limit;
}

std::string Problem::run() {
    y_ = empty_matrix(shape_.m, shape_.n, dy_.stride);
    z_ = empty_matrix(shape_.m, shape_.r, shape_.r);
    dx_ = empty_matrix(shape_.m, shape_.k, shape_.k);
    const size_t weight_bytes = options_.float_weights ? 4 : 2;
    da_ = Bytes(true_da_.size() * weight_bytes);
    db_ = Bytes(true_db_.size() * weight_bytes);
    if (options_.in_place)
        std::memcpy(y_.bytes.as(), base_.bytes.as(), y_.bytes.size());

    ForwardCall forward_call{};
    fill(forward_call);
    const Bytes forward_scratch(forward_workspace(shape_));
    forward_call.workspace = forward_scratch.as();
    forward_call.base = options_.in_place ? y_.bytes.as() : base_.bytes.as();
    forward_call.base_stride = options_.bias ? 0 : base_.stride;
    forward_call.y = y_.bytes.as();
    forward_call.y_stride = y_.stride;
    forward_call.z = z_.bytes.as();
    forward(forward_call);

    BackwardCall backward_call{};
    fill(backward_call);
    const Bytes backward_scratch(backward_workspace(shape_, options_.recompute_z));
    backward_call.workspace = backward_scratch.as();
    backward_call.dy = dy_.bytes.as();
    backward_call.dy_stride = dy_.stride;
    backward_call.z = options_.recompute_z ? nullptr : z_.bytes.as();
    backward_call.dx = options_.need_dx ? dx_.bytes.as() : nullptr;
    backward_call.da = options_.need_da ? da_.as() : nullptr;
    backward_call.db = options_.need_db ? db_.as() : nullptr;
    backward_call.da_is_float = backward_call.db_is_float = options_.float_weights;
    backward(backward_call);

    std::string wrong = compare("y", y_.bytes, false, true_y_, shape_.n, y_.stride);
    if (wrong.empty())
        wrong = compare("z", z_.bytes, false, true_z_, shape_.r, shape_.r);
    if (wrong.empty() && options_.need_dx)
        wrong = compare("dx", dx_.bytes, false, true_dx_, shape_.k, shape_.k);
    if (wrong.empty() && options_.need_da)
        wrong = compare("dA", da_, options_.float_weights, true_da_, shape_.k, shape_.k);
    if (wrong.empty() && options_.need_db)
        wrong = compare("dB", db_, options_.float_weights, true_db_, shape_.r, shape_.r);
    return wrong;
}

std::vector<uint8_t> Problem::outputs() const {
    std::vector<uint8_t> all;
    for (const Bytes* bytes : {&y_.bytes, &z_.bytes, &dx_.bytes, &da_, &db_})
        all.insert(all.end(), bytes->as<uint8_t>(), bytes->as<uint8_t>() + bytes->size());
    return all;
}

}  // namespace afa::test
