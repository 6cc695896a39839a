// What Python holds. Shapes and types are checked here: what the kernels read lies inside what was handed over.
#pragma once

#include <torch/custom_class.h>

#include <algorithm>
#include <string>
#include <vector>

#include "depths.h"
#include "huge_pages.h"
#include "layers.h"
#include "vocabulary.h"

namespace molex {

inline Linear linear_of(const std::vector<Tensor>& parts, int64_t inputs) {
  return {parts[0], parts[1], parts[2], parts[3], inputs};
}

inline NormWeights norm_of(const std::vector<Tensor>& parts) {
  return {parts.at(0), parts.size() > 1 ? parts[1] : Tensor()};
}

inline std::vector<Run> runs_of(const Tensor& runs) {
  std::vector<Run> result;
  auto run = runs.accessor<int64_t, 2>();
  for (int64_t i = 0; i < run.size(0); ++i) result.push_back({run[i][0], run[i][1], run[i][2]});
  return result;
}

// The positions of `count` tokens.
inline Positions checked(const Tensor& past, const Tensor& cos, const Tensor& sin, int64_t count, int64_t head_dim) {
  TORCH_CHECK(past.is_contiguous() && past.scalar_type() == at::kLong && past.sizes() == at::IntArrayRef({count}),
              "past must be [n]");
  for (const Tensor& part : {cos, sin})
    TORCH_CHECK(part.numel() == 0 || (part.is_contiguous() && part.scalar_type() == at::kFloat &&
                                      part.sizes() == at::IntArrayRef({count, head_dim})),
                "cos and sin must be [n, head_dim] in float32");
  TORCH_CHECK(cos.numel() == sin.numel(), "cos and sin belong together");
  return {past, cos, sin};
}

inline void check_cache(const Tensor& cache, at::ScalarType type, const AttentionShape& shape) {
  TORCH_CHECK(cache.is_contiguous() && cache.dim() == 4 && cache.scalar_type() == type &&
                  cache.size(1) == 2 * shape.num_kv_heads && cache.size(3) == shape.head_dim,
              "cache must be [pages, 2 · kv heads, tokens, head_dim], like the layers");
}

// Layers with activations in float32 or bfloat16.
struct PackedLayers : torch::CustomClassHolder {
 private:
  template <class Use>
  auto with_layers(const Use& use) const {
    return bfloat16_ ? use(narrow_) : use(wide_);
  }

 public:
  PackedLayers(bool bfloat16, const std::string& activation, bool gated, bool norm_after, double eps, int64_t depth,
               int64_t sites)
      : bfloat16_(bfloat16),
        narrow_(activation_named(activation), gated, norm_after, eps, depth, sites),
        wide_(activation_named(activation), gated, norm_after, eps, depth, sites) {}

  // Four linear layers, each [weights, bias, scales, pieces], their numbers of inputs, and two norms.
  void add(std::vector<std::vector<Tensor>> linears, const std::vector<int64_t>& inputs,
           const std::vector<std::vector<Tensor>>& norms) {
    // A linear layer remembers where its tensors lie, so they move before it is made.
    std::vector<Tensor*> weights;
    for (std::vector<Tensor>& parts : linears) weights.push_back(&parts.at(0));
    move_to_huge_pages(weights);
    Layer layer{linear_of(linears.at(0), inputs.at(0)), linear_of(linears.at(1), inputs.at(1)),
                linear_of(linears.at(2), inputs.at(2)), linear_of(linears.at(3), inputs.at(3)),
                norm_of(norms.at(0)),  norm_of(norms.at(1))};
    bfloat16_ ? narrow_.add(std::move(layer)) : wide_.add(std::move(layer));
  }

  // Layer calls numbers[0] on the first counts[0] rows, and so on.
  Tensor project(const Tensor& hidden, const Tensor& rows, const std::vector<int64_t>& numbers,
                 const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
    return with_layers([&](const auto& layers) {
      check_hidden(layers, hidden);
      check(layers, hidden.size(0), rows, numbers, counts, runs, factors);
      return layers.project(hidden, rows, Pass(numbers, counts, runs_of(runs), factors, layers.sites()));
    });
  }

