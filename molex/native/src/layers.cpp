// The two halves of transformer layers over packed rows: many layers, many adapters, one parallel region.
//
// A pass hands over the rows of several layer calls side by side. They are cut into blocks of rows of one
// call, and a block goes through a whole half of a layer while it lies in the second cache of a core.

#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "attention.h"
#include "huge_pages.h"
#include "linear.h"
#include "rows.h"
#include "votes.h"

namespace molex {
namespace {

using at::Tensor;

enum class Activation { kGelu, kGeluTanh, kSilu, kRelu };

Activation activation_named(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK(name == "silu", "no activation is called ", name);
  return Activation::kSilu;
}

MOLEX_INLINE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kRelu: return x > 0.0f ? x : (x <= 0.0f ? 0.0f : x);
    default: return silu(x);
  }
}

// The choice of a function is outside the loop, so that the loop is vectors.
template <Activation kActivation>
void activate_row(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = activate(kActivation, x[i]);
}

void activate_row(Activation activation, float* x, int64_t n) {
  switch (activation) {
    case Activation::kGelu: return activate_row<Activation::kGelu>(x, n);
    case Activation::kGeluTanh: return activate_row<Activation::kGeluTanh>(x, n);
    case Activation::kRelu: return activate_row<Activation::kRelu>(x, n);
    default: return activate_row<Activation::kSilu>(x, n);
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

// One layer call's part of a pass, or a block of it: rows begin..end of those side by side.
struct Rows {
  int64_t layer, begin, end;
};

// What a pass hands over beside hidden states.
struct Pass {
  Pass(const std::vector<int64_t>& layers, const std::vector<int64_t>& counts, const Tensor& runs_,
       const Tensor& factors_, int64_t sites);

  BlockUpdates updates(const Rows& block, int64_t first_site) const;

  std::vector<Rows> blocks;
  std::vector<Run> runs;
  Tensor factors;
  int64_t sites;
};

Pass::Pass(const std::vector<int64_t>& layers, const std::vector<int64_t>& counts, const Tensor& runs_,
           const Tensor& factors_, int64_t sites_)
    : factors(factors_), sites(sites_) {
  int64_t begin = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const int64_t rows = counts[i], cuts = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t cut = 0; cut < cuts; ++cut)
      blocks.push_back({layers[i], begin + rows * cut / cuts, begin + rows * (cut + 1) / cuts});
    begin += rows;
  }
  auto run = runs_.accessor<int64_t, 2>();
  for (int64_t i = 0; i < run.size(0); ++i) runs.push_back({run[i][0], run[i][1], run[i][2]});
}

