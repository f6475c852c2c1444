// Large zeroed memory straight from the kernel: untouched pages cost nothing, huge pages where offered.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "packed.h"

namespace ridgeline {

class Region {
 public:
  Region() = default;
  explicit Region(size_t bytes) : bytes_(round_up(bytes ? bytes : 1, 4096)) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = (uint8_t*)p;
    madvise(p, bytes_, MADV_HUGEPAGE);  // advice: refused where the system has none
  }
  ~Region() {
    if (data_) munmap(data_, bytes_);
  }
  Region(Region&& other) noexcept { *this = std::move(other); }
  Region& operator=(Region&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Pages of a region that is used from its start on, had from the kernel before they are needed. In a virtual machine a
// page that no process has had before can cost milliseconds, which a lone prompt would wait for: its cache blocks are
// all new. As many bytes are kept ready as are in use, as in a growing vector: at most kMost, at least `least`.
class PagesAhead {
 public:
  // Before used(); until then extend() has nothing to do.
  void watch(const Region& region, size_t least) {
    data_ = region.data();
    size_ = region.size();
    least_ = least;
  }

  // The first `bytes` of the region are in use from now on.
  void used(size_t bytes) {
    const size_t wanted = std::min(size_, bytes + std::max(least_, std::min(bytes, kMost)));
    if (wanted > wanted_.load(std::memory_order_relaxed)) wanted_.store(wanted, std::memory_order_release);
  }

  // Has one huge page more ready; false when there are enough, or the kernel (before Linux 5.14) cannot.
  bool extend() {
    const size_t wanted = wanted_.load(std::memory_order_acquire);
    if (ready_ >= wanted) return false;
    const size_t upto = std::min(size_, round_up((uintptr_t)data_ + ready_ + 1, kHugePage) - (uintptr_t)data_);
    if (madvise(data_ + ready_, upto - ready_, kPopulateWrite) != 0) {
      ready_ = SIZE_MAX;
      return false;
    }
    ready_ = upto;
    return ready_ < wanted;
  }

 private:
  static constexpr size_t kMost = (size_t)128 << 20;
  static constexpr size_t kHugePage = (size_t)2 << 20;
  static constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack; contents stay

  uint8_t* data_ = nullptr;
  size_t size_ = 0, least_ = 0, ready_ = 0;
  std::atomic<size_t> wanted_{0};
};

}  // namespace ridgeline
