// Large zeroed memory straight from the kernel: untouched pages cost nothing, huge pages where offered.
#pragma once

#include <sys/mman.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
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

// Fetches pages of a region that is used from its start on from the kernel before they are needed. In a virtual machine
// a page that no process has had before can cost milliseconds, which a lone prompt would wait for: its cache blocks are
// all new. As many bytes are kept ready as are in use, as in a growing vector: at most kMost, at least `least`.
//
// A thread of its own does it, a huge page at a time, once no step has run for kQuiet: a core that has a page zeroed is
// lost for as long to a step that begins meanwhile, and a stream of steps would pay for that at each.
class PagesAhead {
 public:
  PagesAhead(const Region& region, size_t least) : data_(region.data()), size_(region.size()), least_(least) {}
  ~PagesAhead();
  PagesAhead(const PagesAhead&) = delete;
  PagesAhead& operator=(const PagesAhead&) = delete;

  // Calls come one at a time. A step begins, with which the first `bytes` of the region are in use; the step has ended.
  void begin(size_t bytes);
  void end();

 private:
  using Clock = std::chrono::steady_clock;

  void work();

  uint8_t* const data_;
  const size_t size_, least_;
  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  size_t wanted_ = 0, ready_ = 0;
  bool running_ = false, waits_for_end_ = false, stop_ = false;
  Clock::time_point ended_;
  std::thread thread_;
};

}  // namespace ridgeline