  Tensor finish(const Tensor& hidden, const Tensor& rows, const Tensor& attended, const std::vector<int64_t>& numbers,
                const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
    return with_layers([&](const auto& layers) {
      check_hidden(layers, hidden);
      check(layers, hidden.size(0), rows, numbers, counts, runs, factors);
      TORCH_CHECK(attended.is_contiguous() && attended.scalar_type() == hidden.scalar_type() &&
                      attended.sizes() == at::IntArrayRef({rows.size(0), layers.joined()}),
                  "attended must be a contiguous matrix of the rows, like hidden");
      return layers.finish(hidden, rows, attended, Pass(numbers, counts, runs_of(runs), factors, layers.sites()));
    });
  }

  // A depth of `count` generations, checked; see Decoding::add.
  Pass decoding_pass(int64_t count, const Tensor& rows, const std::vector<int64_t>& numbers,
                     const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
    return with_layers([&](const auto& layers) {
      check(layers, count, rows, numbers, counts, runs, factors);
      return Pass(numbers, counts, runs_of(runs), factors, layers.sites());
    });
  }

  Tensor decode(const Tensor& hidden, const std::vector<DecodingDepth>& depths, const AttentionShape& shape,
                const Positions& positions) const {
    return with_layers([&](const auto& layers) {
      check_hidden(layers, hidden);
      return layers.decode(hidden, depths, shape, positions);
    });
  }

  // Depths first..end of a pass; see Depths.
  Tensor run(const Tensor& hidden, int64_t first, int64_t end, const Requests& requests, const Tensor& factors,
             const AttentionShape& shape, const Positions& positions, int64_t& routed_layers) const {
    return with_layers([&](const auto& layers) {
      check_hidden(layers, hidden);
      check_factors(layers, factors);
      TORCH_CHECK(0 <= first && first < end && end <= layers.depth(), "no depths ", first, " to ", end);
      return layers.run(hidden, first, end, requests, factors, shape, positions, routed_layers);
    });
  }

  // The kernels read and write heads where the shape says that they are.
  void check_shape(const AttentionShape& shape) const {
    TORCH_CHECK(shape.shares_evenly(), "query heads must share key heads evenly");
    TORCH_CHECK(with_layers([&](const auto& layers) { return layers.has_heads(shape); }), "the layers have no ",
                shape.num_heads, " and ", shape.num_kv_heads, " heads of ", shape.head_dim);
  }

  int64_t depth() const { return wide_.depth(); }
  at::ScalarType dtype() const { return bfloat16_ ? at::kBFloat16 : at::kFloat; }

 private:
  // Shapes and types, once a pass: what the kernels read lies inside what was handed over.
  template <class L>
  void check_hidden(const L& layers, const Tensor& hidden) const {
    TORCH_CHECK(hidden.is_contiguous() && hidden.dim() == 2 && hidden.size(1) == layers.width() &&
                    hidden.scalar_type() == dtype(),
                "hidden must be a contiguous matrix of the layers' width and type");
  }

  template <class L>
  void check_factors(const L& layers, const Tensor& factors) const {
    TORCH_CHECK(factors.is_contiguous() && factors.scalar_type() == at::kLong && factors.dim() == 3 &&
                    factors.size(1) == layers.sites() && factors.size(2) == 5,
                "factors must be [members, sites, 5]");
  }

