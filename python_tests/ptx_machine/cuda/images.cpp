#include "ptx_machine/cuda/images.h"

#include <algorithm>
#include <cstring>

namespace ptx {
namespace {

// What __cudaRegisterFatBinary is given, and the head of the data that it points to.
struct FatBinaryWrapper {
    int magic, version;
    const unsigned char* data;
    void* unused;
};
struct FatBinaryHeader {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;  // behind the header
};

// The texts in a fat binary, each of which starts with .version and ends with a zero.
std::vector<std::string> texts_of(const FatBinaryWrapper& wrapper) {
    FatBinaryHeader header;
    std::memcpy(&header, wrapper.data, sizeof(header));
    std::vector<std::string> found;
    if (header.magic != 0xBA55ED50u)
        return found;
    const std::string all(reinterpret_cast<const char*>(wrapper.data) + header.header_bytes,
                          header.bytes);
    for (size_t start = all.find(".version"); start != std::string::npos;) {
        const size_t end = all.find('\0', start);
        found.push_back(all.substr(start, end - start));
        start = end == std::string::npos ? end : all.find(".version", end);
    }
    return found;
}

int architecture_of(const std::string& text) {
    const std::string mark = ".target sm_";
    const size_t start = text.find(mark);
    return start == std::string::npos ? 0 : std::stoi(text.substr(start + mark.size()));
}

}  // namespace

Unit::Unit(const void* fat_binary_wrapper) {
    for (const std::string& text :
         texts_of(*static_cast<const FatBinaryWrapper*>(fat_binary_wrapper)))
        images_[architecture_of(text)].text = text;
}

const Module* Unit::module_for(int capability) {
    auto next = images_.upper_bound(capability);
    if (next == images_.begin())
        return nullptr;
    Image& image = (--next)->second;
    if (!image.module) {
        const auto& edit = images().edit;
        image.module = std::make_unique<Module>(edit ? edit(image.text) : image.text);
    }
    return image.module.get();
}

void Unit::forget() {
    for (auto& entry : images_)
        entry.second.module.reset();
}

Images& images() {
    static Images all;
    return all;
}

void forget_modules() {
    for (auto& unit : images().units)
        unit->forget();
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const auto& entry : images().functions)
        names.push_back(entry.second.name);
    std::sort(names.begin(), names.end());
    return names;
}

}  // namespace ptx

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
    ptx::images().units.push_back(std::make_unique<ptx::Unit>(wrapper));
    return reinterpret_cast<void**>(ptx::images().units.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

// The remaining arguments describe what this project's kernels have none of.
void __cudaRegisterFunction(void** unit, const char* host, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
    ptx::images().functions[host] = {reinterpret_cast<ptx::Unit*>(unit), name};
}

}  // extern "C"
