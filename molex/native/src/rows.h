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

// y[i] = own_weights[i] · own[i] + Σ_c weights[c, i] · routed[rows[c, i]] [m, width]; a row of -1 adds nothing.
template <class T, class U>
void mix_rows(const T* own, const float* own_weights, const U* routed, const int64_t* rows, const float* weights,
              int64_t choices, int64_t m, int64_t width, T* y) {
  at::parallel_for(0, m, kRowsPerThread, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(width);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < width; ++j) sum[j] = own_weights[i] * static_cast<float>(own[i * width + j]);
      for (int64_t c = 0; c < choices; ++c) {
        const int64_t row = rows[c * m + i];
        if (row < 0) continue;
        const float weight = weights[c * m + i];
        for (int64_t j = 0; j < width; ++j) sum[j] += weight * static_cast<float>(routed[row * width + j]);
      }
      for (int64_t j = 0; j < width; ++j) y[i * width + j] = static_cast<T>(sum[j]);
    }
  });
}

}  // namespace molex
