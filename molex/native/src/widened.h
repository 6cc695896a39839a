// Products with weights in 16, 8 or 4 bits where the CPU has none for them: weights become float32, for few rows in
// registers, else in the first cache, as many inputs at a time as share a scale in 4 bits.
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

// Input i of each column as float32, without its scale.
template <int64_t kBits>
Wide wide(Columns columns, int64_t i) {
  if constexpr (kBits == 16)
    return std::bit_cast<Wide>(i == 0 ? columns << 16 : columns & 0xffff0000u);
  else
    return numbers<kBits>(columns, i);
}

// y [inputs, kTile] = weights [inputs, kTile] of a tile in kBits, without their scales; of bfloat16 the values.
template <int64_t kBits>
void widen_weights(const void* weights, int64_t inputs, float* y) {
  constexpr int64_t kTogether = 32 / kBits;
  const auto* w = static_cast<const uint32_t*>(weights);
  for (int64_t k = 0; k < inputs; k += kTogether, w += kTile)
    for (int64_t j = 0; j < kTile; j += kColumns) {
      const Columns columns = *reinterpret_cast<const Columns*>(w + j);
      for (int64_t i = 0; i < kTogether; ++i)
        *reinterpret_cast<Wide*>(y + (k + i) * kTile + j) = wide<kBits>(columns, i);
    }
}

// Multiply rows y [rows, kTile] by the scales of their columns.
inline void scale_columns(const float* scales, int64_t rows, float* y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < kTile; ++j) y[r * kTile + j] *= scales[j];
}

// The most rows whose sums fit the registers beside the weights. For more, weights are written to the first cache.
constexpr int64_t kRowsInRegisters = 4;

// c [kRows, kTile] = x · W for rows x, `stride` apart, and the weights as above.
template <int64_t kBits, int64_t kRows>
void multiply_in_registers(const float* x, int64_t stride, const void* weights, int64_t inputs, float* c) {
  constexpr int64_t kTogether = 32 / kBits, kVectors = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
  for (int64_t j = 0; j < kTile; j += kVectors * kColumns) {
    const auto* w = static_cast<const uint32_t*>(weights) + j;
    Wide sums[kRows][kVectors] = {};
    for (int64_t k = 0; k < inputs; k += kTogether, w += kTile)
      for (int64_t v = 0; v < kVectors; ++v) {
        const Columns columns = *reinterpret_cast<const Columns*>(w + v * kColumns);
        for (int64_t i = 0; i < kTogether; ++i) {
          const Wide values = wide<kBits>(columns, i);
          for (int64_t r = 0; r < kRows; ++r) sums[r][v] += values * x[r * stride + k + i];
        }
      }
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t v = 0; v < kVectors; ++v)
        *reinterpret_cast<Wide*>(c + r * kTile + j + v * kColumns) = sums[r][v];
  }
}

// c [rows, kTile] = x · W for rows x of `inputs` values, `stride` apart, and a tile of weights in kBits. `scales` are
// those of weights in 4 bits, [groups, kTile]; else there are none.
template <int64_t kBits>
void product_of_widened(const float* x, int64_t stride, int64_t rows, int64_t inputs, const void* weights,
                        const at::BFloat16* scales, float* c) {
  alignas(64) thread_local static float floats[kGroup * kTile];
  const auto* w = static_cast<const char*>(weights);
  for (int64_t first = 0; first < inputs; first += kGroup, w += kGroup * kTile * kBits / 8) {
    const int64_t count = std::min(kGroup, inputs - first);
    float factors[kTile];
    if (scales) std::copy_n(scales + first / kGroup * kTile, kTile, factors);
    if (rows <= kRowsInRegisters) {
      float sums[kRowsInRegisters * kTile];
      in_fours(rows, [&]<int64_t kRows>(int64_t r) {
        multiply_in_registers<kBits, kRows>(x + r * stride + first, stride, w, count, sums + r * kTile);
      });
      if (scales) scale_columns(factors, rows, sums);
      for (int64_t i = 0; i < rows * kTile; ++i) c[i] = first > 0 ? c[i] + sums[i] : sums[i];
    } else {
      widen_weights<kBits>(w, count, floats);
      if (scales) scale_columns(factors, count, floats);
      at::native::cpublas::brgemm(padded_rows(rows), kTile, count, stride, kTile, kTile, first > 0, x + first, floats,
                                  c);
    }
  }
}

}  // namespace molex
