// A persistent team of threads that runs one job at a time, with a barrier between its parts.
#pragma once

#include <sys/types.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace ridgeline {

// Threads this process may use: the smaller of its affinity mask and its cgroup's CPU quota.
int available_threads();

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Whether this is a fork of the process that made the team: its threads are not here.
  bool forked() const;

  // Calls job(thread) once on every thread, the caller being thread 0, and returns when all are done. Throws in a fork.
  // Workers spin for a short while after a job, then sleep: an idle team uses no CPU.
  void run(const std::function<void(int)>& job);

  // Inside a job: waits until every thread of the team is here.
  void barrier();

  // Whether there are so many rows that every thread gets whole blocks of them.
  bool has_blocks(int rows) const { return rows >= kRowBlock * size_; }
  static constexpr int kRowBlock = 64;

  // Rows of a block: at most kRowBlock, and so many that all threads get the same number of blocks, an even one.
  int row_block(int rows) const {
    const int turns = 2 * size_, blocks = (rows + turns * kRowBlock - 1) / (turns * kRowBlock) * turns;
    return (rows + blocks - 1) / blocks;
  }

  // The thread that a row belongs to in every operator of a step, so that rows stay in its caches (but for what others
  // take over in `balance`). Blocks are dealt out to and fro, 0 1 1 0 0 1 ..., which also evens out causal attention,
  // where later rows cost more.
  int owner(int row, int rows) const {
    if (!has_blocks(rows)) return (int)(((long)(row + 1) * size_ - 1) / rows);
    return dealt(row / row_block(rows));
  }

  // Inside a job: body(begin, end) for each range of the rows that belong to `thread`.
  template <class F>
  void own(int thread, int rows, F&& body) const {
    if (!has_blocks(rows)) {
      int begin = (int)((long)rows * thread / size_), end = (int)((long)rows * (thread + 1) / size_);
      if (begin < end) body(begin, end);
      return;
    }
    const int block = row_block(rows);
    for (int i = 0, row = 0; row < rows; i++, row += block)
      if (dealt(i) == thread) body(row, row + block < rows ? row + block : rows);
  }

  // Inside a job, once: task indices 0 .. count-1 shared out among the threads as they become free, `chunk` at a time.
  template <class F>
  void share(int count, int chunk, F&& body) {
    for (int begin; (begin = cursor_.fetch_add(chunk, std::memory_order_relaxed)) < count;)
      body(begin, begin + chunk < count ? begin + chunk : count);
  }

  // Inside a job: body(t, i) once for each item 0 .. items(t)-1 of every thread t. A thread does its own from the first
  // on, then what the next few threads have left, from the last back: cores do not keep step, and all wait for the
  // slowest. All threads make the same calls, counted from 0 in `call`, with a barrier between two.
  template <class Items, class F>
  void balance(int call, int thread, Items&& items, F&& body) {
    pool(call + 1, thread).reset();  // nobody uses it yet, and everyone has passed a barrier since call - 2
    Pool& own = pool(call, thread);
    const int count = items(thread);
    for (int i = 0; own.take(count); i++) body(thread, i);
    for (int t = thread + 1; t < thread + std::min(size_, 1 + kHelped); t++) {
      const int other = t % size_, most = items(other);
      Pool& left = pool(call, other);
      while (left.take(most)) body(other, most - 1 - left.stolen.fetch_add(1, std::memory_order_relaxed));
    }
  }

 private:
  static constexpr int kHelped = 4;  // a look at every other's counter, a line of another core, would grow with the team

  int dealt(int block) const {
    const int round = block / size_, place = block % size_;
    return round % 2 ? size_ - 1 - place : place;
  }

  // How many of a thread's items are taken, and how many of these by others: its own are the first, others' the last.
  struct alignas(64) Pool {
    std::atomic<int> taken{0}, stolen{0};
    bool take(int count) {
      return taken.load(std::memory_order_relaxed) < count && taken.fetch_add(1, std::memory_order_relaxed) < count;
    }
    void reset() {
      taken.store(0, std::memory_order_relaxed);
      stolen.store(0, std::memory_order_relaxed);
    }
  };
  Pool& pool(int call, int thread) { return pools_[(size_t)(3 * thread + call % 3)]; }

  void work(int thread);
  void dismiss();

  const int size_;
  const pid_t process_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  std::unique_ptr<Pool[]> pools_;  // [threads][3 calls]
  alignas(64) std::atomic<int> cursor_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};    // counts jobs; workers wait for it to move
  alignas(64) std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<int> sleeping_here_{0};  // threads asleep in a barrier
  std::atomic<bool> stop_{false};
};

}  // namespace ridgeline
