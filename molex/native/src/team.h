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

// Scratches of the calling thread, one for each thread it works with; kept, so that a pass finds its memory mapped.
template <class Scratch>
std::vector<Scratch>& kept_scratches() {
  static thread_local std::vector<Scratch> kept;
  if (static_cast<int64_t>(kept.size()) < at::get_num_threads()) kept.resize(at::get_num_threads());
  return kept;
}

// Call work(team, scratches) on all threads at once, each with its place among them. `work` must not throw.
template <class Scratch, class Work>
void in_one_region(const Work& work) {
  std::vector<Scratch>& scratches = kept_scratches<Scratch>();
  const int64_t threads = at::get_num_threads();
#pragma omp parallel num_threads(threads)
  {
    work(Team{omp_get_thread_num(), threads}, scratches);
    at::native::cpublas::brgemm_release();
  }
}

// Inside a region: call work(block, team, scratch) for each of `count` blocks, and wait for all of them.
template <class Scratch, class Work>
void share_blocks(const Team& everyone, int64_t count, std::vector<Scratch>& scratches, const Work& work) {
  if (count < kBlocksPerThread * everyone.size) {
    for (int64_t i = 0; i < count; ++i) {
      work(i, everyone, scratches[0]);
      everyone.barrier();
    }
  } else {
    everyone.share(count, [&](int64_t i) { work(i, Team{}, scratches[everyone.rank]); });
    everyone.barrier();
  }
}

// Call work(block, team, scratch) for each of `count` blocks. A scratch belongs to one team.
// `work` must not throw.
template <class Scratch, class Work>
void for_each_block(int64_t count, const Work& work) {
  const int64_t threads = at::get_num_threads();
  Scratch* scratch = kept_scratches<Scratch>().data();
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
