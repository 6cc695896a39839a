// Products with weights in 16, 8 or 4 bits where the CPU has none for them: weights become float32 in the first cache.
// Rows are multiplied as they are, in float32, and not rounded to the type of the weights.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "nibbles.h"
#include "tile.h"

namespace molex {

// Inputs that are made float32 at a time: as many as share a scale in 4 bits.
constexpr int64_t kWidened = kGroup;

// Eight columns of a tile, of each four bytes: two, four or eight inputs.
typedef uint32_t Columns __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Signed __attribute__((vector_size(32)));
typedef float Wide __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kColumns = 8;

// Which bits of four bytes are input i, as the shift that brings their sign to the front.
template <int64_t kBits>
constexpr int shift_of(int64_t i) {
  // In 4 bits the low halves of the bytes come first.
  const int64_t first = kBits == 4 ? i % 4 * 8 + i / 4 * 4 : i * kBits;
  return static_cast<int>(32 - kBits - first);
}

// The whole numbers that input i of each column is.
template <int64_t kBits>
Wide numbers(Columns columns, int64_t i) {
  const Signed front = std::bit_cast<Signed>(columns << shift_of<kBits>(i));
  return __builtin_convertvector(front >> static_cast<int>(32 - kBits), Wide);
}

// y [inputs, kTile] = weights [inputs, kTile] of a tile in kBits, without their scales; of bfloat16 the values.
template <int64_t kBits>
void widen_weights(const void* weights, int64_t inputs, float* y) {
  constexpr int64_t kTogether = 32 / kBits;
  const auto* w = static_cast<const uint32_t*>(weights);
  for (int64_t k = 0; k < inputs; k += kTogether, w += kTile)
    for (int64_t j = 0; j < kTile; j += kColumns) {
      const Columns columns = *reinterpret_cast<const Columns*>(w + j);
      for (int64_t i = 0; i < kTogether; ++i) {
        auto& wide = *reinterpret_cast<Wide*>(y + (k + i) * kTile + j);
        if constexpr (kBits == 16)
          wide = std::bit_cast<Wide>(i == 0 ? columns << 16 : columns & 0xffff0000u);
        else
          wide = numbers<kBits>(columns, i);
      }
    }
}

// Multiply rows y [rows, kTile] by the scales of their columns.
inline void scale_columns(const float* scales, int64_t rows, float* y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < kTile; ++j) y[r * kTile + j] *= scales[j];
}

// c [rows, kTile] = x · W for rows x of `inputs` values, `stride` apart: widen(first, count, y) writes the weights of
// some inputs as float32 [count, kTile].
template <class Widen>
void product_in_steps(const float* x, int64_t stride, int64_t rows, int64_t inputs, const Widen& widen, float* c) {
  alignas(64) thread_local static float w[kWidened * kTile];
  for (int64_t first = 0; first < inputs; first += kWidened) {
    const int64_t count = std::min(kWidened, inputs - first);
    widen(first, count, w);
    at::native::cpublas::brgemm(rows, kTile, count, stride, kTile, kTile, first > 0, x + first, w, c);
  }
}

}  // namespace molex
