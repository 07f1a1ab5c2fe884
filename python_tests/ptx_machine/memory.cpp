// ld and st: global, shared, local and parameter memory.
#include "ptx_machine/memory.h"

#include "ptx_machine/forms.h"

namespace ptx {

const Allocation* global_access(Warp& warp, int lane, uint64_t address, uint32_t bytes,
                                Access access) {
    const bool writes = access == Access::store || access == Access::atomic;
    const char* verb = access == Access::atomic ? "updates " : writes ? "stores " : "loads ";
    const Allocation* found = warp.cta->global->find(address, bytes, warp.hint);
    if (writes && found && !found->writable) {
        warp.hint = nullptr;  // another that overlaps may be
        found = warp.cta->global->find(address, bytes, warp.hint);
    }
    if (!found)
        throw Fault{lane, verb + warp.cta->global->describe(address, bytes)};
    if (address % bytes)
        throw Fault{lane, verb + std::to_string(bytes) + " bytes at an address of '" + found->name +
                              "' that is not a multiple of their number"};
    if (writes && !found->writable)
        throw Fault{lane, "stores to '" + found->name + "', which is read only"};
    warp.cta->races->check(warp, lane, *found, address, bytes, access);
    return found;
}

namespace {

uint32_t narrow(uint64_t address, int lane) {
    if (address > 0xFFFFFFFFull)
        throw Fault{lane, "the address of shared or local memory has more than 32 bits"};
    return static_cast<uint32_t>(address);
}

// A register operand of letter X or x: two words.
template <typename T, bool kSigned>
void put(Warp& warp, const uint32_t* op, int lane, const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    const uint64_t wide =
        kSigned
            ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<std::make_signed_t<T>>(value)))
            : static_cast<uint64_t>(value);
    if (static_cast<Width>(op[1]) == Width::bits64)
        reinterpret_cast<uint64_t*>(warp.values + op[0])[lane] = wide;
    else if (static_cast<Width>(op[1]) == Width::bits32)
        warp.values[op[0] + static_cast<uint32_t>(lane)] = static_cast<uint32_t>(wide);
    else
        warp.values[op[0] + static_cast<uint32_t>(lane)] = static_cast<uint32_t>(wide) & 0xFFFF;
}

template <typename T>
void get(const Warp& warp, const uint32_t* op, int lane, unsigned char* to) {
    const T value = static_cast<Width>(op[1]) == Width::bits64
                        ? static_cast<T>(warp.in<uint64_t>(op[0])[lane])
                        : static_cast<T>(warp.in<uint32_t>(op[0])[lane]);
    std::memcpy(to, &value, sizeof(T));
}

constexpr int log2_of(uint32_t bytes) {
    return bytes == 1 ? 0 : bytes == 2 ? 1 : bytes == 4 ? 2 : bytes == 8 ? 3 : 4;
}

template <typename T, int kVector, bool kSigned, Access kAccess>
void load_global(Warp& warp, const Instruction& i) {
    constexpr uint32_t kBytes = sizeof(T) * kVector;
    const Address address(warp, i.op + 2 * kVector);
    uint64_t addresses[kLanes];  // first, since a destination may be the address register
    WarpTraffic traffic;
    for_active(warp, [&](int lane) {
        addresses[lane] = address[lane];
        traffic.add(addresses[lane], global_access(warp, lane, addresses[lane], kBytes, kAccess));
    });
    traffic.count(*warp.cta->global, kBytes, false, warp.cta->traffic, warp.cta->counters);
    for_active(warp, [&](int lane) {
        const auto* from = reinterpret_cast<const unsigned char*>(addresses[lane]);
        for (int k = 0; k < kVector; ++k)
            put<T, kSigned>(warp, i.op + 2 * k, lane, from + k * sizeof(T));
    });
    const uint64_t lanes = static_cast<uint64_t>(__builtin_popcount(warp.active));
    warp.cta->counters.global_loads[log2_of(kBytes)] += lanes;
    warp.cta->counters.global_read_bytes += lanes * kBytes;
}

