// Work on single rows between layers: what gates make of them, and the mixture of layers' outputs.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

#include "low_rank.h"

namespace molex {

// Rows that are worth a thread.
constexpr int64_t kRowsPerThread = 16;

// y[i] = W x[tokens[i]] + b [n, outputs], with the linear gate of the run that i belongs to: its W is `a` and
// its b is `b` of the factors.
template <class T>
void gate_rows(const T* x, int64_t width, const int64_t* tokens, const std::vector<Run>& runs,
               const Factors* gates, int64_t outputs, float* y) {
  const int64_t n = runs.empty() ? 0 : runs.back().end;
  at::parallel_for(0, n, kRowsPerThread, [&](int64_t begin, int64_t end) {
    auto run = runs.begin();
    for (int64_t i = begin; i < end; ++i) {
      while (run->end <= i) ++run;
      const Factors& gate = gates[run->member];
      narrow_row(x + tokens[i] * width, gate, width, y + i * outputs);
      for (int64_t j = 0; j < outputs; ++j) y[i * outputs + j] += gate.up()[j];
    }
  });
}

// What row i of a mixture is the sum of: own[i] · its own output + Σ_c weights[c, i] · routed output rows[c, i]; a
// row of -1 adds nothing.
struct Terms {
  bool defined() const { return own != nullptr; }

  const float* own = nullptr;      // [m]
  const int64_t* rows = nullptr;   // [choices, m]
  const float* weights = nullptr;  // [choices, m]
  int64_t choices = 0, m = 0;
};

// y [width] is the sum of row i; it may be where its own output lies. `routed` are the outputs that are counted.
template <class T, class U>
void mix_row(const Terms& terms, int64_t i, const T* own, const U* routed, int64_t width, T* y) {
  static thread_local std::vector<float> sum;
  sum.resize(width);
  for (int64_t j = 0; j < width; ++j) sum[j] = terms.own[i] * static_cast<float>(own[j]);
  for (int64_t c = 0; c < terms.choices; ++c) {
    const int64_t row = terms.rows[c * terms.m + i];
    if (row < 0) continue;
    const float weight = terms.weights[c * terms.m + i];
    for (int64_t j = 0; j < width; ++j) sum[j] += weight * static_cast<float>(routed[row * width + j]);
  }
  for (int64_t j = 0; j < width; ++j) y[j] = static_cast<T>(sum[j]);
}

template <class T, class U>
void mix_rows(const Terms& terms, const T* own, const U* routed, int64_t width, T* y) {
  at::parallel_for(0, terms.m, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) mix_row(terms, i, own + i * width, routed, width, y + i * width);
  });
}

}  // namespace molex
