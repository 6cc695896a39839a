// Memory for weights, in pages of 2 MiB where the system grants them.
#pragma once

#include <ATen/ATen.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "tile.h"

namespace molex {

constexpr int64_t kHugePage = int64_t{2} << 20;

inline int64_t rounded_up(int64_t bytes, int64_t step) { return (bytes + step - 1) / step * step; }

inline at::Tensor huge_pages(int64_t bytes) {
  const int64_t size = rounded_up(bytes, kHugePage);
  void* memory = std::aligned_alloc(kHugePage, size);
  if (memory == nullptr) throw std::bad_alloc();
  // Where that is refused, the pages are small ones.
  madvise(memory, size, MADV_HUGEPAGE);
  return at::from_blob(memory, {size}, [](void* kept) { std::free(kept); }, at::kByte);
}

// Copy tensors side by side into huge pages: a pass over few rows reads weights from memory at the speed at which
// it finds their pages. What would leave most of a page empty stays where it is.
inline void move_to_huge_pages(const std::vector<at::Tensor*>& tensors) {
  int64_t bytes = 0;
  for (const at::Tensor* tensor : tensors) bytes += rounded_up(tensor->nbytes(), kCacheLine);
  if (bytes < kHugePage / 2) return;
  const at::Tensor memory = huge_pages(bytes);
  int64_t begin = 0;
  for (at::Tensor* tensor : tensors) {
    const int64_t size = tensor->nbytes();
    const at::Tensor place = memory.narrow(0, begin, size).view(tensor->scalar_type()).view(tensor->sizes());
    *tensor = place.copy_(*tensor);
    begin += rounded_up(size, kCacheLine);
  }
}

}  // namespace molex
