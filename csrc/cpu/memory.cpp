#include "memory.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

namespace ridgeline {
namespace {

constexpr size_t kMost = (size_t)128 << 20;
constexpr size_t kHugePage = (size_t)2 << 20;
constexpr auto kQuiet = std::chrono::milliseconds(20);
constexpr int kNice = 10;  // of 19: a step goes first, and what holds the process's memory map is not left waiting
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack; contents stay

}  // namespace

PagesAhead::~PagesAhead() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void PagesAhead::begin(size_t bytes) {
  std::lock_guard lock(mutex_);
  running_ = true;
  wanted_ = std::max(wanted_, std::min(size_, bytes + std::max(least_, std::min(bytes, kMost))));
  if (thread_.joinable() || ready_ >= wanted_) return;
  try {
    thread_ = std::thread([this] { work(); });
  } catch (const std::system_error&) {
    ready_ = SIZE_MAX;  // pages come as they are touched, then
  }
}

void PagesAhead::end() {
  std::lock_guard lock(mutex_);
  running_ = false;
  ended_ = Clock::now();
  if (waits_for_end_ && ready_ < wanted_) changed_.notify_one();
}

void PagesAhead::work() {
  setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), kNice);  // on Linux a thread's own; nothing hangs on it
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (running_ || ready_ >= wanted_) {
      waits_for_end_ = true;
      changed_.wait(lock);
      waits_for_end_ = false;
    } else if (const auto due = ended_ + kQuiet; Clock::now() < due) {
      changed_.wait_until(lock, due);
    } else {
      const size_t upto = std::min(size_, round_up((uintptr_t)data_ + ready_ + 1, kHugePage) - (uintptr_t)data_);
      lock.unlock();
      const bool done = madvise(data_ + ready_, upto - ready_, kPopulateWrite) == 0;
      lock.lock();
      ready_ = done ? upto : SIZE_MAX;  // no memory is left, or this is before Linux 5.14
    }
  }
}

}  // namespace ridgeline
