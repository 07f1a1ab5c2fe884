#pragma once

#include "ptx_machine/state.h"

namespace ptx {

// Fault if warps of one warpgroup have not executed the same wgmma instructions so far.
void check_warpgroups(const Cta& cta);

}  // namespace ptx
