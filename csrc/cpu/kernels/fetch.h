// Memory to bring into the caches while a product computes, some lines with each group of K.
#pragma once

#include "isa/isa.h"

namespace ridgeline::RL_ISA {

// The rest of a run of memory, then runs that start `offset` behind blocks[0], blocks[1] and so on. Runs are looked up
// as they come: a list of lines, made for the purpose, would be stored behind a product's results and wait for them.
struct Runs {
  const uint8_t* at = nullptr;
  int left = 0;  // groups of K until the first run ends
  const uint8_t* const* blocks = nullptr;
  size_t offset = 0;
  int each = 0;    // groups that every other run lasts for
  int groups = 0;  // in all
};

class Fetcher {
 public:
  explicit Fetcher(const Runs& runs) : runs_(runs) {}

  // Fetches the next `lines`, unless all runs are over.
  inline __attribute__((always_inline)) void fetch(int lines) {
    if (runs_.groups == 0) return;
    runs_.groups--;
    if (runs_.left == 0) runs_.at = *runs_.blocks++ + runs_.offset, runs_.left = runs_.each;
    runs_.left--;
RL_UNROLL
    for (int i = 0; i < lines; i++) prefetch(runs_.at + 64 * i);
    runs_.at += 64 * lines;
  }

 private:
  Runs runs_;
};

}  // namespace ridgeline::RL_ISA
