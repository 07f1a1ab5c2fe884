#include "emulator/tests/problem.h"

#include <cmath>

#include "common/activation.h"
#include "common/philox.h"
#include "cuda/host/device.h"
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
    : shape_(shape), dtype_(dtype), options_(options), random_(seed) {
    const int64_t extra = options.strided ? 16 : 0, m = shape.m, k = shape.k;
    x_ = random_matrix(m, k, 1.0, k + extra);
    std::vector<double> mask(m * k, 1.0);
    for (int64_t i = 0; i < m && options.threshold > 0; ++i)
        for (int64_t j = 0; j < k; ++j) {
            const Philox4 bytes =
                dropout_bytes(static_cast<uint64_t>(dropout_seed_), i, (k + 15) / 16, j / 16);
            mask[i * k + j] =
                dropout_keeps(bytes, static_cast<int>(j % 16), options.threshold) ? 1.0 : 0.0;
        }
    true_dx_.assign(m * k, 0.0);
    members_.resize(shape.count);
    for (int i = 0; i < shape.count; ++i) {
        const auto [n, r] = shape.members[i];
        Member& member = members_[i];
        member.a = random_matrix(r, k, 1.0 / std::sqrt(k), k);
        member.b = random_matrix(n, r, 1.0 / std::sqrt(r), r);
        member.dy = random_matrix(m, n, 1.0, n + extra);
        member.base = random_matrix(options.bias ? 1 : m, n, 1.0, n + extra);
        member.a_operand = weight(member.a, member.a_floats);
        member.b_operand = weight(member.b, member.b_floats);
        member.activation = (activation + i) % kActivationCount;
        member.alpha_t = 0.3f + 0.2f * static_cast<float>(i);
        member.scaling = 1.7f - static_cast<float>(i);
        compute_truth(member, mask);
    }
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

void Problem::compute_truth(Member& member, const std::vector<double>& mask) {
    const int64_t m = shape_.m, k = shape_.k, n = member.b.rows, r = member.b.cols;
    const double inverse_keep = 256.0 / (256 - options_.threshold);
    const std::vector<double>&x = x_.value, &a = member.a.value, &b = member.b.value;
    member.true_z.assign(m * r, 0.0);
    member.true_y.assign(m * n, 0.0);
    member.true_da.assign(r * k, 0.0);
    member.true_db.assign(n * r, 0.0);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < r; ++c) {
            double z = 0.0, dh = 0.0;
            for (int64_t j = 0; j < k; ++j)
                z += mask[i * k + j] * x[i * k + j] * a[c * k + j];
            for (int64_t j = 0; j < n; ++j)
                dh += member.dy.value[i * n + j] * b[j * r + c];
            z = round_to(inverse_keep * z, dtype_);
            member.true_z[i * r + c] = z;
            const ValueSlope phi =
                anneal_by_id(member.activation, static_cast<float>(z), member.alpha_t);
            const double h = round_to(phi.value, dtype_);
            const double dz = round_to(member.scaling * inverse_keep * dh * phi.slope, dtype_);
            for (int64_t j = 0; j < n; ++j) {
                member.true_y[i * n + j] += member.scaling * h * b[j * r + c];
                member.true_db[j * r + c] += member.scaling * member.dy.value[i * n + j] * h;
            }
            for (int64_t j = 0; j < k; ++j) {
                true_dx_[i * k + j] += mask[i * k + j] * dz * a[c * k + j];
                member.true_da[c * k + j] += mask[i * k + j] * dz * x[i * k + j];
            }
        }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j)
            member.true_y[i * n + j] += member.base.value[(options_.bias ? 0 : i) * n + j];
}

