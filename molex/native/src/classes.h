// What Python holds. Shapes and types are checked here: what the kernels read lies inside what was handed over.
#pragma once

#include <torch/custom_class.h>

#include <algorithm>
#include <string>
#include <vector>

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
      check_hidden(layers, hidden);
      check(layers, hidden.size(0), rows, numbers, counts, runs, factors);
      return layers.project(hidden, rows, Pass(numbers, counts, runs, factors, layers.sites()));
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
      return layers.finish(hidden, rows, attended, Pass(numbers, counts, runs, factors, layers.sites()));
    });
  }

  // A depth of `count` generations, checked; see Decoding::add.
  Pass decoding_pass(int64_t count, const Tensor& rows, const std::vector<int64_t>& numbers,
                     const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
    return with_layers([&](const auto& layers) {
      check(layers, count, rows, numbers, counts, runs, factors);
      return Pass(numbers, counts, runs, factors, layers.sites());
    });
  }

  Tensor decode(const Tensor& hidden, const std::vector<DecodingDepth>& depths, const AttentionShape& shape,
                const Positions& positions) const {
    return with_layers([&](const auto& layers) {
      check_hidden(layers, hidden);
      return layers.decode(hidden, depths, shape, positions);
    });
  }

  at::ScalarType dtype() const { return bfloat16_ ? at::kBFloat16 : at::kFloat; }

 private:
  // Shapes and types, once a pass: what the kernels read lies inside what was handed over.
  template <class L>
  void check_hidden(const L& layers, const Tensor& hidden) const {
    TORCH_CHECK(hidden.is_contiguous() && hidden.dim() == 2 && hidden.size(1) == layers.width() &&
                    hidden.scalar_type() == dtype(),
                "hidden must be a contiguous matrix of the layers' width and type");
  }

  // `rows` are of `count` hidden states.
  template <class L>
  void check(const L& layers, int64_t count, const Tensor& rows, const std::vector<int64_t>& numbers,
             const std::vector<int64_t>& counts, const Tensor& runs, const Tensor& factors) const {
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

// Running generations that all take one more token in a step, depth by depth as Python has planned it.
struct Decoding : torch::CustomClassHolder {
  Decoding(c10::intrusive_ptr<PackedLayers> layers, int64_t count, int64_t num_heads, int64_t num_kv_heads,
           int64_t head_dim, double scaling, int64_t window)
      : layers_(std::move(layers)),
        count_(count),
        shape_{num_heads, num_kv_heads, head_dim, static_cast<float>(scaling), true, window} {
    TORCH_CHECK(num_heads % num_kv_heads == 0, "query heads must share key heads evenly");
  }

  // The next depth: layer calls and their numbers of places, of which the first takes all rows, the row of each place,
  // runs [r, 3], the pages [places, p], the depth's cache, and what `mix` wants where something mixes, else nothing.
  void add(const std::vector<int64_t>& numbers, const std::vector<int64_t>& counts, const Tensor& rows,
           const Tensor& runs, const Tensor& factors, const Tensor& pages, const Tensor& cache,
           const std::vector<Tensor>& mixing) {
    DecodingDepth depth{
        layers_->decoding_pass(count_, rows, numbers, counts, runs, factors), rows, pages, cache, {}};
    TORCH_CHECK(counts.at(0) == count_, "the own layer takes all rows");
    TORCH_CHECK(cache.is_contiguous() && cache.dim() == 4 && cache.scalar_type() == layers_->dtype() &&
                    cache.size(1) == 2 * shape_.num_kv_heads && cache.size(3) == shape_.head_dim,
                "cache must be [pages, 2 · kv heads, tokens, head_dim], like the layers");
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
    TORCH_CHECK(past.is_contiguous() && past.scalar_type() == at::kLong && past.sizes() == at::IntArrayRef({count_}),
                "past must be [n]");
    for (const Tensor& part : {cos, sin})
      TORCH_CHECK(part.numel() == 0 || (part.is_contiguous() && part.scalar_type() == at::kFloat &&
                                        part.sizes() == at::IntArrayRef({count_, shape_.head_dim})),
                  "cos and sin must be [n, head_dim] in float32");
    TORCH_CHECK(cos.numel() == sin.numel(), "cos and sin belong together");
    const int64_t* before = past.const_data_ptr<int64_t>();
    const auto [least, most] = std::minmax_element(before, before + count_);
    for (const DecodingDepth& depth : depths_)
      TORCH_CHECK(count_ == 0 || (*least >= 0 && *most < depth.pages.size(1) * depth.cache.size(2)),
                  "a token has no page");
    return layers_->decode(hidden, depths_, shape_, {past, cos, sin});
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
      TORCH_CHECK(0 <= token[i] && token[i] < vocabulary_.linear().outputs(), "no token ", token[i]);
    return vocabulary_.embed(tokens);
  }

 private:
  Vocabulary vocabulary_;
};

}  // namespace molex
