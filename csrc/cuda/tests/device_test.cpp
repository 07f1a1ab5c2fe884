// device.cpp on a runtime that plays faults (fake_runtime.h): no GPU and no nvcc, only CUDA's
// headers.
//
//   device_test
//
// Exit status: 0 all right, 1 otherwise.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/tests/fake_runtime.h"

namespace afa {

const void* any_kernel() { return &fake; }

}  // namespace afa

namespace {

using namespace afa;

int failures = 0;
const char* running = "";

void expect(bool condition, const char* what) {
    if (!condition) {
        std::printf("FAILED %s: %s\n", running, what);
        ++failures;
    }
}

#define EXPECT(condition) expect(condition, #condition)

bool contains(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

// The message of a launch with `shared_bytes`; empty if it went well.
std::string launch(SharedGrants& grants, int shared_bytes = 0) {
    LaunchConfig config{{}, {37, 64, 72, 8}, nullptr};
    config.plan.kernel = "forward";
    config.plan.threads = 128;
    config.plan.shared_bytes = shared_bytes;
    int params = 0;
    try {
        launch_kernel(&grants, grants, config, &params);
        return "";
    } catch (const std::runtime_error& error) {
        return error.what();
    }
}

constexpr int kMuch = 100 * 1024, kMore = 120 * 1024;

void shared_memory_is_asked_for_once() {
    static SharedGrants grants;
    EXPECT(launch(grants, 48 * 1024).empty() && fake.attribute_calls == 0);
    EXPECT(launch(grants, kMuch).empty() && fake.attribute_calls == 1);
    EXPECT(launch(grants, kMuch).empty() && fake.attribute_calls == 1);
    EXPECT(launch(grants, kMore).empty() && fake.attribute_calls == 2);
    EXPECT(launch(grants, kMuch).empty() && fake.attribute_calls == 2);
    cudaSetDevice(1);
    EXPECT(launch(grants, kMuch).empty() && fake.attribute_calls == 3);
}

void a_refused_grant_is_asked_for_again() {
    static SharedGrants grants;
    fake.attribute_result = cudaErrorInvalidValue;
    EXPECT(contains(launch(grants, kMuch), "forward kernel failed: its text (cudaErrorInvalid"));
    EXPECT(fake.launches == 0);
    fake.attribute_result = cudaSuccess;
    EXPECT(launch(grants, kMuch).empty() && fake.attribute_calls == 2 && fake.launches == 1);
}

void a_device_beyond_the_table_is_asked_every_time() {
    static SharedGrants grants;
    cudaSetDevice(SharedGrants::kDevices + 1);
    EXPECT(launch(grants, kMuch).empty() && launch(grants, kMuch).empty());
    EXPECT(fake.attribute_calls == 2);
}

void a_launch_that_fails_is_named_with_its_shape() {
    static SharedGrants grants;
    fake.launch_result = cudaErrorInvalidValue;
    const std::string message = launch(grants);
    EXPECT(contains(message, "forward kernel failed: its text (cudaErrorInvalidValue)"));
    EXPECT(contains(message, "M=37, K=64, N=72, r=8, grid 1 x 1, 128 threads"));
    EXPECT(!contains(message, "earlier"));
    EXPECT(fake.last_error == cudaSuccess);
    fake.launch_result = cudaSuccess;
    EXPECT(launch(grants).empty());
}

void a_fault_of_an_earlier_kernel_is_not_this_ones() {
    static SharedGrants grants;
    fake.launch_result = cudaErrorIllegalAddress;
    std::string message = launch(grants);
    EXPECT(contains(message, "a kernel that was launched earlier failed: its text (cudaErrorIll"));
    EXPECT(!contains(message, "forward kernel failed"));
    setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
    message = launch(grants);  // each launch waits for its own kernel
    EXPECT(contains(message, "forward kernel failed: its text (cudaErrorIllegalAddress)"));
    unsetenv("CUDA_LAUNCH_BLOCKING");
}

void an_error_that_stood_before_the_launch_is_not_its_own() {
    static SharedGrants grants;
    fake.last_error = fake.launch_result = cudaErrorUnknown;
    EXPECT(contains(launch(grants), "a kernel that was launched earlier failed"));
    fake.last_error = cudaErrorInvalidValue;
    fake.launch_result = cudaSuccess;
    EXPECT(launch(grants).empty());
}

void another_device_leaves_no_context_behind() {
    {
        const DeviceScope scope(1);
        EXPECT(fake.current == 1);
    }
    EXPECT(fake.current == -1);
    EXPECT(fake.has_context[1] && !fake.has_context[0]);
}

void the_device_that_would_be_taken_anyway_leaves_no_context_behind_either() {
    {
        const DeviceScope scope(0);  // the number that cudaGetDevice gives where nothing is current
        EXPECT(fake.current == 0);
    }
    EXPECT(fake.current == -1);
}

void the_context_that_was_current_comes_back() {
    cudaSetDevice(0);
    {
        const DeviceScope scope(1);
        EXPECT(fake.current == 1);
        const DeviceScope same(1);
        EXPECT(fake.set_device_calls == 2);
    }
    EXPECT(fake.current == 0);
}

void the_current_device_costs_no_switch() {
    cudaSetDevice(1);
    {
        const DeviceScope scope(1);
    }
    EXPECT(fake.current == 1 && fake.set_device_calls == 1);
}

void kernels_that_fit_are_no_failure() {
    EXPECT(kernel_image_failure(1).name.empty() && kernel_image_failure(1).text.empty());
    EXPECT(!fake.has_context[0]);
}

void a_missing_image_is_told() {
    fake.image_result = cudaErrorNoKernelImageForDevice;
    EXPECT(kernel_image_failure(0).name == "cudaErrorNoKernelImageForDevice");
    EXPECT(kernel_image_failure(0).text == "its text");
    EXPECT(fake.last_error == cudaSuccess);
}

void an_old_driver_is_told_and_raises_nothing() {
    fake.driver_is_too_old = true;
    fake.driver_version = 12040;
    EXPECT(kernel_image_failure(0).name == "cudaErrorInsufficientDriver");
    EXPECT(fake.last_error == cudaSuccess);
    EXPECT(cuda_versions().driver == 12040 && cuda_versions().runtime == 13000);
}

#define CASE(function) {#function, function}
const struct {
    const char* name;
    void (*run)();
} kCases[] = {
    CASE(an_old_driver_is_told_and_raises_nothing),  // first: nothing is remembered of a driver yet
    CASE(shared_memory_is_asked_for_once),
    CASE(a_refused_grant_is_asked_for_again),
    CASE(a_device_beyond_the_table_is_asked_every_time),
    CASE(a_launch_that_fails_is_named_with_its_shape),
    CASE(a_fault_of_an_earlier_kernel_is_not_this_ones),
    CASE(an_error_that_stood_before_the_launch_is_not_its_own),
    CASE(another_device_leaves_no_context_behind),
    CASE(the_device_that_would_be_taken_anyway_leaves_no_context_behind_either),
    CASE(the_context_that_was_current_comes_back),
    CASE(the_current_device_costs_no_switch),
    CASE(kernels_that_fit_are_no_failure),
    CASE(a_missing_image_is_told),
};

}  // namespace

int main() {
    int cases = 0;
    for (const auto& test : kCases) {
        fake = FakeRuntime();
        running = test.name;
        test.run();
        ++cases;
    }
    if (failures == 0)
        std::printf("device: %d cases passed\n", cases);
    return failures != 0;
}