  // `rows` are of `count` hidden states.
  template <class L>
  void check(const L& layers, int64_t count, const Tensor& rows, const std::vector<int64_t>& numbers,
             const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
    TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kLong && rows.dim() == 1, "rows must be [n]");
    TORCH_CHECK(numbers.size() == counts.size(), "there must be a count of rows for each layer call");
    TORCH_CHECK(runs.scalar_type() == at::kLong && runs.dim() == 2 && runs.size(1) == 3, "runs must be [r, 3]");
    check_factors(layers, factors);
    int64_t total = 0;
    for (size_t i = 0; i < numbers.size(); ++i) {
      TORCH_CHECK(0 <= numbers[i] && numbers[i] < layers.size() && counts[i] >= 0, "no such layer call");
      total += counts[i];
    }
    TORCH_CHECK(total == rows.size(0), "the calls have ", total, " rows, not ", rows.size(0));
    const int64_t* index = rows.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < total; ++i)
      TORCH_CHECK(0 <= index[i] && index[i] < count, "no row ", index[i], " in hidden");
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

// A pass, which runs through as many depths at a time as it is asked to.
struct Depths : torch::CustomClassHolder {
  // A line of `requests` [r, 8] has the number of tokens, how many cached ones are before them, the adapter's place in the
  // batch, how many of the first tokens vote (0 where a route is pinned or nothing mixes), the score (0: votes, 1:
  // softmax, 2: sigmoid), how many layers are chosen, and from which token on how many are needed of the last depth.
  // `pages` [r, streams, p] are those of the own layers' stream and of each choice's, -1 for a request that keeps no keys
  // and values, and `caches` the memory [pages, 2 · kv heads, page tokens, head_dim] of each depth. `gates` [members, T, 2] are the addresses of
  // the weight and bias of each adapter's gates, 0 where a depth does not mix; `weights` [members, T, 2] those of own and
  // routed layers. `chosen` and `shares` [T, r, 2] are the layers of each route and their shares: given where it is
  // pinned, written where a request votes.
  Depths(c10::intrusive_ptr<PackedLayers> layers, const Tensor& requests, Tensor pages, std::vector<Tensor> caches,
         const Tensor& gates, const Tensor& weights, Tensor chosen, Tensor shares, Tensor factors)
      : layers_(std::move(layers)),
        chosen_(std::move(chosen)),
        shares_(std::move(shares)),
        factors_(std::move(factors)) {
    const int64_t depth = layers_->depth();
    TORCH_CHECK(requests.scalar_type() == at::kLong && requests.dim() == 2 && requests.size(0) > 0 &&
                    requests.size(1) == 8, "requests must be [r, 8]");
    TORCH_CHECK(pages.is_contiguous() && pages.scalar_type() == at::kLong && pages.dim() == 3 && pages.numel() > 0 &&
                    pages.size(0) == requests.size(0), "pages must be [r, streams, p]");
    requests_.streams = {std::move(pages), std::move(caches)};
    requests_.members = gates.size(0);
    const std::vector<int64_t> table{requests_.members, depth, 2}, choices{depth, requests.size(0), kMaxChoices};
    TORCH_CHECK(gates.scalar_type() == at::kLong && gates.sizes() == table && weights.scalar_type() == at::kFloat &&
                    weights.sizes() == table, "gates and weights must be [members, T, 2]");
    TORCH_CHECK(chosen_.is_contiguous() && chosen_.scalar_type() == at::kLong && chosen_.sizes() == choices &&
                    shares_.is_contiguous() && shares_.scalar_type() == at::kFloat && shares_.sizes() == choices,
                "choices must be [T, r, 2]");
    TORCH_CHECK(factors_.size(0) == requests_.members, "there must be factors of every member");
    requests_.chosen = chosen_.mutable_data_ptr<int64_t>();
    requests_.shares = shares_.mutable_data_ptr<float>();
    add_mixtures(gates.accessor<int64_t, 3>(), weights.accessor<float, 3>());
    add_requests(requests.accessor<int64_t, 2>());
  }

  // Hidden states [n, d] → what depths first..end make of them, as in `Layers::run`. `past` [n] counts the tokens before
  // each; cos and sin [n, head_dim] are their rotation, or empty.
  Tensor run(const Tensor& hidden, int64_t first, int64_t end, int64_t num_heads, int64_t num_kv_heads,
             int64_t head_dim, double scaling, bool causal, int64_t window, const Tensor& past, const Tensor& cos,
             const Tensor& sin) {
    TORCH_CHECK(hidden.dim() == 2 && hidden.size(0) == tokens_, "hidden must have ", tokens_, " rows");
    const AttentionShape shape{num_heads, num_kv_heads, head_dim, static_cast<float>(scaling), causal, window};
    layers_->check_shape(shape);
    const Positions positions = checked(past, cos, sin, tokens_, head_dim);
    for (const Tensor& cache : requests_.streams.caches) check_cache(cache, layers_->dtype(), shape);
    return layers_->run(hidden, first, end, requests_, factors_, shape, positions, routed_layers_);
  }

