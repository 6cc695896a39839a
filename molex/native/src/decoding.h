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
#include "stream.h"
#include "tile.h"
#include "vectors.h"

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

// What runs at one depth. A place is a row in a layer call.
struct DecodingDepth {
  int64_t places() const { return rows.size(0); }

  template <class T>
  Stream<T> cached(int64_t place) const {
    return {cache, pages.const_data_ptr<int64_t>() + place * pages.size(1)};
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

// Neighbouring tokens of one page, for kHeads query heads that share a key head: `dim` values of a head lie together.
template <class T, int64_t kHeads>
struct PageAttention {
  // scores[h · stride + i] = queries[h] · keys[i].
  static void score(const T* keys, int64_t count, const float* queries, int64_t dim, float* scores, int64_t stride) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) score_some<4>(keys + i * dim, queries, dim, scores + i, stride);
    for (; i < count; ++i) score_some<1>(keys + i * dim, queries, dim, scores + i, stride);
  }

  // sums[h] += Σ_i weights[h · stride + i] · values[i].
  static void add(const T* values, int64_t count, const float* weights, int64_t stride, int64_t dim, float* sums) {
    int64_t c = 0;
    for (; c + 2 * kVector <= dim; c += 2 * kVector) add_some<2>(values + c, count, weights, stride, dim, sums + c);
    for (; c + kVector <= dim; c += kVector) add_some<1>(values + c, count, weights, stride, dim, sums + c);
    for (; c < dim; ++c)
      for (int64_t h = 0; h < kHeads; ++h)
        for (int64_t i = 0; i < count; ++i)
          sums[h * dim + c] += weights[h * stride + i] * static_cast<float>(values[i * dim + c]);
  }

 private:
  template <int64_t kTokens>
  static void score_some(const T* keys, const float* queries, int64_t dim, float* scores, int64_t stride) {
    Vector sums[kHeads][kTokens] = {};
    int64_t c = 0;
    for (; c + kVector <= dim; c += kVector)
      for (int64_t i = 0; i < kTokens; ++i) {
        const Vector key = widened(keys + i * dim + c);
        for (int64_t h = 0; h < kHeads; ++h) sums[h][i] += key * widened(queries + h * dim + c);
      }
    for (int64_t h = 0; h < kHeads; ++h) {
      float* found = scores + h * stride;
      if constexpr (kTokens == 4)
        sums_of(sums[h], found);
      else
        found[0] = sum_of(sums[h][0]);
      if (c < dim)
        for (int64_t i = 0; i < kTokens; ++i) found[i] += dot(keys + i * dim + c, queries + h * dim + c, dim - c);
    }
  }

  // For kVectors vectors of the values.
  template <int64_t kVectors>
  static void add_some(const T* values, int64_t count, const float* weights, int64_t stride, int64_t dim, float* sums) {
    Vector total[kHeads][kVectors];
    for (int64_t h = 0; h < kHeads; ++h)
      for (int64_t v = 0; v < kVectors; ++v) total[h][v] = widened(sums + h * dim + v * kVector);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < kVectors; ++v) {
        const Vector value = widened(values + i * dim + v * kVector);
        for (int64_t h = 0; h < kHeads; ++h) total[h][v] += value * weights[h * stride + i];
      }
    for (int64_t h = 0; h < kHeads; ++h)
      for (int64_t v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(sums + h * dim + v * kVector) = total[h][v];
  }
};

// What some query heads, whose scaled and rotated queries are given, find in tokens begin..end of a stream.
template <class T, int64_t kHeads>
void attend_heads(const Stream<T>& stream, int64_t kv_head, int64_t begin, int64_t end, const float* queries,
                  T* result) {
  const int64_t dim = stream.dim, stride = end - begin, value_head = stream.heads / 2 + kv_head;
  static thread_local std::vector<float> memory;
  memory.resize(kHeads * (dim + stride));
  float* sums = memory.data();
  float* scores = sums + kHeads * dim;
  using Page = PageAttention<T, kHeads>;
  stream.for_each_page(begin, end, [&](int64_t first, int64_t count) {
    stream.fetch(value_head, first, count);
    Page::score(stream.at(kv_head, first), count, queries, dim, scores + first - begin, stride);
  });
  float totals[kHeads];
  for (int64_t h = 0; h < kHeads; ++h) totals[h] = softmax(scores + h * stride, stride);
  std::fill_n(sums, kHeads * dim, 0.0f);
  stream.for_each_page(begin, end, [&](int64_t first, int64_t count) {
    if (kv_head + 1 < stream.heads / 2) stream.fetch(kv_head + 1, first, count);
    Page::add(stream.at(value_head, first), count, scores + first - begin, stride, dim, sums);
  });
  for (int64_t h = 0; h < kHeads; ++h)
    for (int64_t c = 0; c < dim; ++c) result[h * dim + c] = static_cast<T>(sums[h * dim + c] / totals[h]);
}

// `heads` [columns] holds the queries, keys and values of one token: keep its key and value of one key head in the
// stream, and write what the query heads of that key head find there [num_heads · head_dim].
template <class T>
void attend_cached(const AttentionShape& shape, const Position& position, const T* heads, const Stream<T>& stream,
                   int64_t kv_head, T* result) {
  const int64_t dim = shape.head_dim, shared = shape.num_heads / shape.num_kv_heads;
  const T* key = heads + (shape.num_heads + kv_head) * dim;
  placed(key, position, dim, 1.0f, stream.key(kv_head, position.past));
  const T* value = key + shape.num_kv_heads * dim;
  std::copy(value, value + dim, stream.value(kv_head, position.past));

  static thread_local std::vector<float> queries;
  queries.resize(shared * dim);
  const int64_t first_head = kv_head * shared;
  for (int64_t h = 0; h < shared; ++h)
    placed(heads + (first_head + h) * dim, position, dim, shape.scaling, queries.data() + h * dim);
  const int64_t end = position.past + 1, begin = shape.window ? std::max(end - shape.window, int64_t{0}) : 0;
  in_fours(shared, [&]<int64_t kHeads>(int64_t h) {
    attend_heads<T, kHeads>(stream, kv_head, begin, end, queries.data() + h * dim, result + (first_head + h) * dim);
  });
}

}  // namespace molex