std::string Problem::name() const {
    return describe(shape_) + (dtype_ == DType::bf16 ? ", bf16" : ", fp16") + ", activation " +
           std::to_string(members_[0].activation) + ", dropout " +
           std::to_string(options_.threshold) + "/256" +
           (options_.float_weights ? ", float32 weights" : "") + (options_.bias ? ", bias" : "") +
           (options_.in_place ? ", in place" : "") + (options_.strided ? ", strided" : "") +
           (options_.recompute_z ? ", z recomputed" : "") + (options_.need_dx ? "" : ", no dx") +
           (options_.chunk_limit ? ", one chunk" : "") +
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
    for (int i = 0; i < shape_.count; ++i) {
        const Member& member = members_[i];
        call.members[i] = {member.a_operand, member.b_operand, &member.alpha_t, member.activation,
                           member.scaling};
    }
    call.seed = options_.threshold ? &dropout_seed_ : nullptr;
    call.threshold = options_.threshold;
    call.device = device_limits(0);
    call.device.chunk_limit = options_.chunk_limit;
    call.device.round_limit = options_.round_limit;
}

void Problem::run_forward() {
    ForwardCall call{};
    fill(call);
    const Bytes scratch(forward_workspace(shape_));
    call.workspace = scratch.as();
    for (int i = 0; i < shape_.count; ++i) {
        Member& member = members_[i];
        member.y = empty_matrix(shape_.m, member.b.rows, member.dy.stride);
        member.z = empty_matrix(shape_.m, member.b.cols, member.b.cols);
        if (options_.in_place)
            std::memcpy(member.y.bytes.as(), member.base.bytes.as(), member.y.bytes.size());
        MemberOutput& out = call.outputs[i];
        out.base = options_.in_place ? member.y.bytes.as() : member.base.bytes.as();
        out.base_stride = options_.bias ? 0 : member.base.stride;
        out.y = member.y.bytes.as();
        out.y_stride = member.y.stride;
        out.z = member.z.bytes.as();
    }
    forward(call);
}

void Problem::run_backward() {
    BackwardCall call{};
    fill(call);
    const Bytes scratch(backward_workspace(shape_, options_.recompute_z));
    call.workspace = scratch.as();
    dx_ = empty_matrix(shape_.m, shape_.k, shape_.k);
    call.dx = options_.need_dx ? dx_.bytes.as() : nullptr;
    const size_t weight_bytes = options_.float_weights ? 4 : 2;
    for (int i = 0; i < shape_.count; ++i) {
        Member& member = members_[i];
        member.da = Bytes(member.true_da.size() * weight_bytes);
        member.db = Bytes(member.true_db.size() * weight_bytes);
        MemberGradients& gradients = call.gradients[i];
        gradients.dy = member.dy.bytes.as();
        gradients.dy_stride = member.dy.stride;
        gradients.z = options_.recompute_z ? nullptr : member.z.bytes.as();
        gradients.da = options_.need_da ? member.da.as() : nullptr;
        gradients.db = options_.need_db ? member.db.as() : nullptr;
        gradients.da_is_float = gradients.db_is_float = options_.float_weights;
    }
    backward(call);
}

std::string Problem::compare_member(const Member& member) const {
    const int64_t n = member.b.rows, r = member.b.cols, k = shape_.k;
    const bool is_float = options_.float_weights;
    std::string wrong = compare("y", member.y.bytes, false, member.true_y, n, member.y.stride);
    if (wrong.empty())
        wrong = compare("z", member.z.bytes, false, member.true_z, r, r);
    if (wrong.empty() && options_.need_da)
        wrong = compare("dA", member.da, is_float, member.true_da, k, k);
    if (wrong.empty() && options_.need_db)
        wrong = compare("dB", member.db, is_float, member.true_db, r, r);
    return wrong;
}

std::string Problem::run() {
    run_forward();
    run_backward();
    std::string wrong;
    for (const Member& member : members_)
        if (wrong.empty())
            wrong = compare_member(member);
    if (wrong.empty() && options_.need_dx)
        wrong = compare("dx", dx_.bytes, false, true_dx_, shape_.k, shape_.k);
    return wrong;
}

std::vector<uint8_t> Problem::outputs() const {
    std::vector<uint8_t> all;
    const auto add = [&](const Bytes& bytes) {
        all.insert(all.end(), bytes.as<uint8_t>(), bytes.as<uint8_t>() + bytes.size());
    };
    add(dx_.bytes);
    for (const Member& member : members_)
        for (const Bytes* bytes : {&member.y.bytes, &member.z.bytes, &member.da, &member.db})
            add(*bytes);
    return all;
}

}  // namespace afa::test
