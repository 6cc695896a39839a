// Products with weights in 4 bits, which are unpacked in registers on their way from memory.
#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "elementwise.h"
#include "tile.h"

namespace molex {

// Inputs of a column that share a scale.
constexpr int64_t kGroup = 64;
// Inputs that lie together: of each column four bytes, whose low halves are the first four and high halves the others.
constexpr int64_t kNibbleStep = 8;
// Weights from -8 to 7 are kept as 0 to 15.
constexpr int kNibbleZero = 8;

// One tile: weights [inputs / 2, columns], scales [groups, columns] and the sum of what the weights of each column
// stand for [columns].
struct NibbleTile {
  int64_t inputs;
  const uint8_t* weights;
  const float* scales;
  const float* sums;
};

// What is taken off for the zero of a row, of each column: the sum of its weights [tiles · columns].
inline at::Tensor nibble_sums(const at::Tensor& weights, const at::Tensor& scales) {
  const int64_t tiles = weights.size(0), steps = weights.size(1) * 2 / kNibbleStep;
  const at::Tensor bytes = weights.view({tiles, steps, kTile, kNibbleStep / 2});
  const at::Tensor both = bytes.bitwise_and(15).to(at::kFloat) + bytes.bitwise_right_shift(4).to(at::kFloat);
  const at::Tensor sums = (both - 2 * kNibbleZero).sum(3);
  const at::Tensor group = at::arange(steps) * kNibbleStep / kGroup;
  return (sums * scales.index_select(1, group.to(at::kLong))).sum(1).reshape(-1).contiguous();
}

// c [kRows, columns] = x · W for rows x of bytes, `stride` apart.
template <int64_t kRows>
__attribute__((target("avx512vnni"))) void nibble_rows(const uint8_t* x, int64_t stride, const Rounding* roundings,
                                                       const NibbleTile& tile, float* c) {
  const __m512i low_half = _mm512_set1_epi8(15), zero = _mm512_set1_epi8(kNibbleZero);
  std::fill_n(c, kRows * kTile, 0.0f);
  const uint8_t* w = tile.weights;
  const float* scales = tile.scales;
  // The tile behind this one is fetched meanwhile: it is likely the next.
  const int64_t next = tile.inputs / 2 * kTile;
  for (int64_t first = 0; first < tile.inputs; first += kGroup, scales += kTile) {
    const int64_t end = std::min(first + kGroup, tile.inputs);
    __m512i sums[kRows][kTileVectors] = {};
    for (int64_t k = first; k < end; k += kNibbleStep, w += kTile * kNibbleStep / 2) {
      for (int64_t v = 0; v < kTileVectors; ++v) _mm_prefetch(w + next + v * kCacheLine, _MM_HINT_T1);
      for (int64_t v = 0; v < kTileVectors; ++v) {
        const __m512i both = _mm512_loadu_si512(w + v * 64);
        const __m512i low = _mm512_sub_epi8(_mm512_and_si512(both, low_half), zero);
        const __m512i high = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low_half), zero);
        for (int64_t r = 0; r < kRows; ++r) {
          const auto* four = reinterpret_cast<const int32_t*>(x + r * stride + k);
          sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], _mm512_set1_epi32(four[0]), low);
          sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], _mm512_set1_epi32(four[1]), high);
        }
      }
    }
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t v = 0; v < kTileVectors; ++v) {
        float* y = c + r * kTile + v * 16;
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][v]), _mm512_loadu_ps(scales + v * 16));
        _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), product));
      }
  }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t j = 0; j < kTile; ++j) {
      float& y = c[r * kTile + j];
      y = roundings[r].scale * (y - static_cast<float>(roundings[r].zero) * tile.sums[j]);
    }
}

inline void nibble_product(const uint8_t* x, int64_t stride, const Rounding* roundings, int64_t rows,
                           const NibbleTile& tile, float* c) {
  for (int64_t r = 0; r < rows;) {
    const uint8_t* some = x + r * stride;
    float* y = c + r * kTile;
    switch (rows - r) {
      case 1: nibble_rows<1>(some, stride, roundings + r, tile, y), r += 1; break;
      case 2: nibble_rows<2>(some, stride, roundings + r, tile, y), r += 2; break;
      case 3: nibble_rows<3>(some, stride, roundings + r, tile, y), r += 3; break;
      default: nibble_rows<4>(some, stride, roundings + r, tile, y), r += 4;
    }
  }
}

}  // namespace molex