  // How many routed layers have run, summed over depths.
  int64_t routed_layers() const { return routed_layers_; }

 private:
  void add_mixtures(const at::TensorAccessor<int64_t, 3>& gates, const at::TensorAccessor<float, 3>& weights) {
    for (int64_t t = 0; t < layers_->depth(); ++t)
      for (int64_t m = 0; m < requests_.members; ++m)
        requests_.mixtures.push_back({reinterpret_cast<const float*>(gates[m][t][0]),
                                      reinterpret_cast<const float*>(gates[m][t][1]), weights[m][t][0],
                                      weights[m][t][1]});
  }

  void add_requests(const at::TensorAccessor<int64_t, 2>& given) {
    const int64_t most = std::min(kMaxChoices, layers_->depth());
    for (int64_t r = 0; r < given.size(0); ++r) {
      const auto line = given[r];
      const Request request{tokens_, tokens_ + line[0], line[1], line[2], line[3], line[5], static_cast<Score>(line[4]),
                            line[6], line[7], requests_.ballots()};
      TORCH_CHECK(line[0] > 0 && 0 <= line[1] && 0 <= line[2] && line[2] < requests_.members && 0 <= line[3] &&
                      line[3] <= line[0] && 0 <= line[4] && line[4] <= 2 && 0 <= line[5] && line[5] <= most &&
                      0 <= line[6] && line[7] > 0 && line[6] + line[7] <= line[0], "request ", r, " cannot be so");
      requests_.all.push_back(request);
      requests_.voters.insert(requests_.voters.end(), request.voters, r);
      tokens_ = request.end;
      check_pinned(r);
      check_pages(r);
    }
  }

  void check_pages(int64_t r) const {
    const Request& request = requests_.all[r];
    const Streams& streams = requests_.streams;
    if (!streams.are_of(r)) {
      TORCH_CHECK(request.past == 0, "request ", r, " has no pages of earlier tokens");
      return;
    }
    TORCH_CHECK(static_cast<int64_t>(streams.caches.size()) == layers_->depth(), "there must be a cache of each depth");
    const int64_t used = 1 + request.top_k;
    TORCH_CHECK(used <= streams.pages.size(1), "request ", r, " has too few streams");
    for (const Tensor& cache : streams.caches) {
      TORCH_CHECK(cache.dim() == 4 && request.past + request.count() <= streams.pages.size(2) * cache.size(2),
                  "a token of request ", r, " has no page");
      for (int64_t i = 0; i < used * streams.pages.size(2); ++i) {
        const int64_t page = streams.numbers(r, 0)[i];
        TORCH_CHECK(0 <= page && page < cache.size(0), "request ", r, " has a page that is not in the cache");
      }
    }
  }

  void check_pinned(int64_t r) const {
    const Request& request = requests_.all[r];
    for (int64_t t = 0; request.voters == 0 && t < layers_->depth(); ++t)
      for (int64_t c = 0; requests_.mixture(t, r).mixes() && c < request.top_k; ++c) {
        const int64_t layer = chosen_[t][r][c].item<int64_t>();
        TORCH_CHECK(0 <= layer && layer < layers_->depth(), "request ", r, " has no layer pinned at depth ", t);
      }
  }

  c10::intrusive_ptr<PackedLayers> layers_;
  Tensor chosen_, shares_, factors_;
  Requests requests_;
  int64_t tokens_ = 0, routed_layers_ = 0;
};

// Running generations that all take one more token in a step, depth by depth as Python has planned it.
struct Decoding : torch::CustomClassHolder {
  Decoding(c10::intrusive_ptr<PackedLayers> layers, int64_t count, int64_t num_heads, int64_t num_kv_heads,
           int64_t head_dim, double scaling, int64_t window)
      : layers_(std::move(layers)),
        count_(count),
        shape_{num_heads, num_kv_heads, head_dim, static_cast<float>(scaling), true, window} {
    layers_->check_shape(shape_);
  }