BlockUpdates Pass::updates(const Rows& block, int64_t first_site) const {
  BlockUpdates updates{block.begin, block.end - block.begin};
  updates.factors = reinterpret_cast<const Factors*>(factors.const_data_ptr<int64_t>());
  updates.sites_per_member = sites;
  updates.first_site = first_site;
  auto run = std::upper_bound(
      runs.begin(), runs.end(), block.begin, [](int64_t row, const Run& r) { return row < r.end; });
  for (; run != runs.end() && run->begin < block.end; ++run)
    updates.runs.push_back(
        {run->member, std::max(run->begin - block.begin, int64_t{0}), std::min(run->end, block.end) - block.begin});
  return updates;
}

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
    const int64_t width = layers_[0].project.inputs;
    int64_t outputs = 0;
    for (const auto& pieces : layers_[0].project.pieces)
      for (const Piece& piece : pieces) outputs = std::max(outputs, piece.output + piece.width);
    Tensor result = at::empty({rows.size(0), outputs}, hidden.options());
    for_each_block<Scratch<T>>(pass.blocks.size(), [&](int64_t i, const Team& team, Scratch<T>& s) {
      const Rows& block = pass.blocks[i];
      const BlockUpdates updates = updates_of(block, pass);
      const Layer& layer = layers_[block.layer];
      if (team.rank == 0) s.x.resize(kMaxRows, width), s.hidden.resize(kMaxRows * width);
      team.barrier();
      team.share(updates.rows, [&](int64_t r) {
        const T* source = row(hidden, rows.const_data_ptr<int64_t>()[block.begin + r]);
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
      multiply(layer.project, s.x, updates, team, s.narrow, [&](const std::vector<Piece>& pieces, float* c) {
        for (const Piece& piece : pieces)
          for (int64_t r = 0; r < updates.rows; ++r)
            write(c + r * kTile + piece.begin, piece.width, row(result, block.begin + r) + piece.output);
      });
    });
    return result;
  }

  // Rows `rows` of hidden [m, d], and what attention returned for them [n, w] → the layers' outputs [n, d].
  Tensor finish(const Tensor& hidden, const Tensor& rows, const Tensor& attended, const Pass& pass) const {
    Tensor result = at::empty({rows.size(0), hidden.size(1)}, hidden.options());
    for_each_block<Scratch<T>>(pass.blocks.size(), [&](int64_t i, const Team& team, Scratch<T>& s) {
      finish_block(pass.blocks[i], hidden, rows.const_data_ptr<int64_t>(), attended, pass, team, s, result);
    });
    return result;
  }

  int64_t size() const { return layers_.size(); }
  int64_t sites() const { return sites_ * depth_; }
  int64_t width() const { return layers_[0].project.inputs; }
  int64_t joined() const { return layers_[0].join.inputs; }

 private:
  static const T* row(const Tensor& x, int64_t i) { return x.const_data_ptr<T>() + i * x.size(1); }
  static T* row(Tensor& x, int64_t i) { return x.mutable_data_ptr<T>() + i * x.size(1); }

  static void write(const float* x, int64_t n, T* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i]);
  }

  static void clear_tail(Operand<T>& x, int64_t r) { std::fill(x.row(r) + x.columns, x.row(r) + x.stride, T(0)); }

  // A layer's low-rank updates are the same in both branches.
  BlockUpdates updates_of(const Rows& block, const Pass& pass) const {
    return pass.updates(block, block.layer % depth_ * sites_);
  }

  void finish_block(const Rows& block, const Tensor& hidden, const int64_t* rows, const Tensor& attended,
                    const Pass& pass, const Team& team, Scratch<T>& s, Tensor& result) const;

  Activation activation_;
  bool gated_, norm_after_;
  float eps_;
  int64_t depth_, sites_;
  std::vector<Layer> layers_;
};

