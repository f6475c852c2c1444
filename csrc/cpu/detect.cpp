// Whether this processor can run the AVX-512 kernels.
#include "step.h"

namespace ridgeline {

#if defined(RL_HAVE_AVX512)
namespace detail {
bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
}  // namespace detail
const Kernels* kernels_avx512_table();
const Kernels* kernels_avx512() { return detail::avx512_supported() ? kernels_avx512_table() : nullptr; }
#else
const Kernels* kernels_avx512() { return nullptr; }
#endif
const Kernels* kernels_generic_table();
const Kernels* kernels_generic() { return kernels_generic_table(); }

}  // namespace ridgeline
