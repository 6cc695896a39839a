// The two halves of transformer layers over packed rows: many layers, many adapters, one parallel region.
//
// A pass hands over the rows of several layer calls side by side. They are cut into blocks of rows of one
// call, and a block goes through a whole half of a layer while it lies in the second cache of a core.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "attention.h"
#include "decoding.h"
#include "pass.h"
#include "products.h"
#include "requests.h"
#include "rows.h"
#include "tensors.h"

namespace molex {

using at::Tensor;

enum class Activation { kGelu, kGeluTanh, kSilu, kRelu };

inline Activation activation_named(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK(name == "silu", "no activation is called ", name);
  return Activation::kSilu;
}

// `T` is the type that the result is rounded to.
template <class T>
MOLEX_INLINE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu: return std::is_same_v<T, float> ? gelu(x) : gelu_for_bfloat16(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kRelu: return x > 0.0f ? x : (x <= 0.0f ? 0.0f : x);
    default: return silu(x);
  }
}

// y = f(x + bias), n of each. The choice of a function is outside the loop, so that the loop is vectors.
template <class T, Activation kActivation, class Out>
void activate_row(const float* x, const float* bias, int64_t n, Out* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<Out>(activate<T>(kActivation, x[i] + bias[i]));
}

template <class T, class Out>
void activate_row(Activation activation, const float* x, const float* bias, int64_t n, Out* y) {
  switch (activation) {
    case Activation::kGelu: return activate_row<T, Activation::kGelu>(x, bias, n, y);
    case Activation::kGeluTanh: return activate_row<T, Activation::kGeluTanh>(x, bias, n, y);
    case Activation::kRelu: return activate_row<T, Activation::kRelu>(x, bias, n, y);
    default: return activate_row<T, Activation::kSilu>(x, bias, n, y);
  }
}

// A norm keeps its tensors, [weight] or [weight, bias], in float32.
struct NormWeights {
  Norm view(float eps) const {
    return {weight.const_data_ptr<float>(), bias.defined() ? bias.const_data_ptr<float>() : nullptr, eps};
  }
  Tensor weight, bias;
};

struct Layer {
  Linear project, join, up, down;  // q, k and v; the output of attention; the two of the feed-forward part
  NormWeights first, second;
};

// What a pass makes of the rows of its places, depth by depth.
template <class T>
struct Buffers {
  Buffers(int64_t count, const AttentionShape& shape, const Tensor& hidden)
      : tensors{at::empty({count, shape.columns()}, hidden.options()),
                at::empty({count, shape.num_heads * shape.head_dim}, hidden.options()),
                at::empty({count, hidden.size(1)}, hidden.options()),
                at::empty({count, hidden.size(1)}, hidden.options())},
        heads(matrix_of<T>(tensors[0])),
        attended(matrix_of<T>(tensors[1])),
        states{matrix_of<T>(tensors[2]), matrix_of<T>(tensors[3])} {}

  // The first rows [n, d] of what depth t has made.
  Tensor output(int64_t t, int64_t n) const { return tensors[2 + t % 2].narrow(0, 0, n); }

  Tensor tensors[4];
  Matrix<T> heads, attended;
  Matrix<T> states[2];  // that of depth t, and that of the depth before it, which it reads
};

// What one team needs for a block.
template <class T>
struct Scratch {
  Operand<T> x, wide;
  std::vector<float> hidden;  // [kMaxRows, d]
  NarrowRows narrow;
};

// The layers of a base model, with packed weights: `depth` of them, or twice as many where those of the routed
// branch have a precision of their own, and `sites` linear layers each. `T` is the type of activations.
template <class T>
class Layers {
 public:
  Layers(Activation activation, bool gated, bool norm_after, double eps, int64_t depth, int64_t sites)
      : activation_(activation), gated_(gated), norm_after_(norm_after), eps_(eps), depth_(depth), sites_(sites) {}

  void add(Layer layer) { layers_.push_back(std::move(layer)); }

  // Rows `rows` of hidden [m, d] → queries, keys and values side by side [n, e].
  Tensor project(const Tensor& hidden, const Tensor& rows, const Pass& pass) const {
    Tensor result = at::empty({rows.size(0), layers_[0].project.outputs}, hidden.options());
    const Matrix<const T> input = matrix_of<T>(hidden);
    const Matrix<T> output = matrix_of<T>(result);
    for_each_block<Scratch<T>>(pass.blocks.size(), [&](int64_t i, const Team& team, Scratch<T>& s) {
      project_block(pass.blocks[i], input, rows.const_data_ptr<int64_t>(), pass, team, s, output);
    });
    return result;
  }

  // Rows `rows` of hidden [m, d], and what attention returned for them [n, w] → the layers' outputs [n, d].
  Tensor finish(const Tensor& hidden, const Tensor& rows, const Tensor& attended, const Pass& pass) const {
    Tensor result = at::empty({rows.size(0), hidden.size(1)}, hidden.options());
    const Matrix<const T> input = matrix_of<T>(hidden), heads = matrix_of<T>(attended);
    const Matrix<T> output = matrix_of<T>(result);
    for_each_block<Scratch<T>>(pass.blocks.size(), [&](int64_t i, const Team& team, Scratch<T>& s) {
      finish_block(pass.blocks[i], input, rows.const_data_ptr<int64_t>(), heads, pass, team, s, output);
    });
    return result;
  }

