// From a mangled kernel name and its argument to the memory that it may touch: the list that the
// emulator uses too.
#include <stdexcept>

#include "emulator/buffers.h"
#include "ptx_machine/cuda/runtime.h"

namespace ptx {
namespace {

template <typename Params, int R>
std::vector<Allocation> listed(const void* parameters) {
    std::vector<Allocation> all;
    for (const simt::Buffer& b : afa::emulated_buffers<R>(*static_cast<const Params*>(parameters)))
        all.push_back({reinterpret_cast<uint64_t>(b.data), b.bytes, b.writable, b.name});
    return all;
}

template <typename Params>
std::vector<Allocation> of_rank(int rank, const void* parameters) {
    switch (rank) {
    case 16:
        return listed<Params, 16>(parameters);
    case 32:
        return listed<Params, 32>(parameters);
    case 64:
        return listed<Params, 64>(parameters);
    }
    throw std::runtime_error("no kernel has rank class " + std::to_string(rank));
}

}  // namespace

std::vector<Allocation> buffers_of(const std::string& name, const void* parameters) {
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    const size_t mark = name.find("ELi");  // the template argument R
    const int rank = mark == std::string::npos ? 0 : std::stoi(name.substr(mark + 3));
    if (has("14forward_kernelI") || has("13expand_kernelI"))
        return of_rank<afa::ForwardParams>(rank, parameters);
    if (has("14project_kernelI") || has("17project_dy_kernelI"))
        return of_rank<afa::ProjectParams>(rank, parameters);
    if (has("9db_kernelI"))
        return of_rank<afa::OuterPass>(rank, parameters);
    if (has("8x_kernelI"))
        return of_rank<afa::OuterParams>(rank, parameters);
    if (has("9dy_kernelI"))
        return of_rank<afa::DyParams>(rank, parameters);
    if (has("11pack_kernelI"))
        return listed<afa::PackParams, 0>(parameters);
    if (has("13reduce_kernelI"))
        return listed<afa::ReduceParams, 0>(parameters);
    if (has("22primitive_check_kernelI"))
        return listed<afa::PrimitiveCheckParams, 0>(parameters);
    throw std::runtime_error("the buffers of kernel " + name + " are not known");
}

}  // namespace ptx
