// Which of the kernels this processor can run, and how it likes memory to be fetched.
#include "step.h"

#if defined(RL_HAVE_X86_64)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ridgeline {

const Kernels* kernels_generic_table();

#if defined(RL_HAVE_X86_64)
namespace {

bool avx2_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
}

bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// AMX TILE, INT8 and BF16, and the operating system's leave to use the tile registers, which Linux wants asked for
// once in a process (ARCH_REQ_XCOMP_PERM, state component 18).
bool amx_supported() {
  unsigned a, b, c, d;
  if (!avx512_supported() || !__builtin_cpu_supports("avx512vbmi") || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
    return false;
  const unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // amx-bf16, amx-tile, amx-int8
  return (d & needed) == needed && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

Fetching fetching_here() {
  __builtin_cpu_init();
  Fetching f;
  if (__builtin_cpu_is("intel")) {
    f.stream_second_level = true, f.two_streams = false, f.stream_ahead = 16384;
  } else if (__builtin_cpu_is("amd") && __builtin_cpu_is("amdfam19h") && avx512_supported()) {  // Zen 4
    f.second_level = f.stream_second_level = true, f.two_streams = f.whole_panels = false;
    f.stream_ahead = 1024, f.ahead = 8192, f.busy_rows = 4, f.few_lines = 12;
  }
  return f;
}

}  // namespace

const Fetching fetching = fetching_here();
const bool adds_beside_products = __builtin_cpu_is("amd") && avx512_supported();  // Zen 4 and 5: four pipes, two multiply

const Kernels* kernels_avx2_table();
const Kernels* kernels_avx512_table();
const Kernels* kernels_amx_table();

const Kernels* kernels_amx() {
  static const bool supported = amx_supported();
  return supported ? kernels_amx_table() : nullptr;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> all;
  if (kernels_amx()) all.push_back(kernels_amx());
  if (avx512_supported()) all.push_back(kernels_avx512_table());
  if (avx2_supported()) all.push_back(kernels_avx2_table());
  all.push_back(kernels_generic_table());
  return all;
}
#else
const Fetching fetching{};
const bool adds_beside_products = false;
const Kernels* kernels_amx() { return nullptr; }
std::vector<const Kernels*> available_kernels() { return {kernels_generic_table()}; }
#endif

}  // namespace ridgeline
