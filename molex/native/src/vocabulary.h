// The linear layer before the softmax over a vocabulary of V tokens, which may be their embedding too.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "layers.h"
#include "tensors.h"

namespace molex {

class Vocabulary {
 public:
  // `linear` is in the type of hidden states.
  explicit Vocabulary(Linear linear) : linear_(std::move(linear)) {}

  const Linear& linear() const { return linear_; }

  // Hidden states [n, d] → logits [n, V].
  Tensor logits(const Tensor& hidden) const {
    Tensor result = at::empty({hidden.size(0), linear_.outputs}, hidden.options());
    with_values(hidden, [&](const auto* x) { multiply_all(x, hidden.size(0), result); });
    return result;
  }

  // The weights [n, d] of some tokens [n].
  Tensor embed(const Tensor& tokens) const {
    Tensor result = at::empty({tokens.size(0), linear_.inputs}, linear_.weights.options());
    const int64_t* token = tokens.const_data_ptr<int64_t>();
    with_values(linear_.weights, [&](const auto* w) {
      using T = std::decay_t<decltype(*w)>;
      T* y = result.mutable_data_ptr<T>();
      for (int64_t i = 0; i < tokens.size(0); ++i) copy_output(w, token[i], y + i * linear_.inputs);
    });
    return result;
  }

 private:
  template <class T>
  void multiply_all(const T* hidden, int64_t n, Tensor& result) const {
    const int64_t width = linear_.inputs, outputs = result.size(1);
    T* y = result.mutable_data_ptr<T>();
    for_each_block<Scratch<T>>((n + kMaxRows - 1) / kMaxRows, [&](int64_t i, const Team& team, Scratch<T>& s) {
      const BlockUpdates none{i * kMaxRows, std::min(kMaxRows, n - i * kMaxRows)};
      if (team.rank == 0) s.x.resize(kMaxRows, width);
      team.barrier();
      team.share(none.rows, [&](int64_t r) {
        const T* source = hidden + (none.begin + r) * width;
        std::fill(std::copy(source, source + width, s.x.row(r)), s.x.row(r) + s.x.stride, T(0));
      });
      team.barrier();
      multiply(linear_, s.x, none, team, s.narrow, [&](const Pieces& pieces, float* c, const float* bias) {
        for (const Piece& piece : pieces)
          for (int64_t r = 0; r < none.rows; ++r)
            add_bias(c + r * kTile + piece.begin, bias + piece.begin, piece.width,
                     y + (none.begin + r) * outputs + piece.output);
      });
    });
  }

  // One output's weights, out of the tile that it is a column of.
  template <class T>
  void copy_output(const T* weights, int64_t output, T* y) const {
    constexpr int64_t together = 4 / sizeof(T);
    const T* column = weights + output / kTile * linear_.stride() * kTile + output % kTile * together;
    for (int64_t k = 0; k < linear_.inputs; ++k) y[k] = column[k / together * together * kTile + k % together];
  }

  Linear linear_;
};

}  // namespace molex
