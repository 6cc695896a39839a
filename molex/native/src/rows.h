// Work on single rows between layers: what gates make of them, and the mixture of layers' outputs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "low_rank.h"

namespace molex {

// Rows that are worth a thread.
constexpr int64_t kRowsPerThread = 64;

// A linear gate W [outputs, width], b [outputs], and the end of the rows that it is for.
struct GateRows {
  const float* weight;
  const float* bias;
  int64_t end;
};

// y[i] = W x[tokens[i]] + b [n, outputs], with the gate of row i.
template <class T>
void gate_rows(const T* x, int64_t width, const int64_t* tokens, const std::vector<GateRows>& gates,
               int64_t outputs, float* y) {
  const int64_t n = gates.empty() ? 0 : gates.back().end;
  at::parallel_for(0, n, kRowsPerThread, [&](int64_t begin, int64_t end) {
    auto gate = gates.begin();
    for (int64_t i = begin; i < end; ++i) {
      while (gate->end <= i) ++gate;
      dots(x + tokens[i] * width, gate->weight, outputs, width, 1.0f, y + i * outputs);
      for (int64_t j = 0; j < outputs; ++j) y[i * outputs + j] += gate->bias[j];
    }
  });
}

// A part of a request's sum: where the rows of a layer's output begin, and what they are multiplied by.
struct Term {
  int64_t row;
  float weight;
};

// y [width] = Σ_terms weight · x[row + i], which may be where one of these rows lies.
template <class T>
void mix_row(const T* x, const std::vector<Term>& terms, int64_t i, int64_t width, T* y) {
  static thread_local std::vector<float> sum;
  sum.assign(width, 0.0f);
  for (const Term& term : terms) {
    const T* source = x + (term.row + i) * width;
    for (int64_t j = 0; j < width; ++j) sum[j] += term.weight * static_cast<float>(source[j]);
  }
  for (int64_t j = 0; j < width; ++j) y[j] = static_cast<T>(sum[j]);
}

// The same for the rows bounds[r]..bounds[r + 1] of each request r, which has its own terms.
template <class T>
void mix_rows(const T* x, const std::vector<std::vector<Term>>& terms, const int64_t* bounds, int64_t width, T* y) {
  const int64_t requests = terms.size();
  at::parallel_for(0, bounds[requests], kRowsPerThread, [&](int64_t begin, int64_t end) {
    int64_t r = std::upper_bound(bounds, bounds + requests, begin) - bounds - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (bounds[r + 1] <= i) ++r;
      mix_row(x, terms[r], i - bounds[r], width, y + i * width);
    }
  });
}

// What the rows of each request are the sum of; see `mix`. There are `rows` outputs.
inline std::vector<std::vector<Term>> terms_of(const at::Tensor& bounds, const at::Tensor& own, const at::Tensor& visits,
                                        const at::Tensor& weights, int64_t rows) {
  TORCH_CHECK(bounds.is_contiguous() && own.is_contiguous() && visits.is_contiguous() && weights.is_contiguous(),
              "inputs must be contiguous");
  const int64_t requests = own.size(0);
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
  TORCH_CHECK(end == rows, "the requests and visits have ", end, " rows, not ", rows);
  return terms;
}

}  // namespace molex
