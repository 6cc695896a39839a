// How threads share work: each takes whole blocks of rows, or all work on one block together.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace molex {

// The threads that work on one block. All of them run the same code and meet at barriers.
struct Team {
  int64_t rank = 0;
  int64_t size = 1;

  // This thread's part of `count` pieces of work.
  template <class Work>
  void share(int64_t count, const Work& work) const {
    for (int64_t i = count * rank / size; i < count * (rank + 1) / size; ++i) work(i);
  }

  // Wait until every thread of the team is here.
  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// With fewer blocks a thread than this, dealing them out would leave threads idle for much of the time.
constexpr int64_t kBlocksPerThread = 4;

// Call work(block, team, scratch) for each of `count` blocks. A scratch belongs to one team.
// `work` must not throw.
template <class Scratch, class Work>
void for_each_block(int64_t count, const Work& work) {
  const int64_t threads = at::get_num_threads();
  // Kept by the calling thread, so that a pass finds its memory mapped.
  static thread_local std::vector<Scratch> kept;
  if (static_cast<int64_t>(kept.size()) < threads) kept.resize(threads);
  Scratch* scratch = kept.data();
  const bool together = count < kBlocksPerThread * threads;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const int64_t rank = omp_get_thread_num();
    if (together) {
      for (int64_t i = 0; i < count; ++i) {
        work(i, Team{rank, threads}, scratch[0]);
#pragma omp barrier
      }
    } else {
      for (int64_t i = next++; i < count; i = next++) work(i, Team{}, scratch[rank]);
    }
    // `brgemm` leaves the tiles of AMX set up for its last product, which oneDNN's other products must not find.
    at::native::cpublas::brgemm_release();
  }
}

}  // namespace molex