  // The next depth: layer calls and their numbers of places, of which the first takes all rows, the row of each place,
  // runs [r, 3], the pages [places, p], the depth's cache, and what `mix` wants where something mixes, else nothing.
  void add(const std::vector<int64_t>& numbers, const std::vector<int64_t>& counts, const Tensor& rows,
           const Tensor& runs, const Tensor& factors, const Tensor& pages, const Tensor& cache,
           const std::vector<Tensor>& mixing) {
    DecodingDepth depth{
        layers_->decoding_pass(count_, rows, numbers, counts, runs, factors), rows, pages, cache, {}};
    TORCH_CHECK(counts.at(0) == count_, "the own layer takes all rows");
    check_cache(cache, layers_->dtype(), shape_);
    TORCH_CHECK(pages.is_contiguous() && pages.scalar_type() == at::kLong && pages.dim() == 2 &&
                    pages.size(0) == rows.size(0) && pages.size(1) > 0 && pages.min().item<int64_t>() >= 0 &&
                    pages.max().item<int64_t>() < cache.size(0), "pages must be [places, p], all in the cache");
    if (!mixing.empty()) {
      const Tensor bounds = at::arange(count_ + 1);
      depth.terms = terms_of(bounds, mixing.at(0), mixing.at(1), mixing.at(2), rows.size(0));
    }
    depths_.push_back(std::move(depth));
  }

  // Hidden states [n, d] of one new token each, with `past` [n] tokens in the cache before it and its rotation
  // [n, head_dim], empty where there is none → the output [n, d] of the last depth.
  Tensor step(const Tensor& hidden, const Tensor& past, const Tensor& cos, const Tensor& sin) const {
    TORCH_CHECK(hidden.dim() == 2 && hidden.size(0) == count_, "hidden must have ", count_, " rows");
    const Positions positions = checked(past, cos, sin, count_, shape_.head_dim);
    const int64_t* before = past.const_data_ptr<int64_t>();
    const auto [least, most] = std::minmax_element(before, before + count_);
    for (const DecodingDepth& depth : depths_)
      TORCH_CHECK(count_ == 0 || (*least >= 0 && *most < depth.pages.size(1) * depth.cache.size(2)),
                  "a token has no page");
    return layers_->decode(hidden, depths_, shape_, positions);
  }

 private:
  c10::intrusive_ptr<PackedLayers> layers_;
  int64_t count_;
  AttentionShape shape_;
  std::vector<DecodingDepth> depths_;
};

// The linear layer before the softmax over a vocabulary of V tokens, and their embedding.
struct PackedVocabulary : torch::CustomClassHolder {
  // [weights, bias, scales, pieces] as in `Linear`, in the type of hidden states.
  PackedVocabulary(const std::vector<Tensor>& parts, int64_t width) : vocabulary_(linear_of(parts, width)) {}

  // Hidden states [n, d] → logits [n, V].
  Tensor logits(const Tensor& hidden) const {
    const Linear& linear = vocabulary_.linear();
    TORCH_CHECK(hidden.is_contiguous() && hidden.dim() == 2 && hidden.size(1) == linear.inputs &&
                    hidden.scalar_type() == linear.weights.scalar_type(), "hidden must be [n, d], like the weights");
    return vocabulary_.logits(hidden);
  }

  // The weights [n, d] of some tokens [n].
  Tensor embed(const Tensor& tokens) const {
    TORCH_CHECK(tokens.is_contiguous() && tokens.scalar_type() == at::kLong && tokens.dim() == 1, "tokens must be [n]");
    const int64_t* token = tokens.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tokens.size(0); ++i)
      TORCH_CHECK(0 <= token[i] && token[i] < vocabulary_.linear().outputs, "no token ", token[i]);
    return vocabulary_.embed(tokens);
  }

 private:
  Vocabulary vocabulary_;
};

}  // namespace molex
