// Packed weights, and the rows that they multiply.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu.h"
#include "elementwise.h"
#include "nibbles.h"
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

enum class Weights { kFloat, kBfloat16, kInt8, kInt4 };

// What rows are multiplied as: the values that they are, the same in the other of float32 and bfloat16, or bytes.
enum class Form { kSame, kOther, kBytes };

template <class T>
using Other = std::conditional_t<std::is_same_v<T, float>, at::BFloat16, float>;

// One or several linear layers with the same input: y = x Wᵀ + b.
struct Linear {
  // `weights` [tiles, padded inputs, kTile] in the order that the kernels read, in bfloat16 two and in 8 bits
  // four inputs next to each other, in 4 bits [tiles, padded inputs / 2, kTile] as in nibbles.h; `bias`
  // [tiles · kTile]; `scales` [tiles · kTile] in float32 for 8 bits, [tiles, groups, kTile] in bfloat16 for 4, else
  // empty; `pieces` [n, 6]: the tile, then a Piece.
  Linear(at::Tensor weights, at::Tensor bias, at::Tensor scales, const at::Tensor& pieces, int64_t inputs);

  int64_t tiles() const { return weights.size(0); }
  int64_t stride() const { return weights.size(1) * (kind_ == Weights::kInt4 ? 2 : 1); }

  Weights kind() const { return kind_; }

  // Whether weights become float32 on their way into a product, as this CPU has none for them.
  bool widened() const { return widened_; }

  // What they multiply rows of values T as.
  template <class T>
  Form form() const {
    if (!widened_ && (kind_ == Weights::kInt8 || kind_ == Weights::kInt4)) return Form::kBytes;
    const bool halves = !widened_ && kind_ == Weights::kBfloat16;
    return std::is_same_v<T, at::BFloat16> == halves ? Form::kSame : Form::kOther;
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
  int64_t inputs, outputs = 0;

 private:
  Weights kind_ = Weights::kFloat;
  bool widened_ = false;
};

inline Weights kind_of(at::ScalarType type) {
  switch (type) {
    case at::kByte: return Weights::kInt4;
    case at::kChar: return Weights::kInt8;
    case at::kBFloat16: return Weights::kBfloat16;
    default: return Weights::kFloat;
  }
}

inline Linear::Linear(
    at::Tensor weights_, at::Tensor bias_, at::Tensor scales_, const at::Tensor& pieces_, int64_t inputs_)
    : weights(std::move(weights_)), bias(std::move(bias_)), scales(std::move(scales_)), inputs(inputs_),
      kind_(kind_of(weights.scalar_type())) {
  widened_ = kind_ == Weights::kBfloat16 ? !multiplies_halves() : kind_ != Weights::kFloat && !multiplies_bytes();
  if (kind_ == Weights::kInt8)
    sums = weights.view({tiles(), stride() / 4, kTile, 4}).sum({1, 3}, false, at::kInt).contiguous();
  if (kind_ == Weights::kInt4) sums = nibble_sums(weights, scales);
  weight_values = weights.const_data_ptr();
  bias_values = bias.const_data_ptr<float>();
  scale_values = scales.const_data_ptr();
  if (sums.defined()) sum_values = sums.const_data_ptr();
  pieces.resize(tiles());
  auto given = pieces_.accessor<int64_t, 2>();
  for (int64_t i = 0; i < given.size(0); ++i) {
    const Piece piece{given[i][1], given[i][2], given[i][3], given[i][4], given[i][5]};
    pieces[given[i][0]].push_back(piece);
    outputs = std::max(outputs, piece.output + piece.width);
    if (std::find(sites.begin(), sites.end(), piece.site) == sites.end()) sites.push_back(piece.site);
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

  // All rows in float32 or bfloat16.
  template <class U>
  const U* as() const {
    if constexpr (std::is_same_v<T, U>)
      return values.data();
    else
      return others.data();
  }

  // Make row i what it is multiplied as.
  void convert(int64_t i, Form form) {
    if (form == Form::kBytes)
      roundings[i] = quantize(row(i), bytes.data() + i * stride, columns);
    else if (form == Form::kOther)
      std::copy(row(i), row(i) + stride, others.data() + i * stride);
  }

  int64_t columns = 0, stride = 0;
  std::vector<T> values;
  std::vector<Other<T>> others;  // the values as a product wants them, if not as they are
  std::vector<uint8_t> bytes;
  std::vector<Rounding> roundings;
};

}  // namespace molex
