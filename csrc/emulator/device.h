#pragma once

#include "cuda/host/plan.h"

namespace afa {

// The limits that the emulated device reports; by default those of an H100.
void set_emulated_device(const DeviceLimits& limits);

}  // namespace afa
