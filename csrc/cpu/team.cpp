#include "team.h"

#include <sched.h>
#include <unistd.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

namespace ridgeline {
namespace {

constexpr int kSpins = 1024;  // about 20 microseconds
constexpr int kYields = 64;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// While a job runs on x86: round to nearest even and flush denormals, whatever the calling program has set. A
// denormal costs some processors a hundred cycles, and no kernel needs one. Elsewhere the program's mode stays.
class FloatMode {
 public:
#if defined(__SSE__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8040); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FloatMode() {}
#endif
};

int cgroup_limit() {
  double quota = 0, period = 0;
  std::string word;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> word >> period) {
    quota = word == "max" ? 0 : std::strtod(word.c_str(), nullptr);
  } else {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? std::max(1, (int)std::ceil(quota / period)) : 1 << 20;
}

}  // namespace

int available_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int allowed = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::max(1, std::min(allowed, cgroup_limit()));
}

Team::Team(int size) : size_(std::max(1, size)), process_(getpid()), pools_(std::make_unique<Pool[]>(3 * (size_t)size_)) {
  try {
    for (int t = 1; t < size_; t++) threads_.emplace_back([this, t] { work(t); });
  } catch (...) {
    dismiss();
    throw;
  }
}

Team::~Team() {
  if (forked()) {
    new std::vector<std::thread>(std::move(threads_));  // neither joined, for ever, nor destroyed, which would terminate
  } else {
    dismiss();
  }
}

bool Team::forked() const { return getpid() != process_; }

void Team::dismiss() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& t : threads_) t.join();
}

void Team::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    // Half a millisecond covers the caller's work between two steps, a stream's included; then sleep.
    auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(500);
    while (epoch_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
      for (int i = 0; i < 16; i++) relax();
    if (epoch_.load(std::memory_order_acquire) == seen) {
      sleeping_.fetch_add(1);
      epoch_.wait(seen);
      sleeping_.fetch_sub(1);
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    FloatMode mode;
    (*job_)(thread);
    barrier();
  }
}

void Team::run(const std::function<void(int)>& job) {
  if (forked()) throw std::runtime_error("the process has forked and the threads are not here");
  job_ = &job;
  cursor_.store(0);
  for (int t = 0; t < size_; t++) pool(0, t).reset();
  epoch_.fetch_add(1);
  if (sleeping_.load() > 0) epoch_.notify_all();
  FloatMode mode;
  job(0);
  barrier();
}

void Team::barrier() {
  if (size_ == 1) return;
  uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1);  // sequentially consistent, like the next load: no sleeper is missed
    if (sleeping_here_.load() > 0) generation_.notify_all();
    return;
  }
  auto passed = [&] { return generation_.load(std::memory_order_acquire) != generation; };
  for (int i = 0; i < kSpins; i++) {
    if (passed()) return;
    relax();
  }
  // The thread waited for may be queueing for this very core: give it away, and at last sleep.
  for (int i = 0; i < kYields; i++) {
    if (passed()) return;
    sched_yield();
  }
  sleeping_here_.fetch_add(1);
  generation_.wait(generation);
  sleeping_here_.fetch_sub(1);
}

}  // namespace ridgeline
