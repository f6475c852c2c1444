// Memory to bring into the caches while a product computes, some lines with each group of K.
#pragma once

#include "isa/isa.h"
#include "step.h"

namespace ridgeline::RL_ISA {

// Starts to bring kLines lines into the cache, only into the second level if `second`.
template <int kLines>
inline __attribute__((always_inline)) void prefetch_lines(const uint8_t* p, bool second) {
  asm("" : "+r"(p));  // one pointer for all of them: GCC 12 makes one each, and keeps those wherever there is room
  if (second) {
RL_UNROLL
    for (int i = 0; i < kLines; i++) prefetch_second(p + 64 * i);
  } else {
RL_UNROLL
    for (int i = 0; i < kLines; i++) prefetch(p + 64 * i);
  }
}

// The rest of a run of memory, then runs that start `offset` behind blocks[0], blocks[1] and so on. Runs are looked up
// as they come: a list of lines, made for the purpose, would be stored behind a product's results and wait for them.
struct Runs {
  const uint8_t* at = nullptr;
  int left = 0;  // groups of K until the first run ends
  const uint8_t* const* blocks = nullptr;
  size_t offset = 0;
  int each = 0;    // groups that every other run lasts for
  int groups = 0;  // in all
  int lines = 0;   // fetched with a group
};

class Fetcher {
 public:
  explicit Fetcher(const Runs& runs) : runs_(runs) {}

  // Fetches a group's lines, kUnit at a time, unless all runs are over.
  template <int kUnit>
  inline __attribute__((always_inline)) void fetch() {
    if (runs_.groups == 0) return;
    runs_.groups--;
    if (runs_.left == 0) runs_.at = *runs_.blocks++ + runs_.offset, runs_.left = runs_.each;
    runs_.left--;
    for (int i = 0; i < runs_.lines; i += kUnit, runs_.at += 64 * kUnit) prefetch_lines<kUnit>(runs_.at, second_);
  }

 private:
  Runs runs_;
  const bool second_ = fetching.second_level;
};

}  // namespace ridgeline::RL_ISA
