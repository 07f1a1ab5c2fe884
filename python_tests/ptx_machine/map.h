// Executors of instructions that compute each lane's result from that lane's operands.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "ptx_machine/state.h"

namespace ptx {

// kFunction: a function of float, double or integers of 32 or 64 bits; a bool result is a
// predicate. Registers of 16 bits are held in 32 with zeros above. Lanes that are not active
// compute on whatever is there, and their results are dropped.
template <auto kFunction>
struct Map;

template <typename R, typename... A, R (*kFunction)(A...)>
struct Map<kFunction> {
    static void execute(Warp& warp, const Instruction& i) {
        run(warp, i, std::index_sequence_for<A...>());
    }

  private:
    template <size_t... kIndex>
    static void run(Warp& warp, const Instruction& i, std::index_sequence<kIndex...>) {
        const std::tuple<const A*...> in{warp.in<A>(i.op[1 + kIndex])...};
        if constexpr (std::is_same_v<R, bool>) {
            uint32_t bits = 0;
            for (int lane = 0; lane < kLanes; ++lane)
                bits |= static_cast<uint32_t>(kFunction(std::get<kIndex>(in)[lane]...)) << lane;
            warp.set_predicate(i.op[0], bits);
        } else {
            alignas(64) R result[kLanes];
            for (int lane = 0; lane < kLanes; ++lane)
                result[lane] = kFunction(std::get<kIndex>(in)[lane]...);
            warp.out(i.op[0], result);
        }
    }
};

template <auto kFunction>
constexpr Execute map = &Map<kFunction>::execute;

}  // namespace ptx
