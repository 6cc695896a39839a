// One more token of running generations: attention to what is cached, page by page.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "low_rank.h"
#include "pass.h"
#include "rows.h"

namespace molex {

// Where one new token stands: how many are before it, and what its queries and keys are rotated by [head_dim];
// nullptr where the family does not rotate them.
struct Position {
  int64_t past;
  const float* cos;
  const float* sin;
};

// Of all rows: past [n], cos and sin [n, head_dim] or empty.
struct Positions {
  Position of(int64_t row) const {
    if (cos.numel() == 0) return {past.const_data_ptr<int64_t>()[row], nullptr, nullptr};
    const int64_t first = row * cos.size(1);
    return {past.const_data_ptr<int64_t>()[row], cos.const_data_ptr<float>() + first,
            sin.const_data_ptr<float>() + first};
  }
  at::Tensor past, cos, sin;
};

// The keys and values of one stream at one depth: its pages, each [2 · kv heads, page tokens, head_dim].
template <class T>
struct Stream {
  T* at(int64_t head, int64_t token) const {
    return pages + ((numbers[token / page_tokens] * heads + head) * page_tokens + token % page_tokens) * dim;
  }
  T* pages;
  const int64_t* numbers;
  int64_t heads, page_tokens, dim;
};

// What runs at one depth. A place is a row in a layer call.
struct DecodingDepth {
  int64_t places() const { return rows.size(0); }

  template <class T>
  Stream<T> cached(int64_t place) const {
    return {cache.data_ptr<T>(), pages.const_data_ptr<int64_t>() + place * pages.size(1), cache.size(1),
            cache.size(2), cache.size(3)};
  }

  Pass pass;
  at::Tensor rows;   // [places] rows of the hidden states
  at::Tensor pages;  // [places, p] pages of each place's stream
  at::Tensor cache;  // [pages, 2 · kv heads, page tokens, head_dim]
  std::vector<std::vector<Term>> terms;  // of each row; none where nothing mixes
};

// Rotate x [dim] as RoPE does, halves as pairs (Su et al., 2021, in the order of GPT-NeoX), times `scale`.
template <class T, class U>
void rotate(const T* x, const Position& position, int64_t dim, float scale, U* y) {
  const int64_t half = dim / 2;
  for (int64_t c = 0; c < half; ++c) {
    const float first = static_cast<float>(x[c]) * scale, second = static_cast<float>(x[c + half]) * scale;
    y[c] = static_cast<U>(first * position.cos[c] - second * position.sin[c]);
    y[c + half] = static_cast<U>(second * position.cos[c + half] + first * position.sin[c + half]);
  }
}

template <class T, class U>
void placed(const T* x, const Position& position, int64_t dim, float scale, U* y) {
  if (position.cos) {
    rotate(x, position, dim, scale, y);
  } else {
    for (int64_t c = 0; c < dim; ++c) y[c] = static_cast<U>(static_cast<float>(x[c]) * scale);
  }
}

// Turn scores [n] into weights; returns what their sum is divided by.
inline float softmax(float* x, int64_t n) {
  float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    x[i] = exponential(x[i] - most);
    total += x[i];
  }
  return total;
}

// `heads` [columns] holds the queries, keys and values of one token: keep its key and value of one key head in the
// stream, and write what the query heads of that key head find there [num_heads · head_dim].
template <class T>
void attend_cached(const AttentionShape& shape, const Position& position, const T* heads, const Stream<T>& stream,
                   int64_t kv_head, T* result) {
  const int64_t dim = shape.head_dim, shared = shape.num_heads / shape.num_kv_heads;
  const int64_t first_head = kv_head * shared, value_head = shape.num_kv_heads + kv_head;
  const T* key = heads + (shape.num_heads + kv_head) * dim;
  placed(key, position, dim, 1.0f, stream.at(kv_head, position.past));
  const T* value = key + shape.num_kv_heads * dim;
  std::copy(value, value + dim, stream.at(value_head, position.past));

  const int64_t end = position.past + 1, begin = shape.window ? std::max(end - shape.window, int64_t{0}) : 0;
  const int64_t count = end - begin;
  static thread_local std::vector<float> memory;
  memory.resize(shared * (dim + dim + count));
  float* queries = memory.data();
  float* sums = queries + shared * dim;
  float* scores = sums + shared * dim;
  for (int64_t h = 0; h < shared; ++h)
    placed(heads + (first_head + h) * dim, position, dim, shape.scaling, queries + h * dim);
  for (int64_t i = 0; i < count; ++i) {
    const T* k = stream.at(kv_head, begin + i);
    for (int64_t h = 0; h < shared; ++h) scores[h * count + i] = dot(k, queries + h * dim, dim);
  }
  std::fill_n(sums, shared * dim, 0.0f);
  for (int64_t h = 0; h < shared; ++h) {
    float* sum = sums + h * dim;
    const float total = softmax(scores + h * count, count);
    for (int64_t i = 0; i < count; ++i) {
      const T* v = stream.at(value_head, begin + i);
      const float weight = scores[h * count + i];
      for (int64_t c = 0; c < dim; ++c) sum[c] += weight * static_cast<float>(v[c]);
    }
    for (int64_t c = 0; c < dim; ++c) result[(first_head + h) * dim + c] = static_cast<T>(sum[c] / total);
  }
}

}  // namespace molex
