// For building llama.cpp, -include'd into its C++ files: GCC 12's _tile_loadconfig tells the compiler of only the
// first 8 of the 64 bytes it reads, so that the rest of a configuration is never written and AMX code crashes.
#if defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char (*)[64])(config)))
#endif
