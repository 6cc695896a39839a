// Products with weights in 4 bits, which are unpacked in registers on their way from memory.
#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "elementwise.h"
#include "tile.h"
#include "vectors.h"

namespace molex {

// Inputs of a column that share a scale.
constexpr int64_t kGroup = 64;
// Inputs that lie together: of each column four bytes, whose low halves are the first four and high halves the others.
constexpr int64_t kNibbleStep = 8;
// Weights, -8 to 7, are unpacked into the high halves of bytes: read as whole bytes they are so many times too large.
constexpr float kHalfByte = 16.0f;

// One tile: weights [inputs / 2, columns], scales [groups, columns] and the sum of what the weights of each column
// stand for [columns], times kHalfByte.
struct NibbleTile {
  int64_t groups() const { return (inputs + kGroup - 1) / kGroup; }

  int64_t inputs;
  const uint8_t* weights;
  const at::BFloat16* scales;
  const float* sums;
};

// What is taken off for the zero of a row, of each column: the sum of its weights [tiles · columns].
inline at::Tensor nibble_sums(const at::Tensor& weights, const at::Tensor& scales) {
  const int64_t tiles = weights.size(0), steps = weights.size(1) * 2 / kNibbleStep;
  const at::Tensor bytes = weights.view({tiles, steps, kTile, kNibbleStep / 2});
  const at::Tensor low = bytes.bitwise_left_shift(4).view(at::kChar), high = bytes.bitwise_and(0xf0).view(at::kChar);
  const at::Tensor sums = (low.to(at::kFloat) + high.to(at::kFloat)).sum(3);
  const at::Tensor group = at::arange(steps) * kNibbleStep / kGroup;
  return (sums * scales.to(at::kFloat).index_select(1, group.to(at::kLong))).sum(1).reshape(-1).contiguous();
}

#ifdef __AVX512F__

// c [kRows, columns] = x · W for rows x of bytes, `stride` apart.
template <int64_t kRows>
__attribute__((target("avx512vnni"))) void nibble_rows(const uint8_t* x, int64_t stride, const Rounding* roundings,
                                                       const NibbleTile& tile, float* c) {
  const __m512i high_half = _mm512_set1_epi8(static_cast<char>(0xf0));
  std::fill_n(c, kRows * kTile, 0.0f);
  const uint8_t* w = tile.weights;
  const at::BFloat16* scales = tile.scales;
  // The tile behind this one is fetched meanwhile: it is likely the next.
  const int64_t next = tile.inputs / 2 * kTile, next_scales = tile.groups() * kTile;
  for (int64_t first = 0; first < tile.inputs; first += kGroup, scales += kTile) {
    const int64_t end = std::min(first + kGroup, tile.inputs);
    for (int64_t j = 0; j < kTile; j += kCacheLine / 2) _mm_prefetch(scales + next_scales + j, _MM_HINT_T1);
    Integers sums[kRows][kTileVectors] = {};
    for (int64_t k = first; k < end; k += kNibbleStep, w += kTile * kNibbleStep / 2) {
      for (int64_t v = 0; v < kTileVectors; ++v) _mm_prefetch(w + next + v * kCacheLine, _MM_HINT_T1);
      for (int64_t v = 0; v < kTileVectors; ++v) {
        const __m512i both = _mm512_loadu_si512(w + v * kCacheLine);
        const __m512i low = _mm512_and_si512(_mm512_slli_epi16(both, 4), high_half);
        const __m512i high = _mm512_and_si512(both, high_half);
        for (int64_t r = 0; r < kRows; ++r) {
          const auto* four = reinterpret_cast<const int32_t*>(x + r * stride + k);
          sums[r][v] = byte_dots(sums[r][v], _mm512_set1_epi32(four[0]), low);
          sums[r][v] = byte_dots(sums[r][v], _mm512_set1_epi32(four[1]), high);
        }
      }
    }
    for (int64_t v = 0; v < kTileVectors; ++v) {
      const Vector scale = widened(scales + v * kVector);
      for (int64_t r = 0; r < kRows; ++r) {
        auto& y = *reinterpret_cast<Vector*>(c + r * kTile + v * kVector);
        y += std::bit_cast<Vector>(_mm512_cvtepi32_ps(std::bit_cast<__m512i>(sums[r][v]))) * scale;
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    const float scale = roundings[r].scale / kHalfByte, zero = static_cast<float>(roundings[r].zero);
    for (int64_t v = 0; v < kTile; v += kVector) {
      auto& y = *reinterpret_cast<Vector*>(c + r * kTile + v);
      y = (y - widened(tile.sums + v) * zero) * scale;
    }
  }
}

inline void nibble_product(const uint8_t* x, int64_t stride, const Rounding* roundings, int64_t rows,
                           const NibbleTile& tile, float* c) {
  in_fours(rows, [&]<int64_t kRows>(int64_t r) {
    nibble_rows<kRows>(x + r * stride, stride, roundings + r, tile, c + r * kTile);
  });
}

#endif

}  // namespace molex
