// Attention of requests that lie side by side, each to its own tokens.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "elementwise.h"
#include "products.h"
#include "stream.h"

namespace molex {

// Keys of a step of the running softmax.
constexpr int64_t kKeys = 64;

struct AttentionShape {
  int64_t num_heads, num_kv_heads, head_dim;
  float scaling;
  bool causal;
  int64_t window;  // tokens that each sees, itself included; 0: all

  int64_t columns() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  bool shares_evenly() const { return num_kv_heads > 0 && num_heads % num_kv_heads == 0; }
};

// The tokens of a request: `count` whose queries, keys and values lie side by side, [count, columns], behind `past` ones
// whose keys and values are in a stream.
template <class T>
struct Tokens {
  int64_t total() const { return past + count; }
  const T* head(const AttentionShape& shape, int64_t number, int64_t i) const {
    return rows + i * shape.columns() + number * shape.head_dim;
  }
  // Of all tokens, the earlier ones first.
  const T* key(const AttentionShape& shape, int64_t kv_head, int64_t i) const {
    return i < past ? earlier->key(kv_head, i) : head(shape, shape.num_heads + kv_head, i - past);
  }
  const T* value(const AttentionShape& shape, int64_t kv_head, int64_t i) const {
    return i < past ? earlier->value(kv_head, i)
                    : head(shape, shape.num_heads + shape.num_kv_heads + kv_head, i - past);
  }

  const T* rows;
  int64_t count, past = 0;
  const Stream<T>* earlier = nullptr;
};

// The keys lo..hi of a tile, by their places in it, that a query may see.
struct Visible {
  Visible(const AttentionShape& shape, int64_t query, int64_t first_key, int64_t keys) {
    int64_t end = keys, begin = 0;
    if (shape.causal) end = std::clamp(query + 1 - first_key, int64_t{0}, keys);
    if (shape.window) begin = std::clamp(query + 1 - shape.window - first_key, int64_t{0}, end);
    lo = static_cast<int32_t>(begin), hi = static_cast<int32_t>(end);
  }
  bool has(int32_t key) const { return lo <= key && key < hi; }

  int32_t lo = 0, hi = 0;
};

// A kernel is compiled for each number of keys: three have to do.
inline int64_t padded_keys(int64_t keys) { return keys <= 16 ? 16 : (keys <= 32 ? 32 : kKeys); }

// Keys and values of one head in float32: each tile of keys transposed, [head_dim, padded], and padding zero.
struct HeadMemory {
  template <class T>
  void load(const AttentionShape& shape, const Tokens<T>& tokens, int64_t kv_head) {
    const int64_t dim = shape.head_dim, count = tokens.total(), room = (count + kKeys - 1) / kKeys * kKeys * dim;
    if (static_cast<int64_t>(rows.size()) < room) transposed.resize(room), rows.resize(room);
    for (int64_t i = 0; i < count; ++i) {
      const T* value = tokens.value(shape, kv_head, i);
      for (int64_t c = 0; c < dim; ++c) rows[i * dim + c] = static_cast<float>(value[c]);
    }
    for (int64_t first = 0; first < count; first += kKeys) {
      const int64_t tile = std::min(kKeys, count - first), width = padded_keys(tile);
      float* columns = transposed.data() + first * dim;
      for (int64_t i = 0; i < tile; ++i) {
        const T* key = tokens.key(shape, kv_head, first + i);
        for (int64_t c = 0; c < dim; ++c) columns[c * width + i] = static_cast<float>(key[c]);
      }
      for (int64_t c = 0; c < dim; ++c) std::fill(columns + c * width + tile, columns + (c + 1) * width, 0.0f);
      std::fill(rows.data() + (first + tile) * dim, rows.data() + (first + width) * dim, 0.0f);
    }
  }
  std::vector<float> transposed, rows;
};

// A block of queries of one head, and the softmax of their scores as far as it has come (Milakov and
// Gimelshein, 2018): outputs are sums of values times exp(score − largest), to be divided by `total`.
struct Softmax {
  void start(int64_t rows, int64_t dim) {
    queries.resize(kMaxRows * dim), outputs.resize(kMaxRows * dim), scores.resize(kMaxRows * kKeys);
    std::fill_n(outputs.data(), padded_rows(rows) * dim, 0.0f);
    std::fill_n(largest, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(total, rows, 0.0f);
  }

  // Turn the scores of a row into weights, and scale what was summed up before to the new maximum.
  // The loops run over padding too: a number of keys that is no whole number of vectors would end one by one.
  void weigh(int64_t row, const Visible& visible, int32_t padded, int64_t dim) {
    float* x = scores.data() + row * padded;
    float most = largest[row];
#pragma omp simd reduction(max : most)
    for (int32_t j = 0; j < padded; ++j) most = visible.has(j) && x[j] > most ? x[j] : most;
    if (most > largest[row] && total[row] != 0.0f) {
      const float factor = exponential(largest[row] - most);
      total[row] *= factor;
      for (int64_t c = 0; c < dim; ++c) outputs[row * dim + c] *= factor;
    }
    largest[row] = most;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int32_t j = 0; j < padded; ++j) {
      const float weight = exponential(x[j] - most);
      x[j] = visible.has(j) ? weight : 0.0f;
      sum += x[j];
    }
    total[row] += sum;
  }

