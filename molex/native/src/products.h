// Products of a block of rows with packed weights, tile by tile, and what is added to a tile.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <ATen/ATen.h>

#include <cstdint>
#include <type_traits>

#include "elementwise.h"
#include "few_rows.h"
#include "linear.h"
#include "low_rank.h"
#include "nibbles.h"
#include "team.h"
#include "tile.h"
#include "widened.h"

namespace molex {

template <class W>
void wide_product(const Linear& linear, const W* x, int64_t stride, int64_t rows, int64_t tile, float* c) {
  const int64_t k = linear.stride();
  at::native::cpublas::brgemm(padded_rows(rows), kTile, k, stride, kTile, kTile, false, x,
                              linear.at<W>() + tile * k * kTile, c, std::is_same_v<W, at::BFloat16>);
}

// With the weights in float32.
inline void widened_product(const Linear& linear, const float* x, int64_t stride, int64_t rows, int64_t tile,
                            float* c) {
  const int64_t inputs = linear.stride(), first_weight = tile * inputs * kTile;
  if (linear.kind() == Weights::kBfloat16) {
    product_of_widened<16>(x, stride, rows, inputs, linear.at<at::BFloat16>() + first_weight, nullptr, c);
  } else if (linear.kind() == Weights::kInt8) {
    product_of_widened<8>(x, stride, rows, inputs, linear.at<int8_t>() + first_weight, nullptr, c);
    scale_columns(static_cast<const float*>(linear.scale_values) + tile * kTile, rows, c);
  } else {
    const NibbleTile nibbles = linear.nibbles(tile);
    product_of_widened<4>(x, stride, rows, inputs, nibbles.weights, nibbles.scales, c);
  }
}

#ifdef __AVX512F__

// For rows of bfloat16 or bytes.
template <class Dots, class T>
void few_rows_product(const Linear& linear, int64_t rows, const T* x, int64_t stride, int64_t tile,
                      typename Dots::Sum* c) {
  const int64_t values = 4 / sizeof(T), steps = linear.stride() / values;
  const char* w = linear.at<char>() + tile * steps * kTileVectors * kCacheLine;
  multiply_few<Dots>(rows, reinterpret_cast<const int32_t*>(x), stride / values, w, steps, c);
}

// Rows of bytes times weights in 8 bits.
template <class T>
void byte_product(const Linear& linear, const Operand<T>& x, int64_t rows, int64_t tile, float* c) {
  auto* sums = reinterpret_cast<int32_t*>(c);
  if (few_enough(rows)) {
    few_rows_product<ByteDots>(linear, rows, x.bytes.data(), x.stride, tile, sums);
  } else {
    const int64_t k = linear.stride();
    const auto* w = linear.at<signed char>() + tile * k * kTile;
    at::native::cpublas::brgemm(padded_rows(rows), kTile, k, x.stride, kTile, kTile, false, x.bytes.data(), w, sums,
                                true);
  }
  const int32_t* column = static_cast<const int32_t*>(linear.sum_values) + tile * kTile;
  const float* scale = static_cast<const float*>(linear.scale_values) + tile * kTile;
  for (int64_t r = 0; r < rows; ++r) {
    // Where a byte stands for 0 it is not 0: what that adds to a column is taken off again.
    const auto [row_scale, zero] = x.roundings[r];
    for (int64_t j = 0; j < kTile; ++j)
      c[r * kTile + j] = static_cast<float>(sums[r * kTile + j] - zero * column[j]) * (row_scale * scale[j]);
  }
}

// With the weights in the bits that they have.
template <class T>
void product_in_few_bits(const Linear& linear, const Operand<T>& x, int64_t rows, int64_t tile, float* c) {
  if (linear.kind() == Weights::kInt8) return byte_product(linear, x, rows, tile, c);
  if (linear.kind() == Weights::kInt4)
    return nibble_product(x.bytes.data(), x.stride, x.roundings.data(), rows, linear.nibbles(tile), c);
  const at::BFloat16* halves = x.template as<at::BFloat16>();
  if (few_enough(rows)) return few_rows_product<HalfDots>(linear, rows, halves, x.stride, tile, c);
  wide_product(linear, halves, x.stride, rows, tile, c);
}

#endif

template <class T>
void tile_product(const Linear& linear, const Operand<T>& x, int64_t rows, int64_t tile, float* c) {
#ifdef __AVX512F__
  if (linear.kind() != Weights::kFloat && !linear.widened()) return product_in_few_bits(linear, x, rows, tile, c);
#endif
  const float* values = x.template as<float>();
  if (linear.widened()) return widened_product(linear, values, x.stride, rows, tile, c);
  wide_product(linear, values, x.stride, rows, tile, c);
}

// Multiply the block's rows x with a layer's weights, add low-rank updates, and call finish(pieces, c, bias) for each
// tile c [rows, kTile], which is to add the bias [kTile] of its columns: it reads the tile anyway. A barrier must
// follow before anyone reads what it wrote.
template <class T, class Finish>
void multiply(
    const Linear& linear, Operand<T>& x, const BlockUpdates& updates, const Team& team,
    NarrowRows& narrow, const Finish& finish) {
  const int64_t rows = updates.rows;
  const Form form = linear.form<T>();
  if (form != Form::kSame) team.share(rows, [&](int64_t r) { x.convert(r, form); });
  const bool adapted = narrow_rows(linear.sites, x, updates, team, narrow);
  if (form != Form::kSame || adapted) team.barrier();
  // With the tile in the first cache of the core that computes it.
  alignas(64) thread_local static float c[kMaxRows * kTile];
  const float* bias = linear.bias_values;
  team.share(linear.tiles(), [&](int64_t tile) {
    tile_product(linear, x, rows, tile, c);
    const Pieces& pieces = linear.pieces[tile];
    if (adapted)
      for (const Piece& piece : pieces)
        widen_rows(piece.site, updates, narrow, piece.column, piece.width, c + piece.begin, kTile);
    finish(pieces, c, bias + tile * kTile);
  });
}

}  // namespace molex
