// Large zeroed memory straight from the kernel: untouched pages cost nothing, huge pages where offered.
#pragma once

#include <sys/mman.h>

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

}  // namespace ridgeline
