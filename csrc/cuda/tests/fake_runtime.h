// A CUDA runtime and driver that play what a test asks of them: contexts, errors, an old driver.
// Only the functions that device.cpp calls; one thread.
#pragma once

#include <cuda_runtime_api.h>

struct FakeRuntime {
    static constexpr int kDevices = 80;
    int driver_version = 13000;
    bool driver_is_too_old = false;
    cudaError_t launch_result = cudaSuccess;     // of every launch
    cudaError_t attribute_result = cudaSuccess;  // of cudaFuncSetAttribute
    cudaError_t image_result = cudaSuccess;      // of cudaFuncGetAttributes

    // What the calls left behind.
    cudaError_t last_error = cudaSuccess;
    bool has_context[kDevices] = {};
    int selected = 0;  // what cudaSetDevice was told
    int current = -1;  // device of the driver's current context, -1: none
    int attribute_calls = 0, set_device_calls = 0, launches = 0;
};

extern FakeRuntime fake;
