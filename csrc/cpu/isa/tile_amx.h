// AMX: eight tile registers of up to 16 rows of 64 bytes (Intel 64 and IA-32 manual, volume 1, chapter 18).
//
// Written as inline assembly: GCC 12's own intrinsics hide from the compiler what they read and write, so that it may
// drop or move stores. Here a store names the array it fills. A load does not say what it reads, since naming memory
// of unknown extent keeps a kernel's accumulators out of its registers: call tile_fence() between the stores that
// prepare a tile and the loads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ridgeline::RL_ISA {

// Shapes of the eight tiles: rows, and bytes in a row.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void shape(int tile, int row_count, int bytes) {
    rows[tile] = (uint8_t)row_count;
    row_bytes[tile] = (uint16_t)bytes;
  }
};

inline void tile_configure(const TileConfig& c) { asm volatile("ldtilecfg %0" ::"m"(c) : "memory"); }
// Gives the tile registers back: a thread that holds them pays for them at every context switch.
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

// Every store before it has happened for the loads behind it, as far as the compiler is concerned.
inline void tile_fence() { asm volatile("" ::: "memory"); }

template <int T>
inline __attribute__((always_inline)) void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline __attribute__((always_inline)) void tile_load(const void* rows, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(T));
}
// Rows of 64 bytes, one after another.
template <int T, class Sums>
inline __attribute__((always_inline)) void tile_store(Sums (&rows)[256]) {
  static_assert(sizeof rows == 1024);
  asm volatile("tilestored %%tmm%c2, (%1,%3,1)" : "=m"(rows) : "r"(rows), "i"(T), "r"((size_t)64));
}
// C[m][n] += sum over k of A[m][k] * B[k][n]: signed by unsigned bytes, exactly; k in quads along B's rows.
template <int C, int A, int B>
inline __attribute__((always_inline)) void tile_dot_s8u8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// The same, unsigned by signed.
template <int C, int A, int B>
inline __attribute__((always_inline)) void tile_dot_u8s8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// The same for bf16 into fp32, k in pairs. Every element's sum is in one fixed order, whatever the rows beside it.
template <int C, int A, int B>
inline __attribute__((always_inline)) void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace ridgeline::RL_ISA