template <typename T, int kVector>
void store_global(Warp& warp, const Instruction& i) {
    constexpr uint32_t kBytes = sizeof(T) * kVector;
    const Address address(warp, i.op);
    WarpTraffic traffic;
    for_active(warp, [&](int lane) {
        const uint64_t to = address[lane];
        traffic.add(to, global_access(warp, lane, to, kBytes, Access::store));
        for (int k = 0; k < kVector; ++k)
            get<T>(warp, i.op + 3 + 2 * k, lane,
                   reinterpret_cast<unsigned char*>(to) + k * sizeof(T));
    });
    traffic.count(*warp.cta->global, kBytes, true, warp.cta->traffic, warp.cta->counters);
    const uint64_t lanes = static_cast<uint64_t>(__builtin_popcount(warp.active));
    warp.cta->counters.global_stores[log2_of(kBytes)] += lanes;
    warp.cta->counters.global_write_bytes += lanes * kBytes;
}

// Passes over the 32 banks of 4 bytes beyond one per 128 bytes; equal words are read once.
void count_conflicts(Warp& warp, const uint32_t* addresses, uint32_t bytes) {
    const int lanes_per_pass = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    for (int start = 0; start < kLanes; start += lanes_per_pass) {
        uint32_t seen = 0, clean = 1;
        const uint32_t words = bytes <= 4 ? 1 : bytes / 4;
        for (int lane = start; lane < start + lanes_per_pass; ++lane) {
            if (!(warp.active >> lane & 1))
                continue;
            const uint32_t banks = ((1u << words) - 1) << (addresses[lane] / 4 % 32);
            clean &= (seen & banks) == 0;
            seen |= banks;
        }
        if (clean)
            continue;
        uint32_t load[32] = {}, worst = 1;
        uint32_t distinct[32];
        int count = 0;
        for (int lane = start; lane < start + lanes_per_pass; ++lane) {
            if (!(warp.active >> lane & 1))
                continue;
            const uint32_t word = addresses[lane] / 4;
            bool repeated = false;
            for (int k = 0; k < count; ++k)
                repeated |= distinct[k] == word;
            if (repeated)
                continue;
            distinct[count++] = word;
            for (uint32_t k = 0; k < words; ++k)
                worst = std::max(worst, ++load[(word + k) % 32]);
        }
        warp.cta->counters.bank_conflicts += worst - 1;
    }
}

template <typename T, int kVector, bool kSigned>
void load_shared(Warp& warp, const Instruction& i) {
    constexpr uint32_t kBytes = sizeof(T) * kVector;
    const Address address(warp, i.op + 2 * kVector);
    uint32_t addresses[kLanes];
    for_active(warp, [&](int lane) { addresses[lane] = narrow(address[lane], lane); });
    for_active(warp, [&](int lane) {
        const unsigned char* from = warp.cta->shared.read(warp, lane, addresses[lane], kBytes);
        for (int k = 0; k < kVector; ++k)
            put<T, kSigned>(warp, i.op + 2 * k, lane, from + k * sizeof(T));
    });
    count_conflicts(warp, addresses, kBytes);
    warp.cta->counters.shared_read_bytes +=
        static_cast<uint64_t>(__builtin_popcount(warp.active)) * kBytes;
}

template <typename T, int kVector>
void store_shared(Warp& warp, const Instruction& i) {
    constexpr uint32_t kBytes = sizeof(T) * kVector;
    const Address address(warp, i.op);
    uint32_t addresses[kLanes];
    for_active(warp, [&](int lane) {
        addresses[lane] = narrow(address[lane], lane);
        unsigned char data[kBytes];
        for (int k = 0; k < kVector; ++k)
            get<T>(warp, i.op + 3 + 2 * k, lane, data + k * sizeof(T));
        warp.cta->shared.write(warp, lane, addresses[lane], kBytes, data);
    });
    count_conflicts(warp, addresses, kBytes);
    warp.cta->counters.shared_write_bytes +=
        static_cast<uint64_t>(__builtin_popcount(warp.active)) * kBytes;
}

unsigned char* local(Warp& warp, int lane, uint64_t address, uint32_t bytes) {
    const uint64_t offset = address - kLocalBase;
    if (address < kLocalBase || offset + bytes > warp.kernel->local_bytes)
        throw Fault{lane, "accesses " + std::to_string(bytes) +
                              " bytes of local memory at offset " +
                              std::to_string(static_cast<int64_t>(offset)) + ", of which it has " +
                              std::to_string(warp.kernel->local_bytes)};
    if (offset % bytes)
        throw Fault{lane, "accesses local memory at an address that is not a multiple of the size"};
    return warp.local.data() + static_cast<size_t>(lane) * warp.kernel->local_bytes + offset;
}

