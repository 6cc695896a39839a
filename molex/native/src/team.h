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

// The pieces of work of one phase after the other, each taken by whichever thread is free.
class Turns {
 public:
  // Call work(i) for 0 ≤ i < count, on all threads of the region together, and wait until all of it is done.
  template <class Work>
  void share(const Team& everyone, int64_t count, int64_t& phase, const Work& work) {
    std::atomic<int64_t>& next = next_[phase % 2];
    // Everyone has left the phase before this one, and the one after it begins behind the barrier.
    if (everyone.rank == 0) next_[(phase + 1) % 2] = 0;
    for (int64_t i = next++; i < count; i = next++) work(i);
    everyone.barrier();
    ++phase;
  }

 private:
  std::atomic<int64_t> next_[2] = {0, 0};
};

// A thread in a region: its place among all of them, their scratches, and how they share work.
template <class Scratch>
class Region {
 public:
  Region(const Team& everyone, std::vector<Scratch>& scratches, Turns& turns)
      : everyone(everyone), scratches_(scratches), turns_(turns) {}

  // Call work(i) for 0 ≤ i < count, and wait until all of it is done.
  template <class Work>
  void share(int64_t count, const Work& work) {
    turns_.share(everyone, count, phase_, work);
  }

  // Call work(block, team, scratch) for each of `count` blocks, and wait for all of them.
  template <class Work>
  void share_blocks(int64_t count, const Work& work) {
    if (count < kBlocksPerThread * everyone.size) {
      for (int64_t i = 0; i < count; ++i) {
        work(i, everyone, scratches_[0]);
        everyone.barrier();
      }
    } else {
      share(count, [&](int64_t i) { work(i, Team{}, scratches_[everyone.rank]); });
    }
  }

  const Team everyone;

 private:
  std::vector<Scratch>& scratches_;
  Turns& turns_;
  int64_t phase_ = 0;
};

// Call work(region) on all threads at once. `work` must not throw.
template <class Scratch, class Work>
void in_one_region(const Work& work) {
  std::vector<Scratch>& scratches = kept_scratches<Scratch>();
  const int64_t threads = at::get_num_threads();
  Turns turns;
#pragma omp parallel num_threads(threads)
  {
    Region<Scratch> region(Team{omp_get_thread_num(), threads}, scratches, turns);
    work(region);
    // `brgemm` leaves the tiles of AMX set up for its last product, which oneDNN's other products must not find.
    at::native::cpublas::brgemm_release();
  }
}

// Call work(block, team, scratch) for each of `count` blocks. A scratch belongs to one team.
// `work` must not throw.
template <class Scratch, class Work>
void for_each_block(int64_t count, const Work& work) {
  in_one_region<Scratch>([&](Region<Scratch>& region) { region.share_blocks(count, work); });
}

}  // namespace molex
