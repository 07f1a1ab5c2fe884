#include "emulator/device.h"

#include "cuda/host/device.h"

namespace afa {
namespace {

DeviceLimits emulated{132, 227 * 1024, 228 * 1024};

}  // namespace

void set_emulated_device(const DeviceLimits& limits) { emulated = limits; }

DeviceLimits device_limits(int) { return emulated; }

DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() = default;

}  // namespace afa
