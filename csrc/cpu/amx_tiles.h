// The tile registers of AMX as a product of bfloat16 pairs uses them: float32 sums [2][2], two left
// operands and two right ones.
//
// A tile of sums has up to 16 rows of 16 columns. A left tile has as many rows of 16 pairs, a right
// one 16 rows of 16 pairs, one row for each pair of the sum, which is how panels lie in memory.
// VITSLIM_EMULATE_AMX chooses plain C++ that computes what the instructions do, on any machine.

#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace vitslim {
namespace {

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_DEPTH = 32;  // numbers of bfloat16
constexpr int64_t TILE_ROW_BYTES = 64;

#if defined(VITSLIM_EMULATE_AMX)

class Tiles {
 public:
  void shape(int64_t top, int64_t bottom) {
    rows_[0] = top;
    rows_[1] = bottom;
    // As the instruction does.
    std::memset(sums_, 0, sizeof(sums_));
  }
  template <int R, int C>
  void clear() {
    std::memset(sums_[R][C], 0, sizeof(sums_[R][C]));
  }
  template <int R>
  void load_left(const void* p, int64_t stride) {
    for (int64_t r = 0; r < rows_[R]; ++r)
      std::memcpy(left_[R][r], static_cast<const char*>(p) + r * stride, TILE_ROW_BYTES);
  }
  template <int C>
  void load_right(const void* p) {
    std::memcpy(right_[C], p, sizeof(right_[C]));
  }
  template <int R, int C>
  void store(float* p, int64_t stride) const {
    for (int64_t r = 0; r < rows_[R]; ++r)
      std::memcpy(reinterpret_cast<char*>(p) + r * stride, sums_[R][C][r], TILE_ROW_BYTES);
  }

  // Two sums begin at zero, of the first numbers of all pairs and of the second ones; then they are
  // added, and that to the tile.
  template <int R, int C>
  void dot() {
    for (int64_t r = 0; r < rows_[R]; ++r) {
      for (int c = 0; c < 16; ++c) {
        float sums[2] = {};
        for (int pair = 0; pair < 16; ++pair)
          for (int i = 0; i < 2; ++i)
            sums[i] = flushed(__builtin_fmaf(widened(left_[R][r][pair][i]),
                                             widened(right_[C][pair][c][i]), sums[i]));
        float& sum = sums_[R][C][r][c];
        sum = flushed(sum + flushed(sums[0] + sums[1]));
      }
    }
  }

 private:
  static float flushed(float x) {
    return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x;
  }
  static float widened(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return flushed(x);
  }

  int64_t rows_[2];
  float sums_[2][2][16][16];
  uint16_t left_[2][16][16][2], right_[2][16][16][2];
};

#else

class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }

  // The rows of the tiles above each other; forgets what the tiles hold.
  void shape(int64_t top, int64_t bottom) {
    if (config_.rows[0] == top && config_.rows[2] == bottom) return;
    const int64_t rows[8] = {top, top, bottom, bottom, top, bottom, TILE_ROWS, TILE_ROWS};
    config_.palette = 1;
    for (int i = 0; i < 8; ++i) {
      // A tile of no rows must have no bytes either.
      config_.rows[i] = uint8_t(rows[i]);
      config_.row_bytes[i] = rows[i] ? TILE_ROW_BYTES : 0;
    }
    written(&config_);
    _tile_loadconfig(&config_);
  }

  // The number of a register is part of the instruction: sums 0 to 3, left 4 and 5, right 6 and 7.
  template <int R, int C>
  INLINE void clear() {
    if constexpr (R == 0 && C == 0) _tile_zero(0);
    if constexpr (R == 0 && C == 1) _tile_zero(1);
    if constexpr (R == 1 && C == 0) _tile_zero(2);
    if constexpr (R == 1 && C == 1) _tile_zero(3);
  }
  template <int R>
  INLINE void load_left(const void* p, int64_t stride) {
    written(p);
    if constexpr (R == 0) _tile_loadd(4, p, stride);
    if constexpr (R == 1) _tile_loadd(5, p, stride);
  }
  template <int C>
  INLINE void load_right(const void* p) {
    written(p);
    if constexpr (C == 0) _tile_loadd(6, p, TILE_ROW_BYTES);
    if constexpr (C == 1) _tile_loadd(7, p, TILE_ROW_BYTES);
  }
  template <int R, int C>
  INLINE void dot() {
    if constexpr (R == 0 && C == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 0 && C == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 1 && C == 0) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R == 1 && C == 1) _tile_dpbf16ps(3, 5, 7);
  }
  template <int R, int C>
  INLINE void store(float* p, int64_t stride) const {
    if constexpr (R == 0 && C == 0) _tile_stored(0, p, stride);
    if constexpr (R == 0 && C == 1) _tile_stored(1, p, stride);
    if constexpr (R == 1 && C == 0) _tile_stored(2, p, stride);
    if constexpr (R == 1 && C == 1) _tile_stored(3, p, stride);
    written(p);
  }

 private:
  // GCC's tile functions do not say what memory they read and write.
  static INLINE void written(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

  struct alignas(64) Config {
    uint8_t palette = 0, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Config) == 64);
  Config config_;
};

#endif

}  // namespace
}  // namespace vitslim