// BERT normalizes sums, x = N₁(z + join(a)), z' = N₂(x + down(f(up(x)))); the others inputs,
// x = z + join(a), z' = x + down(f(up(N₂(x)))).
template <class T>
void Layers<T>::finish_block(const Rows& block, const Tensor& hidden, const int64_t* rows, const Tensor& attended,
                             const Pass& pass, const Team& team, Scratch<T>& s, Tensor& result) const {
  const Layer& layer = layers_[block.layer];
  const BlockUpdates updates = updates_of(block, pass);
  const int64_t width = hidden.size(1), inner = layer.down.inputs;
  if (team.rank == 0) {
    s.x.resize(kMaxRows, std::max(width, attended.size(1)));
    s.wide.resize(kMaxRows, inner);
    s.hidden.resize(kMaxRows * width);
    s.x.resize(kMaxRows, attended.size(1));
  }
  team.barrier();
  team.share(updates.rows, [&](int64_t r) {
    const T* source = row(attended, block.begin + r);
    std::copy(source, source + attended.size(1), s.x.row(r));
    clear_tail(s.x, r);
  });
  team.barrier();
  multiply(layer.join, s.x, updates, team, s.narrow, [&](const std::vector<Piece>& pieces, float* c) {
    for (const Piece& piece : pieces)
      for (int64_t r = 0; r < updates.rows; ++r) {
        const T* residual = row(hidden, rows[block.begin + r]) + piece.output;
        float* sum = s.hidden.data() + r * width + piece.output;
        const float* y = c + r * kTile + piece.begin;
        for (int64_t j = 0; j < piece.width; ++j) sum[j] = y[j] + static_cast<float>(residual[j]);
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
  multiply(layer.up, s.x, updates, team, s.narrow, [&](const std::vector<Piece>& pieces, float* c) {
    const Piece& first = pieces[0];
    for (int64_t r = 0; r < updates.rows; ++r) {
      float* y = c + r * kTile + first.begin;
      activate_row(activation_, y, first.width);
      if (gated_)
        for (int64_t j = 0; j < first.width; ++j) y[j] *= c[r * kTile + pieces[1].begin + j];
      write(y, first.width, s.wide.row(r) + first.output);
    }
  });
  team.share(updates.rows, [&](int64_t r) { clear_tail(s.wide, r); });
  team.barrier();
  multiply(layer.down, s.wide, updates, team, s.narrow, [&](const std::vector<Piece>& pieces, float* c) {
    for (const Piece& piece : pieces)
      for (int64_t r = 0; r < updates.rows; ++r) {
        float* sum = s.hidden.data() + r * width + piece.output;
        const float* y = c + r * kTile + piece.begin;
        for (int64_t j = 0; j < piece.width; ++j) sum[j] += y[j];
      }
  });
  team.barrier();
  team.share(updates.rows, [&](int64_t r) {
    const float* sum = s.hidden.data() + r * width;
    T* target = row(result, block.begin + r);
    if (norm_after_)
      normalize(sum, target, width, layer.second.view(eps_));
    else
      write(sum, width, target);
  });
}

Linear linear_of(const std::vector<Tensor>& parts, int64_t inputs) {
  return {parts[0], parts[1], parts[2], parts[3], inputs};
}

NormWeights norm_of(const std::vector<Tensor>& parts) {
  return {parts.at(0), parts.size() > 1 ? parts[1] : Tensor()};
}

// What Python holds: layers with activations in float32 or bfloat16.
struct PackedLayers : torch::CustomClassHolder {
  PackedLayers(bool bfloat16, const std::string& activation, bool gated, bool norm_after, double eps, int64_t depth,
               int64_t sites)
      : bfloat16_(bfloat16),
        narrow_(activation_named(activation), gated, norm_after, eps, depth, sites),
        wide_(activation_named(activation), gated, norm_after, eps, depth, sites) {}

  // Four linear layers, each [weights, bias, scales, pieces], their numbers of inputs, and two norms.
  void add(const std::vector<std::vector<Tensor>>& linears, const std::vector<int64_t>& inputs,
           const std::vector<std::vector<Tensor>>& norms) {
    Layer layer{linear_of(linears.at(0), inputs.at(0)), linear_of(linears.at(1), inputs.at(1)),
                linear_of(linears.at(2), inputs.at(2)), linear_of(linears.at(3), inputs.at(3)),
                norm_of(norms.at(0)),  norm_of(norms.at(1))};
    move_to_huge_pages({&layer.project.weights, &layer.join.weights, &layer.up.weights, &layer.down.weights});
    bfloat16_ ? narrow_.add(std::move(layer)) : wide_.add(std::move(layer));
  }

  // Layer calls numbers[0] on the first counts[0] rows, and so on.
  Tensor project(const Tensor& hidden, const Tensor& rows, const std::vector<int64_t>& numbers,
                 const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
    return with_layers([&](const auto& layers) {
      check(layers, hidden, rows, numbers, counts, runs, factors);
      return layers.project(hidden, rows, Pass(numbers, counts, runs, factors, layers.sites()));
    });
  }

  Tensor finish(const Tensor& hidden, const Tensor& rows, const Tensor& attended, const std::vector<int64_t>& numbers,
                const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
    return with_layers([&](const auto& layers) {
      check(layers, hidden, rows, numbers, counts, runs, factors);
      TORCH_CHECK(attended.is_contiguous() && attended.scalar_type() == hidden.scalar_type() &&
                      attended.sizes() == at::IntArrayRef({rows.size(0), layers.joined()}),
                  "attended must be a contiguous matrix of the rows, like hidden");
      return layers.finish(hidden, rows, attended, Pass(numbers, counts, runs, factors, layers.sites()));
    });
  }

 private:
  template <class Use>
  Tensor with_layers(const Use& use) const {
    return bfloat16_ ? use(narrow_) : use(wide_);
  }

  // Shapes and types, once a pass: what the kernels read lies inside what was handed over.
  template <class L>
  void check(const L& layers, const Tensor& hidden, const Tensor& rows, const std::vector<int64_t>& numbers,
             const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
    TORCH_CHECK(hidden.is_contiguous() && hidden.dim() == 2 && hidden.size(1) == layers.width() &&
                    hidden.scalar_type() == (bfloat16_ ? at::kBFloat16 : at::kFloat),
                "hidden must be a contiguous matrix of the layers' width and type");
    TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kLong && rows.dim() == 1, "rows must be [n]");
    TORCH_CHECK(numbers.size() == counts.size(), "there must be a count of rows for each layer call");
    TORCH_CHECK(runs.scalar_type() == at::kLong && runs.dim() == 2 && runs.size(1) == 3, "runs must be [r, 3]");
    TORCH_CHECK(factors.is_contiguous() && factors.scalar_type() == at::kLong && factors.dim() == 3 &&
                    factors.size(1) == layers.sites() && factors.size(2) == 5,
                "factors must be [members, sites, 5]");
    int64_t total = 0;
    for (size_t i = 0; i < numbers.size(); ++i) {
      TORCH_CHECK(0 <= numbers[i] && numbers[i] < layers.size() && counts[i] >= 0, "no such layer call");
      total += counts[i];
    }
    TORCH_CHECK(total == rows.size(0), "the calls have ", total, " rows, not ", rows.size(0));
    const int64_t* index = rows.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < total; ++i)
      TORCH_CHECK(0 <= index[i] && index[i] < hidden.size(0), "no row ", index[i], " in hidden");
    auto run = runs.accessor<int64_t, 2>();
    for (int64_t i = 0, end = 0; i < run.size(0); ++i) {
      TORCH_CHECK(0 <= run[i][0] && run[i][0] < factors.size(0), "no adapter ", run[i][0]);
      TORCH_CHECK(end <= run[i][1] && run[i][1] <= run[i][2] && run[i][2] <= total, "runs must follow each other");
      end = run[i][2];
    }
  }

  bool bfloat16_;
  Layers<at::BFloat16> narrow_;
  Layers<float> wide_;
};

// Call use(values) with the values of a tensor in their type.
template <class Use>
void with_values(const Tensor& x, const Use& use) {
  if (x.scalar_type() == at::kBFloat16)
    use(x.const_data_ptr<at::BFloat16>());
  else
    use(x.const_data_ptr<float>());
}

// `heads` [n, num_heads + 2 · num_kv_heads, head_dim] of requests whose tokens lie from offsets[i] to
// offsets[i + 1] → [n, num_heads, head_dim].
Tensor attend_packed(const Tensor& heads, const Tensor& offsets, int64_t num_kv_heads, double scaling, bool causal,
                     int64_t window) {
  TORCH_CHECK(heads.is_contiguous() && heads.dim() == 3 && heads.size(1) > 2 * num_kv_heads,
              "heads must be contiguous queries, keys and values");
  const AttentionShape shape{heads.size(1) - 2 * num_kv_heads, num_kv_heads, heads.size(2),
                             static_cast<float>(scaling),       causal,       window};
  TORCH_CHECK(shape.num_heads % num_kv_heads == 0, "query heads must share key heads evenly");
  TORCH_CHECK(offsets.is_contiguous() && offsets.scalar_type() == at::kLong && offsets.dim() == 1 &&
                  offsets.size(0) > 0, "offsets must be [r + 1]");
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t requests = offsets.size(0) - 1;
  TORCH_CHECK(offset[0] == 0 && offset[requests] == heads.size(0) && std::is_sorted(offset, offset + requests),
              "offsets must run from 0 to the number of tokens");
  Tensor result = at::empty({heads.size(0), shape.num_heads, shape.head_dim}, heads.options());
  with_values(heads, [&](const auto* values) {
    using T = std::decay_t<decltype(*values)>;
    attend(shape, values, offset, requests, result.mutable_data_ptr<T>());
  });
  return result;
}

// Logits [n, T] of the rows `tokens` [n] of hidden [m, d]: the first counts[0] of them by the first of the linear
// gates W [T, d], b [T], and so on.
Tensor gate_logits(const Tensor& hidden, const Tensor& tokens, const std::vector<int64_t>& counts,
                   const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  TORCH_CHECK(hidden.is_contiguous() && tokens.is_contiguous(), "inputs must be contiguous");
  TORCH_CHECK(!counts.empty() && counts.size() == weights.size() && counts.size() == biases.size(),
              "there must be a count of tokens, weights and a bias for each gate");
  const int64_t width = hidden.size(1), outputs = weights[0].size(0);
  std::vector<GateRows> gates;
  for (size_t i = 0; i < counts.size(); ++i) {
    TORCH_CHECK(weights[i].is_contiguous() && weights[i].sizes() == at::IntArrayRef({outputs, width}) &&
                    biases[i].is_contiguous() && biases[i].numel() == outputs, "gates must be [T, d] and [T]");
    gates.push_back({weights[i].const_data_ptr<float>(), biases[i].const_data_ptr<float>(),
                     (gates.empty() ? 0 : gates.back().end) + counts[i]});
  }
  TORCH_CHECK(gates.back().end == tokens.size(0), "the gates do not share out all tokens");
  Tensor result = at::empty({tokens.size(0), outputs}, hidden.options().dtype(at::kFloat));
  with_values(hidden, [&](const auto* x) {
    gate_rows(x, width, tokens.const_data_ptr<int64_t>(), gates, outputs, result.mutable_data_ptr<float>());
  });
  return result;
}

// Logits [n, T] of voting tokens, and the request 0..v-1 of each, in order → the layers [v, top_k] that each
// request chose, and their weights [v, top_k].
std::tuple<Tensor, Tensor> elect_layers(const Tensor& logits, const Tensor& owners, int64_t requests,
                                        const std::string& score, int64_t top_k) {
  const int64_t n = logits.size(0), layers = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && owners.is_contiguous() && owners.size(0) == n && top_k <= layers,
              "there must be an owner for each row of contiguous logits, and layers enough");
  const Score kind = score == "mode" ? Score::kVote : (score == "softmax" ? Score::kSoftmax : Score::kSigmoid);
  Tensor chosen = at::empty({requests, top_k}, owners.options());
  Tensor weights = at::empty({requests, top_k}, logits.options());
  const int64_t* owner = owners.const_data_ptr<int64_t>();
  int64_t begin = 0;
  for (int64_t r = 0; r < requests; ++r) {
    int64_t end = begin;
    while (end < n && owner[end] == r) ++end;
    elect(logits.const_data_ptr<float>() + begin * layers, end - begin, layers, kind, top_k,
          chosen.mutable_data_ptr<int64_t>() + r * top_k, weights.mutable_data_ptr<float>() + r * top_k);
    begin = end;
  }
  TORCH_CHECK(begin == n, "the owners of tokens must be in order");
  return {chosen, weights};
}