template <typename T>
void load_local(Warp& warp, const Instruction& i) {
    const Address address(warp, i.op + 2);
    for_active(warp, [&](int lane) {
        put<T, false>(warp, i.op, lane, local(warp, lane, address[lane], sizeof(T)));
    });
}

template <typename T>
void store_local(Warp& warp, const Instruction& i) {
    const Address address(warp, i.op);
    for_active(warp, [&](int lane) {
        get<T>(warp, i.op + 3, lane, local(warp, lane, address[lane], sizeof(T)));
    });
}

template <typename T, int kVector, bool kSigned>
void load_parameter(Warp& warp, const Instruction& i) {
    constexpr uint32_t kBytes = sizeof(T) * kVector;
    const Address address(warp, i.op + 2 * kVector);
    const std::vector<unsigned char>& space = warp.cta->launch->parameters;
    uint64_t addresses[kLanes];
    for_active(warp, [&](int lane) { addresses[lane] = address[lane]; });
    for_active(warp, [&](int lane) {
        const uint64_t from = addresses[lane];
        if (from > space.size() || kBytes > space.size() - from || from % kBytes)
            throw Fault{lane, "loads " + std::to_string(kBytes) + " bytes of the parameters at " +
                                  std::to_string(from) + ", of which there are " +
                                  std::to_string(space.size())};
        for (int k = 0; k < kVector; ++k)
            put<T, kSigned>(warp, i.op + 2 * k, lane, space.data() + from + k * sizeof(T));
    });
}

template <typename T, int kVector, bool kSigned>
void add_vector(Forms& f, const std::string& type) {
    const std::string vector = kVector == 1 ? "" : ".v" + std::to_string(kVector);
    const std::string name = vector + "." + type;
    const auto registers = [](char letter) {
        const std::string all(kVector, letter);
        return kVector == 1 ? all : "{" + all + "}";
    };
    const std::string load = registers('X') + "m", store = "m" + registers('x');
    constexpr uint32_t kBytes = sizeof(T);
    f.add_sized("ld.global" + name, load, kBytes, load_global<T, kVector, kSigned, Access::load>);
    f.add_sized("ld.global.nc" + name, load, kBytes,
                load_global<T, kVector, kSigned, Access::noncoherent_load>);
    f.add_sized("ld.shared" + name, load, kBytes, load_shared<T, kVector, kSigned>);
    f.add_sized("ld.param" + name, load, kBytes, load_parameter<T, kVector, kSigned>);
    f.add_sized("st.global" + name, store, kBytes, store_global<T, kVector>);
    f.add_sized("st.shared" + name, store, kBytes, store_shared<T, kVector>);
}

template <typename T, bool kSigned = false>
void add_type(Forms& f, const std::string& type) {
    add_vector<T, 1, kSigned>(f, type);
    if constexpr (sizeof(T) < 16)
        add_vector<T, 2, kSigned>(f, type);
    if constexpr (sizeof(T) < 8)
        add_vector<T, 4, kSigned>(f, type);
}

}  // namespace

void add_memory_forms(Forms& f) {
    add_type<uint16_t>(f, "b16");
    add_type<uint16_t>(f, "u16");
    add_type<uint32_t>(f, "b32");
    add_type<uint32_t>(f, "u32");
    add_type<uint32_t, true>(f, "s32");
    add_type<uint32_t>(f, "f32");
    add_type<uint64_t>(f, "b64");
    add_type<uint64_t>(f, "u64");
    f.add_sized("ld.param.u8", "Xm", 1, load_parameter<uint8_t, 1, false>);
    f.add_sized("ld.param.v2.u8", "{XX}m", 1, load_parameter<uint8_t, 2, false>);
    f.add_sized("ld.param.v4.u8", "{XXXX}m", 1, load_parameter<uint8_t, 4, false>);
    for (const char* type : {"b32", "u32"}) {
        f.add_sized(std::string("ld.local.") + type, "Xm", 4, load_local<uint32_t>);
        f.add_sized(std::string("st.local.") + type, "mx", 4, store_local<uint32_t>);
    }
}

}  // namespace ptx