  std::vector<float> queries, outputs, scores;
  float largest[kMaxRows], total[kMaxRows];
};

struct AttentionScratch {
  HeadMemory memory;
  Softmax softmax;
};

// The queries first..first + rows of those tokens of a request that lie side by side, of one head, to the keys and
// values in `scratch`; `result` is that of the first.
template <class T>
void attend_block(const AttentionShape& shape, const Tokens<T>& tokens, int64_t head, int64_t first, int64_t rows,
                  AttentionScratch& scratch, T* result) {
  const int64_t dim = shape.head_dim, m = padded_rows(rows), place = tokens.past + first;
  Softmax& softmax = scratch.softmax;
  softmax.start(rows, dim);
  for (int64_t r = 0; r < rows; ++r) {
    const T* query = tokens.head(shape, head, first + r);
    for (int64_t c = 0; c < dim; ++c) softmax.queries[r * dim + c] = static_cast<float>(query[c]) * shape.scaling;
  }
  const int64_t end = shape.causal ? std::min(tokens.total(), place + rows) : tokens.total();
  const int64_t begin = shape.window ? std::max(place + 1 - shape.window, int64_t{0}) / kKeys * kKeys : 0;
  for (int64_t key = begin; key < end; key += kKeys) {
    const int64_t keys = std::min(kKeys, tokens.total() - key), padded = padded_keys(keys);
    at::native::cpublas::brgemm(m, padded, dim, dim, padded, padded, false, softmax.queries.data(),
                                scratch.memory.transposed.data() + key * dim, softmax.scores.data());
    for (int64_t r = 0; r < rows; ++r) softmax.weigh(r, Visible(shape, place + r, key, keys), padded, dim);
    at::native::cpublas::brgemm(m, dim, padded, padded, dim, dim, true, softmax.scores.data(),
                                scratch.memory.rows.data() + key * dim, softmax.outputs.data());
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < dim; ++c)
      result[r * shape.num_heads * dim + c] = static_cast<T>(softmax.outputs[r * dim + c] / softmax.total[r]);
}

// The queries begin..end of those tokens of a request that lie side by side, of all heads that share a key head;
// `result` [end - begin, num_heads · head_dim] is what they find.
template <class T>
void attend_request(const AttentionShape& shape, const Tokens<T>& tokens, int64_t begin, int64_t end, int64_t kv_head,
                    T* result) {
  static thread_local AttentionScratch scratch;
  const int64_t shared = shape.num_heads / shape.num_kv_heads;
  scratch.memory.load(shape, tokens, kv_head);
  for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
    for (int64_t first = begin; first < end; first += kMaxRows)
      attend_block(shape, tokens, head, first, std::min(kMaxRows, end - first), scratch,
                   result + ((first - begin) * shape.num_heads + head) * shape.head_dim);
}

// `heads` [n, columns] holds queries, keys and values of each token, request i those from offsets[i] to
// offsets[i + 1]. Writes [n, num_heads · head_dim].
template <class T>
void attend(const AttentionShape& shape, const T* heads, const int64_t* offsets, int64_t requests, T* result) {
#pragma omp parallel for schedule(dynamic) num_threads(at::get_num_threads())
  for (int64_t item = 0; item < requests * shape.num_kv_heads; ++item) {
    const int64_t request = item / shape.num_kv_heads, count = offsets[request + 1] - offsets[request];
    attend_request(shape, Tokens<T>{heads + offsets[request] * shape.columns(), count}, 0, count,
                   item % shape.num_kv_heads, result + offsets[request] * shape.num_heads * shape.head_dim);
  }
}

}  // namespace molex
