#pragma once

#include "ptx_machine/state.h"

namespace ptx {

// One of `lanes` that has copies under way; -1: none has.
int lane_with_copies(const Warp& warp, uint32_t lanes);

}  // namespace ptx
