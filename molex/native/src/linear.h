// Products of a block of rows with packed weights, tile by tile, and what is added to a tile.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "elementwise.h"
#include "few_rows.h"
#include "low_rank.h"
#include "nibbles.h"
#include "team.h"
#include "tile.h"

namespace molex {

// Neighbouring columns of one tile that belong to one linear layer of the stock block.
struct Piece {
  int64_t site;    // which layer of the block
  int64_t begin;   // first column in the tile
  int64_t column;  // the same column among the outputs of the site
  int64_t width;
  int64_t output;  // the same column in what is written
};
using Pieces = std::vector<Piece>;

// Of the type of the activations, of the other of float32 and bfloat16, or in 8 or 4 bits.
enum class Weights { kSame, kOther, kInt8, kInt4 };

// Whether rows are rounded to bytes before they are multiplied.
inline bool takes_bytes(Weights kind) { return kind == Weights::kInt8 || kind == Weights::kInt4; }

template <class T>
using Other = std::conditional_t<std::is_same_v<T, float>, at::BFloat16, float>;

// One or several linear layers with the same input: y = x Wᵀ + b.
struct Linear {
  Linear() = default;
  // `weights` [tiles, padded inputs, kTile] in the order that the kernels read, in bfloat16 two and in 8 bits
  // four inputs next to each other, in 4 bits [tiles, padded inputs / 2, kTile] as in nibbles.h; `bias`
  // [tiles · kTile]; `scales` [tiles · kTile] in float32 for 8 bits, [tiles, groups, kTile] in bfloat16 for 4, else
  // empty; `pieces` [n, 6]: the tile, then a Piece.
  Linear(at::Tensor weights, at::Tensor bias, at::Tensor scales, const at::Tensor& pieces, int64_t inputs);

  int64_t tiles() const { return weights.size(0); }
  int64_t stride() const { return weights.size(1) * (weights.scalar_type() == at::kByte ? 2 : 1); }
  int64_t outputs() const {
    int64_t end = 0;
    for (const auto& tile : pieces)
      for (const Piece& piece : tile) end = std::max(end, piece.output + piece.width);
    return end;
  }

  template <class T>
  Weights kind() const {
    const at::ScalarType type = weights.scalar_type();
    if (type == at::kChar) return Weights::kInt8;
    if (type == at::kByte) return Weights::kInt4;
    return type == c10::CppTypeToScalarType<T>::value ? Weights::kSame : Weights::kOther;
  }

  NibbleTile nibbles(int64_t tile) const {
    const int64_t inputs = stride(), groups = scales.size(1);
    return {inputs, at<uint8_t>() + tile * inputs / 2 * kTile,
            static_cast<const at::BFloat16*>(scale_values) + tile * groups * kTile,
            static_cast<const float*>(sum_values) + tile * kTile};
  }

  template <class W>
  const W* at() const {
    return static_cast<const W*>(weight_values);
  }

  at::Tensor weights, bias, scales;
  at::Tensor sums;  // of the weights of each column [tiles · kTile], in 8 bits without its scale
  // Where they lie: a tensor looks whether it has data each time it is asked.
  const void *weight_values = nullptr, *scale_values = nullptr, *sum_values = nullptr;
  const float* bias_values = nullptr;
  std::vector<Pieces> pieces;  // of each tile
  std::vector<int64_t> sites;
  int64_t inputs = 0;
};

inline Linear::Linear(
    at::Tensor weights_, at::Tensor bias_, at::Tensor scales_, const at::Tensor& pieces_, int64_t inputs_)
    : weights(std::move(weights_)), bias(std::move(bias_)), scales(std::move(scales_)), inputs(inputs_) {
  if (weights.scalar_type() == at::kChar)
    sums = weights.view({tiles(), stride() / 4, kTile, 4}).sum({1, 3}, false, at::kInt).contiguous();
  if (weights.scalar_type() == at::kByte) sums = nibble_sums(weights, scales);
  weight_values = weights.const_data_ptr();
  bias_values = bias.const_data_ptr<float>();
  scale_values = scales.const_data_ptr();
  if (sums.defined()) sum_values = sums.const_data_ptr();
  pieces.resize(tiles());
  auto given = pieces_.accessor<int64_t, 2>();
  for (int64_t i = 0; i < given.size(0); ++i) {
    pieces[given[i][0]].push_back({given[i][1], given[i][2], given[i][3], given[i][4], given[i][5]});
    if (std::find(sites.begin(), sites.end(), given[i][1]) == sites.end()) sites.push_back(given[i][1]);
  }
}

// Rows of a block on their way through a product. Behind its columns each row has zeros up to `stride`, which is
// the largest that any kind of weights is padded to.
template <class T>
struct Operand {
  void resize(int64_t max_rows, int64_t columns_) {
    columns = columns_;
    stride = (columns + 7) / 8 * 8;
    if (static_cast<int64_t>(values.size()) < max_rows * stride) values.resize(max_rows * stride);
    if (static_cast<int64_t>(others.size()) < max_rows * stride) others.resize(max_rows * stride);
    if (static_cast<int64_t>(bytes.size()) < max_rows * stride) bytes.resize(max_rows * stride);
    if (static_cast<int64_t>(roundings.size()) < max_rows) roundings.resize(max_rows);
  }
  T* row(int64_t i) { return values.data() + i * stride; }
  const T* row(int64_t i) const { return values.data() + i * stride; }

