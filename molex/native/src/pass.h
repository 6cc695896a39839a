// Which rows of a pass run through which layer, and the low-rank updates that act on them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "low_rank.h"

namespace molex {

// One layer call's part of a pass, or a block of it: rows begin..end of those side by side.
struct Rows {
  int64_t layer, begin, end;
};

// What a pass hands over beside hidden states.
struct Pass {
  // Layer calls layers[0] on the first counts[0] rows, and so on.
  Pass(const std::vector<int64_t>& layers, const std::vector<int64_t>& counts, std::vector<Run> runs,
       at::Tensor factors, int64_t sites);

  BlockUpdates updates(const Rows& block, int64_t first_site) const;

  std::vector<Rows> blocks;
  std::vector<Run> runs;
  at::Tensor factors;
  int64_t sites;
};

inline Pass::Pass(const std::vector<int64_t>& layers, const std::vector<int64_t>& counts, std::vector<Run> runs_,
                  at::Tensor factors_, int64_t sites_)
    : runs(std::move(runs_)), factors(std::move(factors_)), sites(sites_) {
  int64_t begin = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const int64_t rows = counts[i], cuts = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t cut = 0; cut < cuts; ++cut)
      blocks.push_back({layers[i], begin + rows * cut / cuts, begin + rows * (cut + 1) / cuts});
    begin += rows;
  }
}

inline BlockUpdates Pass::updates(const Rows& block, int64_t first_site) const {
  BlockUpdates updates{block.begin, block.end - block.begin};
  updates.factors = reinterpret_cast<const Factors*>(factors.const_data_ptr<int64_t>());
  updates.sites_per_member = sites;
  updates.first_site = first_site;
  auto run = std::upper_bound(
      runs.begin(), runs.end(), block.begin, [](int64_t row, const Run& r) { return row < r.end; });
  for (; run != runs.end() && run->begin < block.end; ++run)
    updates.runs.push_back(
        {run->member, std::max(run->begin - block.begin, int64_t{0}), std::min(run->end, block.end) - block.begin});
  return updates;
}

}  // namespace molex
