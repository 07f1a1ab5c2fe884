// The kernels that a program holds: nvcc's fat binaries as the objects register them, and the image
// of each for a device.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ptx_machine/machine.h"

namespace ptx {

// A translation unit's device code: PTX for one or more architectures, left uncompressed by the
// build.
class Unit {
  public:
    explicit Unit(const void* fat_binary_wrapper);
    // The newest PTX that a device of this compute capability (10 * major + minor) takes, as the
    // driver chooses it; null: none.
    const Module* module_for(int capability);
    void forget();

  private:
    struct Image {
        std::string text;
        std::unique_ptr<Module> module;
    };
    std::map<int, Image> images_;  // by architecture
};

struct Function {
    Unit* unit;
    std::string name;  // mangled
};

struct Images {
    std::vector<std::unique_ptr<Unit>> units;
    std::map<const void*, Function> functions;  // by host stub
    // Changes the PTX of a translation unit when it is loaded next.
    std::function<std::string(const std::string&)> edit;
};

Images& images();
// Loads every translation unit's PTX again at the next launch.
void forget_modules();
// All kernels that the program holds, mangled.
std::vector<std::string> kernel_names();

}  // namespace ptx