  // Row i as weights of that kind multiply it.
  void convert(int64_t i, Weights kind) {
    if (takes_bytes(kind))
      roundings[i] = quantize(row(i), bytes.data() + i * stride, columns);
    else if (kind == Weights::kOther)
      std::copy(row(i), row(i) + stride, others.data() + i * stride);
  }

  int64_t columns = 0, stride = 0;
  std::vector<T> values;
  std::vector<Other<T>> others;  // the values as a product wants them, if not as they are
  std::vector<uint8_t> bytes;
  std::vector<Rounding> roundings;
};

// A kernel is compiled for each number of rows: a few numbers have to do.
inline int64_t padded_rows(int64_t rows) { return rows <= 4 ? rows : (rows + 3) / 4 * 4; }

template <class T>
void wide_product(const Linear& linear, const std::vector<T>& x, int64_t stride, int64_t m, int64_t tile, float* c) {
  const int64_t k = linear.stride();
  at::native::cpublas::brgemm(m, kTile, k, stride, kTile, kTile, false, x.data(),
                              linear.at<T>() + tile * k * kTile, c, std::is_same_v<T, at::BFloat16>);
}

// For rows of bfloat16 or bytes.
template <class Dots, class T>
void few_rows_product(const Linear& linear, int64_t rows, const std::vector<T>& x, int64_t stride, int64_t tile,
                      typename Dots::Sum* c) {
  const int64_t values = 4 / sizeof(T), steps = linear.stride() / values;
  const char* w = linear.at<char>() + tile * steps * kTileVectors * kCacheLine;
  multiply_few<Dots>(rows, reinterpret_cast<const int32_t*>(x.data()), stride / values, w, steps, c);
}

// Rows of bytes times weights in 8 bits.
template <class T>
void byte_product(const Linear& linear, const Operand<T>& x, int64_t rows, int64_t tile, float* c) {
  auto* sums = reinterpret_cast<int32_t*>(c);
  if (takes_dots(rows)) {
    few_rows_product<ByteDots>(linear, rows, x.bytes, x.stride, tile, sums);
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

template <class T>
void tile_product(const Linear& linear, const Operand<T>& x, int64_t rows, int64_t tile, float* c) {
  const Weights kind = linear.kind<T>();
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (kind == Weights::kSame && takes_dots(rows))
      return few_rows_product<HalfDots>(linear, rows, x.values, x.stride, tile, c);
  switch (kind) {
    case Weights::kSame: return wide_product(linear, x.values, x.stride, padded_rows(rows), tile, c);
    case Weights::kOther: return wide_product(linear, x.others, x.stride, padded_rows(rows), tile, c);
    case Weights::kInt8: return byte_product(linear, x, rows, tile, c);
    case Weights::kInt4:
      return nibble_product(x.bytes.data(), x.stride, x.roundings.data(), rows, linear.nibbles(tile), c);
  }
}

// Multiply the block's rows x with a layer's weights, add low-rank updates, and call finish(pieces, c, bias) for each
// tile c [rows, kTile], which is to add the bias [kTile] of its columns: it reads the tile anyway. A barrier must
// follow before anyone reads what it wrote.
template <class T, class Finish>
void multiply(
    const Linear& linear, Operand<T>& x, const BlockUpdates& updates, const Team& team,
    NarrowRows& narrow, const Finish& finish) {
  const int64_t rows = updates.rows;
  const Weights kind = linear.kind<T>();
  if (kind != Weights::kSame) team.share(rows, [&](int64_t r) { x.convert(r, kind); });
  const bool adapted = narrow_rows(linear.sites, x, updates, team, narrow);
  if (kind != Weights::kSame || adapted) team.barrier();
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
