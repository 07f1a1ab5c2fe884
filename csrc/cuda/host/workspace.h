// The scratch memory of a call, one allocation by the caller.
#pragma once

#include <cstdint>

namespace afa {

// Hands out scratch memory; with a null base it only counts.
class Workspace {
  public:
    explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
    // Null for nothing: behind the last piece is memory of others.
    template <typename T>
    T* take(int64_t count) {
        char* piece = base_ && count > 0 ? base_ + used_ : nullptr;
        used_ +=
            (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
        return reinterpret_cast<T*>(piece);
    }
    int64_t used() const { return used_; }

  private:
    static constexpr int64_t kAlignment = 256;  // of each piece
    char* base_;
    int64_t used_ = 0;
};

}  // namespace afa
