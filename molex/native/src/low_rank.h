// Low-rank updates of the rows of a block: y[i] += s · B · A · x[i], with the factors of each row's adapter.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "team.h"
#include "tile.h"
#include "vectors.h"

namespace molex {

// Rows of a block. More would not fit the second cache of a core beside what a layer makes of them.
constexpr int64_t kMaxRows = 64;

// Rows begin..end of one adapter, which is the `member`-th of the batch.
struct Run {
  int64_t member, begin, end;
};

// The factors of one adapter at one site, as Python lists them: A [rank, in] and Bᵀ [rank, out].
struct Factors {
  int64_t a, b, rank, outputs, scaling;

  const float* down() const { return reinterpret_cast<const float*>(a); }
  const float* up() const { return reinterpret_cast<const float*>(b); }
  float scale() const { return static_cast<float>(std::bit_cast<double>(scaling)); }
};
static_assert(sizeof(Factors) == 5 * sizeof(int64_t));

// The rows begin..begin + rows of a pass and the updates that act on them.
struct BlockUpdates {
  const Factors& at(int64_t member, int64_t site) const {
    return factors[member * sites_per_member + first_site + site];
  }

  int64_t begin = 0, rows = 0;
  const Factors* factors = nullptr;  // [members, layers · sites]
  int64_t sites_per_member = 0, first_site = 0;
  std::vector<Run> runs;  // within the block: 0 is its first row
};

// s · A · x of every row and site of a linear layer: [sites, kMaxRows, rank].
struct NarrowRows {
  float* at(int64_t site, int64_t row) { return values.data() + (site * kMaxRows + row) * rank; }
  void resize(int64_t sites, int64_t rank_) {
    rank = rank_;
    if (static_cast<int64_t>(values.size()) < sites * kMaxRows * rank) values.resize(sites * kMaxRows * rank);
  }

  std::vector<float> values;
  int64_t rank = 0;
};

template <class T>
float dot(const T* x, const float* a, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<float>(x[i]) * a[i];
  return sum;
}

// Dot products of kRows rows of values, `stride` apart, each with four rows of A [4, n].
template <int64_t kRows, class T>
void four_dots(const T* x, int64_t stride, const float* a, int64_t n, float scale, float* y, int64_t y_stride) {
  Vector sums[kRows][4] = {};
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector)
    for (int64_t r = 0; r < kRows; ++r) {
      const Vector values = widened(x + r * stride + i);
      for (int64_t k = 0; k < 4; ++k) sums[r][k] += values * widened(a + k * n + i);
    }
  for (int64_t r = 0; r < kRows; ++r) {
    float* found = y + r * y_stride;
    sums_of(sums[r], found);
    for (int64_t k = 0; k < 4; ++k) found[k] = (found[k] + dot(x + r * stride + i, a + k * n + i, n - i)) * scale;
  }
}

// y[r] = scale · A x[r] for kRows rows of x [kRows, n] and y, with A [rows, n].
template <int64_t kRows, class T>
void dots(const T* x, int64_t stride, const float* a, int64_t rows, int64_t n, float scale, float* y,
          int64_t y_stride) {
  int64_t k = 0;
  for (; k + 4 <= rows; k += 4) four_dots<kRows>(x, stride, a + k * n, n, scale, y + k, y_stride);
  for (; k < rows; ++k)
    for (int64_t r = 0; r < kRows; ++r) y[r * y_stride + k] = dot(x + r * stride, a + k * n, n) * scale;
}

// The same for one row.
template <class T>
void dots(const T* x, const float* a, int64_t rows, int64_t n, float scale, float* y) {
  dots<1>(x, n, a, rows, n, scale, y, rows);
}

// Fill `narrow`, shared by the team; returns whether any row has an update. A barrier must follow.
template <class Rows>
bool narrow_rows(
    const std::vector<int64_t>& sites, const Rows& x, const BlockUpdates& updates, const Team& team,
    NarrowRows& narrow) {
  int64_t rank = 0, last_site = 0;
  for (int64_t site : sites) {
    last_site = std::max(last_site, site);
    for (const Run& run : updates.runs) rank = std::max(rank, updates.at(run.member, site).rank);
  }
  if (rank == 0) return false;
  // All threads of a team come to the same sizes, and one of them is enough to set them.
  if (team.rank == 0) narrow.resize(last_site + 1, rank);
  team.barrier();
  for (int64_t site : sites)
    for (const Run& run : updates.runs) {
      const Factors& update = updates.at(run.member, site);
      if (update.rank == 0) continue;
      team.share((run.end - run.begin + 3) / 4, [&](int64_t i) {
        const int64_t begin = run.begin + 4 * i;
        in_fours(std::min(run.end - begin, int64_t{4}), [&]<int64_t kRows>(int64_t) {
          dots<kRows>(x.row(begin), x.stride, update.down(), update.rank, x.columns, update.scale(),
                      narrow.at(site, begin), narrow.rank);
        });
      });
    }
  return true;
}

// y[i, 0..width] += the columns first.. of narrow[i] · Bᵀ, for kRows rows of one adapter, `rank` apart.
template <int64_t kRows>
void widen(const float* narrow, int64_t rank, const Factors& update, int64_t first, int64_t width, float* y,
           int64_t stride) {
  const float* b = update.up() + first;
  int64_t j = 0;
  for (; j + kVector <= width; j += kVector) {
    Vector sums[kRows];
    for (int64_t i = 0; i < kRows; ++i) sums[i] = *reinterpret_cast<Vector*>(y + i * stride + j);
    for (int64_t r = 0; r < update.rank; ++r) {
      const Vector factors = *reinterpret_cast<const Vector*>(b + r * update.outputs + j);
      for (int64_t i = 0; i < kRows; ++i) sums[i] += factors * narrow[i * rank + r];
    }
    for (int64_t i = 0; i < kRows; ++i) *reinterpret_cast<Vector*>(y + i * stride + j) = sums[i];
  }
  for (; j < width; ++j)
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t r = 0; r < update.rank; ++r)
        y[i * stride + j] += b[r * update.outputs + j] * narrow[i * rank + r];
}

// Add the updates of a site to `width` of its columns, from `first` on, for the rows y of a block.
inline void widen_rows(int64_t site, const BlockUpdates& updates, NarrowRows& narrow, int64_t first,
                       int64_t width, float* y, int64_t stride) {
  for (const Run& run : updates.runs) {
    const Factors& update = updates.at(run.member, site);
    if (update.rank == 0) continue;
    in_fours(run.end - run.begin, [&]<int64_t kRows>(int64_t i) {
      const int64_t row = run.begin + i;
      widen<kRows>(narrow.at(site, row), narrow.rank, update, first, width, y + row * stride, stride);
    });
  }
}

}  // namespace molex
