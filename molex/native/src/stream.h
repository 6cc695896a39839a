// Keys and values in pages.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tile.h"
#include "vectors.h"

namespace molex {

// The keys and values of one stream at one depth: the pages `numbers` of a cache [pages, 2 · kv heads, page tokens,
// head_dim].
template <class T>
struct Stream {
  Stream(const at::Tensor& cache, const int64_t* numbers)
      : pages(cache.data_ptr<T>()),
        numbers(numbers),
        heads(cache.size(1)),
        page_tokens(cache.size(2)),
        dim(cache.size(3)) {}

  // The keys of key head h are head h, its values head `heads` / 2 + h.
  T* key(int64_t kv_head, int64_t token) const { return at(kv_head, token); }
  T* value(int64_t kv_head, int64_t token) const { return at(heads / 2 + kv_head, token); }

  T* at(int64_t head, int64_t token) const {
    return pages + ((numbers[token / page_tokens] * heads + head) * page_tokens + token % page_tokens) * dim;
  }

  // Ask memory for tokens of one page that are read soon.
  void fetch(int64_t head, int64_t first, int64_t count) const {
    const char* begin = reinterpret_cast<const char*>(at(head, first));
    const char* end = begin + count * dim * static_cast<int64_t>(sizeof(T));
    for (const char* line = begin; line < end; line += kCacheLine) _mm_prefetch(line, _MM_HINT_T0);
  }

  // Call use(first, count) for the tokens of each page between two of them.
  template <class Use>
  void for_each_page(int64_t begin, int64_t end, const Use& use) const {
    for (int64_t first = begin, next; first < end; first = next) {
      next = std::min(end, (first / page_tokens + 1) * page_tokens);
      use(first, next - first);
    }
  }

  T* pages;
  const int64_t* numbers;
  int64_t heads, page_tokens, dim;
};

// The streams of the requests of a pass.
struct Streams {
  bool are_of(int64_t request) const { return numbers(request, 0)[0] >= 0; }

  template <class T>
  Stream<T> at(int64_t depth, int64_t request, int64_t stream) const {
    return {caches[depth], numbers(request, stream)};
  }

  const int64_t* numbers(int64_t request, int64_t stream) const {
    return pages.const_data_ptr<int64_t>() + (request * pages.size(1) + stream) * pages.size(2);
  }

  at::Tensor pages;                // [requests, streams, p], -1 for a request that keeps nothing
  std::vector<at::Tensor> caches;  // of each depth
};

}  // namespace molex