  // Depths first..end of a pass from their input [n, d] → the output of the last of them, of all tokens or, at the
  // last depth of all, of those that are needed. Fills in the choices of requests that vote, and adds how many routed
  // layers ran to `routed_layers`.
  Tensor run(const Tensor& hidden, int64_t first, int64_t end, const Requests& requests, const Tensor& factors,
             const AttentionShape& shape, const Positions& positions, int64_t& routed_layers) const;

  // One more token [n, d] of generations, through all depths.
  Tensor decode(const Tensor& hidden, const std::vector<DecodingDepth>& depths, const AttentionShape& shape,
                const Positions& positions) const;

  int64_t size() const { return layers_.size(); }
  int64_t depth() const { return depth_; }
  int64_t sites() const { return sites_ * depth_; }
  int64_t width() const { return layers_[0].project.inputs; }
  int64_t joined() const { return layers_[0].join.inputs; }
  bool has_heads(const AttentionShape& shape) const {
    return shape.columns() == layers_[0].project.outputs && shape.num_heads * shape.head_dim == joined();
  }

 private:
  static void write(const float* x, int64_t n, T* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i]);
  }

  static void clear_tail(Operand<T>& x, int64_t r) { std::fill(x.row(r) + x.columns, x.row(r) + x.stride, T(0)); }

  // A layer's low-rank updates are the same in both branches.
  BlockUpdates updates_of(const Rows& block, const Pass& pass) const {
    return pass.updates(block, block.layer % depth_ * sites_);
  }

  void vote(int64_t depth, Matrix<const T> hidden, const Requests& requests, std::vector<float>& logits,
            Region<Scratch<T>>& region) const;
  void project_block(const Rows& block, Matrix<const T> hidden, const int64_t* rows, const Pass& pass,
                     const Team& team, Scratch<T>& s, Matrix<T> result) const;
  void finish_block(const Rows& block, Matrix<const T> hidden, const int64_t* rows, Matrix<const T> attended,
                    const Pass& pass, const Team& team, Scratch<T>& s, Matrix<T> result) const;

  Activation activation_;
  bool gated_, norm_after_;
  float eps_;
  int64_t depth_, sites_;
  std::vector<Layer> layers_;
};

template <class T>
void Layers<T>::project_block(const Rows& block, Matrix<const T> hidden, const int64_t* rows, const Pass& pass,
                              const Team& team, Scratch<T>& s, Matrix<T> result) const {
  const BlockUpdates updates = updates_of(block, pass);
  const Layer& layer = layers_[block.layer];
  const int64_t width = layer.project.inputs;
  if (team.rank == 0) s.x.resize(kMaxRows, width), s.hidden.resize(kMaxRows * width);
  team.barrier();
  team.share(updates.rows, [&](int64_t r) {
    const T* source = hidden.row(rows[block.begin + r]);
    if (norm_after_) {
      std::copy(source, source + width, s.x.row(r));
    } else {
      float* wide = s.hidden.data() + r * width;
      for (int64_t j = 0; j < width; ++j) wide[j] = static_cast<float>(source[j]);
      normalize(wide, s.x.row(r), width, layer.first.view(eps_));
    }
    clear_tail(s.x, r);
  });
  team.barrier();
  multiply(layer.project, s.x, updates, team, s.narrow, [&](const Pieces& pieces, float* c, const float* bias) {
    for (const Piece& piece : pieces)
      for (int64_t r = 0; r < updates.rows; ++r)
        add_bias(c + r * kTile + piece.begin, bias + piece.begin, piece.width,
                 result.row(block.begin + r) + piece.output);
  });
}

