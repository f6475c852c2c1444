#include "memory.h"

#include <sched.h>

#include <algorithm>
#include <system_error>

namespace ridgeline {
namespace {

constexpr size_t kMost = (size_t)128 << 20;
constexpr size_t kHugePage = (size_t)2 << 20;
constexpr size_t kStop = SIZE_MAX;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack; contents stay

}  // namespace

PagesAhead::~PagesAhead() {
  if (!thread_.joinable()) return;
  wanted_.store(kStop);
  wanted_.notify_one();
  thread_.join();
}

void PagesAhead::begin(size_t bytes) {
  running_.store(true);
  const size_t wanted = std::min(size_, bytes + std::max(least_, std::min(bytes, kMost)));
  if (wanted <= asked_) return;
  asked_ = wanted;
  wanted_.store(wanted);
  if (thread_.joinable()) {
    wanted_.notify_one();
    return;
  }
  try {
    thread_ = std::thread([this] { work(); });
  } catch (const std::system_error&) {  // pages come as they are touched, then
    asked_ = size_;
  }
}

void PagesAhead::end() {
  ended_.store(Clock::now());
  running_.store(false);
}

bool PagesAhead::quiet() const { return !running_.load() && Clock::now() - ended_.load() >= kQuiet; }

void PagesAhead::work() {
  const sched_param none{};
  if (sched_setscheduler(0, SCHED_IDLE, &none) != 0) return;
  size_t ready = 0;
  for (size_t wanted; (wanted = wanted_.load()) != kStop;) {
    if (ready >= wanted) {
      wanted_.wait(wanted);
    } else if (!quiet()) {
      std::this_thread::sleep_for(kQuiet);
    } else {
      const size_t upto = std::min(size_, round_up((uintptr_t)data_ + ready + 1, kHugePage) - (uintptr_t)data_);
      if (madvise(data_ + ready, upto - ready, kPopulateWrite) != 0) return;  // before Linux 5.14
      ready = upto;
    }
  }
}

}  // namespace ridgeline
