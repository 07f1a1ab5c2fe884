// What the host code takes for a device's limits, with those that only tests set: so that few rows
// make long chunks and several rounds. The linker puts this function in the place of device_limits.
#include "cuda/host/device.h"
#include "ptx_machine/cuda/runtime.h"

extern "C" {

afa::DeviceLimits __real__ZN3afa13device_limitsEi(int device);

afa::DeviceLimits __wrap__ZN3afa13device_limitsEi(int device) {
    afa::DeviceLimits limits = __real__ZN3afa13device_limitsEi(device);
    if (ptx::runtime_state().chunk_limit > 0)
        limits.chunk_limit = ptx::runtime_state().chunk_limit;
    limits.round_limit = ptx::runtime_state().round_limit;
    return limits;
}

}  // extern "C"