// BERT normalizes sums, x = N₁(z + join(a)), z' = N₂(x + down(f(up(x)))); the others inputs,
// x = z + join(a), z' = x + down(f(up(N₂(x)))).
template <class T>
void Layers<T>::finish_block(const Rows& block, Matrix<const T> hidden, const int64_t* rows,
                             Matrix<const T> attended, const Pass& pass, const Team& team, Scratch<T>& s,
                             Matrix<T> result) const {
  const Layer& layer = layers_[block.layer];
  const BlockUpdates updates = updates_of(block, pass);
  const int64_t width = hidden.width, inner = layer.down.inputs;
  if (team.rank == 0) {
    s.x.resize(kMaxRows, std::max(width, attended.width));
    s.wide.resize(kMaxRows, inner);
    s.hidden.resize(kMaxRows * width);
    s.x.resize(kMaxRows, attended.width);
  }
  team.barrier();
  team.share(updates.rows, [&](int64_t r) {
    const T* source = attended.row(block.begin + r);
    std::copy(source, source + attended.width, s.x.row(r));
    clear_tail(s.x, r);
  });
  team.barrier();
  multiply(layer.join, s.x, updates, team, s.narrow, [&](const Pieces& pieces, float* c, const float* bias) {
    for (const Piece& piece : pieces)
      for (int64_t r = 0; r < updates.rows; ++r) {
        const T* residual = hidden.row(rows[block.begin + r]) + piece.output;
        float* sum = s.hidden.data() + r * width + piece.output;
        const float *y = c + r * kTile + piece.begin, *b = bias + piece.begin;
        for (int64_t j = 0; j < piece.width; ++j) sum[j] = y[j] + b[j] + static_cast<float>(residual[j]);
      }
  });
  team.barrier();
  if (team.rank == 0) s.x.resize(kMaxRows, width);
  team.barrier();
  const Norm norm = (norm_after_ ? layer.first : layer.second).view(eps_);
  team.share(updates.rows, [&](int64_t r) {
    float* sum = s.hidden.data() + r * width;
    normalize(sum, s.x.row(r), width, norm);
    if (norm_after_)
      for (int64_t j = 0; j < width; ++j) sum[j] = static_cast<float>(s.x.row(r)[j]);
    clear_tail(s.x, r);
  });
  team.barrier();
  multiply(layer.up, s.x, updates, team, s.narrow, [&](const Pieces& pieces, float* c, const float* bias) {
    const Piece& first = pieces[0];
    const float* first_bias = bias + first.begin;
    for (int64_t r = 0; r < updates.rows; ++r) {
      float* y = c + r * kTile + first.begin;
      T* target = s.wide.row(r) + first.output;
      if (!gated_) {
        activate_row<T>(activation_, y, first_bias, first.width, target);
        continue;
      }
      activate_row<T>(activation_, y, first_bias, first.width, y);
      const float *other = c + r * kTile + pieces[1].begin, *b = bias + pieces[1].begin;
      for (int64_t j = 0; j < first.width; ++j) target[j] = static_cast<T>(y[j] * (other[j] + b[j]));
    }
  });
  team.share(updates.rows, [&](int64_t r) { clear_tail(s.wide, r); });
  team.barrier();
  multiply(layer.down, s.wide, updates, team, s.narrow, [&](const Pieces& pieces, float* c, const float* bias) {
    for (const Piece& piece : pieces)
      for (int64_t r = 0; r < updates.rows; ++r) {
        float* sum = s.hidden.data() + r * width + piece.output;
        const float *y = c + r * kTile + piece.begin, *b = bias + piece.begin;
        for (int64_t j = 0; j < piece.width; ++j) sum[j] += y[j] + b[j];
      }
  });
  team.barrier();
  team.share(updates.rows, [&](int64_t r) {
    const float* sum = s.hidden.data() + r * width;
    T* target = result.row(block.begin + r);
    if (norm_after_)
      normalize(sum, target, width, layer.second.view(eps_));
    else
      write(sum, width, target);
  });
}

// A depth is four phases, each shared out anew: project, attend, finish, mix. The places of a depth are its rows in
// all layer calls, those of the own layer first, so what is mixed into the rows lies behind them.
template <class T>
Tensor Layers<T>::decode(const Tensor& hidden, const std::vector<DecodingDepth>& depths, const AttentionShape& shape,
                         const Positions& positions) const {
  int64_t places = 0;
  for (const DecodingDepth& depth : depths) places = std::max(places, depth.places());
  Buffers<T> buffers(places, shape, hidden);
  in_one_region<Scratch<T>>([&](Region<Scratch<T>>& region) {
    for (size_t t = 0; t < depths.size(); ++t) {
      const DecodingDepth& depth = depths[t];
      const Matrix<const T> input = t == 0 ? matrix_of<T>(hidden) : buffers.states[(t + 1) % 2];
      const Matrix<T> output = buffers.states[t % 2];
      const int64_t* rows = depth.rows.const_data_ptr<int64_t>();
      region.share_blocks(depth.pass.blocks.size(), [&](int64_t i, const Team& team, Scratch<T>& s) {
        project_block(depth.pass.blocks[i], input, rows, depth.pass, team, s, buffers.heads);
      });
      region.share(depth.places() * shape.num_kv_heads, [&](int64_t item) {
        const int64_t place = item / shape.num_kv_heads;
        attend_cached(shape, positions.of(rows[place]), buffers.heads.row(place), depth.template cached<T>(place),
                      item % shape.num_kv_heads, buffers.attended.row(place));
      });
      region.share_blocks(depth.pass.blocks.size(), [&](int64_t i, const Team& team, Scratch<T>& s) {
        finish_block(depth.pass.blocks[i], input, rows, buffers.attended, depth.pass, team, s, output);
      });
      region.share(depth.terms.size(), [&](int64_t i) {
        mix_row(output.values, depth.terms[i], 0, output.width, output.row(i));
      });
    }
  });
  return buffers.output(depths.size() + 1, hidden.size(0));
}

}  // namespace molex
