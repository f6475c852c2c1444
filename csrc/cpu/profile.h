// Where the time of steps goes: every thread notes how long it works on each operator, thread 0 also how long the
// operator takes with the wait for the others, and the notes are added up when the step has ended.
#pragma once

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace ridgeline {

// Seconds of a clock that never goes back.
inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The same in units of the processor's own counter, which is read in a third of the time: a step reads it twice for
// each operator on every thread. It runs at one rate whatever the clock frequency is.
inline int64_t ticks() {
#if defined(__x86_64__)
  return (int64_t)__rdtsc();
#elif defined(__aarch64__)
  int64_t count;
  asm volatile("mrs %0, cntvct_el0" : "=r"(count));
  return count;
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// One part of a step, over all steps profiled.
struct ProfileRow {
  int64_t calls = 0;
  int64_t wall = 0;     // ticks on thread 0, its wait at the barrier behind the part included
  int64_t busy = 0;     // of all threads together, without that wait
  int64_t longest = 0;  // of the busiest thread in each call
};

class Profile {
  // Of one thread in this step: when it began, and what it did by row.
  struct alignas(64) Notes {
    int64_t started = 0;
    std::vector<int64_t> busy;
  };
  // One moment on both clocks.
  struct Instant {
    int64_t ticks = 0;
    double seconds = 0;
  };

 public:
  // Rows that follow those of the operators.
  enum Extra : size_t { Sample, Copies, Wake, Prepare, Settle, kExtras };
  static const char* name(size_t extra) {
    static const char* names[kExtras] = {"sample", "copy_blocks", "wake", "prepare", "settle"};
    return names[extra];
  }

  bool on = false;

  // Forgets everything; counts for a plan of so many operators from here on.
  void reset(size_t ops, int threads) {
    ops_ = ops;
    rows_.assign(ops + kExtras, {});
    wall_.assign(ops + kExtras, 0);
    threads_.assign((size_t)threads, {});
    for (Notes& notes : threads_) notes.busy.assign(ops + kExtras, 0);
    steps_ = total_ = 0;
    reset_ = instant();
  }
  // The longer since the reset, the more exact.
  double seconds_per_tick() const {
    const Instant t = instant();
    return t.ticks > reset_.ticks ? (t.seconds - reset_.seconds) / (double)(t.ticks - reset_.ticks) : 0;
  }

  // On the calling thread: a step begins, or the half of one that samples masked rows.
  void begin() { began_ = ticks(); }
  // The team is about to be called; what came before was preparation.
  void call() {
    called_ = ticks();
    rows_[ops_ + Prepare].wall += called_ - began_;
  }

  // A thread's clock inside a job. A part ends with `worked`, and then `waited` where the threads wait for each other.
  class Lap {
   public:
    Lap(Profile& profile, int thread)
        : notes_(profile.threads_[(size_t)thread]),
          wall_(thread == 0 ? profile.wall_.data() : nullptr),
          last_(ticks()) {
      notes_.started = last_;
    }
    void worked(size_t row) {
      const int64_t spent = lap();
      notes_.busy[row] = spent;
      if (wall_) wall_[row] = spent;
    }
    void waited(size_t row) {
      const int64_t spent = lap();
      if (wall_) wall_[row] += spent;
    }

   private:
    int64_t lap() {
      const int64_t t = ticks(), spent = t - last_;
      last_ = t;
      return spent;
    }
    Notes& notes_;
    int64_t* wall_;
    int64_t last_;
  };

  // The job has returned, having run operators [0, ops), `copied` blocks before them, and sampled: adds it all up.
  void add(size_t ops, bool copied) {
    ended_ = ticks();
    int64_t inside = 0, late = 0;
    for (size_t i = 0; i < ops; i++) inside += wall_[i];
    if (copied) inside += wall_[ops_ + Copies];
    // All else in the job: sampling, and the team's own barrier at its end.
    wall_[ops_ + Sample] = ended_ - threads_[0].started - inside;
    // Until every thread is awake, time at the first barrier is not that of the operator before it.
    for (const Notes& notes : threads_) late = std::max(late, notes.started - threads_[0].started);
    int64_t& first = wall_[copied ? ops_ + Copies : ops > 0 ? 0 : ops_ + Sample];
    late = std::min(late, first);
    first -= late;
    for (size_t i = 0; i < ops; i++) add_row(i);
    if (copied) add_row(ops_ + Copies);
    add_row(ops_ + Sample);
    rows_[ops_ + Wake].calls++;
    rows_[ops_ + Wake].wall += late + threads_[0].started - called_;
  }

  // On the calling thread: the step ends, or stops where masked rows wait for their masks.
  void end(bool whole) {
    const int64_t t = ticks();
    rows_[ops_ + Settle].wall += t - ended_;
    total_ += t - began_;
    if (!whole) return;
    steps_++;
    rows_[ops_ + Prepare].calls++;
    rows_[ops_ + Settle].calls++;
  }

  const std::vector<ProfileRow>& rows() const { return rows_; }
  int64_t steps() const { return steps_; }
  int64_t total() const { return total_; }  // ticks
  size_t row(Extra extra) const { return ops_ + extra; }

 private:
  // The closest of a few pairs of readings: the thread may be taken off its core between two.
  static Instant instant() {
    Instant best;
    int64_t apart = INT64_MAX;
    for (int i = 0; i < 5; i++) {
      const int64_t before = ticks();
      const double seconds = now();
      const int64_t after = ticks();
      if (after - before >= apart) continue;
      apart = after - before;
      best = {before + apart / 2, seconds};
    }
    return best;
  }

  void add_row(size_t i) {
    ProfileRow& row = rows_[i];
    int64_t longest = 0;
    for (const Notes& notes : threads_) {
      row.busy += notes.busy[i];
      longest = std::max(longest, notes.busy[i]);
    }
    row.calls++;
    row.wall += wall_[i];
    row.longest += longest;
  }

  size_t ops_ = 0;
  std::vector<ProfileRow> rows_;
  std::vector<int64_t> wall_;  // in this step, by row, of thread 0
  std::vector<Notes> threads_;
  int64_t began_ = 0, called_ = 0, ended_ = 0, total_ = 0, steps_ = 0;
  Instant reset_;
};

}  // namespace ridgeline