// The outputs [k, d] of a depth's own layer on all requests, whose rows lie from bounds[r] to bounds[r + 1], and
// behind them those of the `visits` [v] of requests to routed layers, in order → own[r] · the former +
// Σ_visits weights[v] · the latter [m, d].
Tensor mix(const Tensor& outputs, const Tensor& bounds, const Tensor& own, const Tensor& visits,
           const Tensor& weights) {
  TORCH_CHECK(outputs.is_contiguous() && bounds.is_contiguous() && own.is_contiguous() && visits.is_contiguous() &&
                  weights.is_contiguous(), "inputs must be contiguous");
  const int64_t requests = own.size(0), width = outputs.size(1);
  TORCH_CHECK(bounds.size(0) == requests + 1 && visits.size(0) == weights.size(0), "the shapes do not fit each other");
  const int64_t* bound = bounds.const_data_ptr<int64_t>();
  std::vector<std::vector<Term>> terms(requests);
  for (int64_t r = 0; r < requests; ++r) terms[r].push_back({bound[r], own.const_data_ptr<float>()[r]});
  int64_t end = bound[requests];
  for (int64_t v = 0; v < visits.size(0); ++v) {
    const int64_t r = visits.const_data_ptr<int64_t>()[v];
    TORCH_CHECK(0 <= r && r < requests, "no request ", r);
    terms[r].push_back({end, weights.const_data_ptr<float>()[v]});
    end += bound[r + 1] - bound[r];
  }
  TORCH_CHECK(end == outputs.size(0), "the requests and visits have ", end, " rows, not ", outputs.size(0));
  Tensor result = at::empty({bound[requests], width}, outputs.options());
  with_values(outputs, [&](const auto* x) {
    using T = std::decay_t<decltype(*x)>;
    mix_rows(x, terms, bound, width, result.mutable_data_ptr<T>());
  });
  return result;
}

}  // namespace
}  // namespace molex

TORCH_LIBRARY(molex, m) {
  m.class_<molex::PackedLayers>("PackedLayers")
      .def(torch::init<bool, std::string, bool, bool, double, int64_t, int64_t>())
      .def("add", &molex::PackedLayers::add)
      .def("project", &molex::PackedLayers::project)
      .def("finish", &molex::PackedLayers::finish);
  m.def("attend", &molex::attend_packed);
  m.def("gate_logits", &molex::gate_logits);
  m.def("elect", &molex::elect_layers);
  m.def("mix", &molex::mix);
}
