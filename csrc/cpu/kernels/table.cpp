#include "kernels/table.h"

namespace ridgeline {

#define RL_CAT2(a, b) a##b
#define RL_CAT(a, b) RL_CAT2(a, b)
#define RL_STR2(a) #a
#define RL_STR(a) RL_STR2(a)

const Kernels* RL_CAT(RL_CAT(kernels_, RL_ISA), _table)() {
  using namespace RL_ISA;
  static const Kernels table = {RL_STR(RL_ISA), embed,     norm,   quantize,    linear, rope_kv,    RL_ISA::attention,
                                RL_ISA::select, elementwise, concat, RL_ISA::sample, read_bytes, spin_ops};
  return &table;
}

}  // namespace ridgeline
