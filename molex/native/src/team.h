// How threads share work: each takes whole blocks of rows, or all work on one block together.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace molex {

// Pieces of work that some threads have in common. Each begins with a part of its own, so that it finds in its caches
// what it had there before, and then helps the others, which a core that other processes want would hold up.
class Shares {
 public:
  explicit Shares(int64_t threads) : taken_(threads) {}

  // Call work(i) for those of the pieces 0 ≤ i < count of this round that no thread has taken. A later round has a
  // larger number.
  template <class Work>
  void take(uint32_t round, int64_t rank, int64_t count, const Work& work) {
    const int64_t threads = taken_.size();
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t part = (rank + k) % threads;
      const int64_t begin = count * part / threads, end = count * (part + 1) / threads;
      for (int64_t i; (i = begin + next(part, round, end - begin)) < end;) work(i);
    }
  }

 private:
  struct alignas(64) Taken {
    std::atomic<uint64_t> value{0};  // the round, and how many of its pieces
  };

  // The first piece of a part that was not taken yet, from now on taken; `count` where all were.
  int64_t next(int64_t part, uint32_t round, int64_t count) {
    std::atomic<uint64_t>& taken = taken_[part].value;
    uint64_t seen = taken.load(std::memory_order_relaxed);
    while (true) {
      const auto latest = static_cast<uint32_t>(seen >> 32);
      const int64_t first = latest == round ? static_cast<uint32_t>(seen) : 0;
      // Who is in a later round found nothing left in this one.
      if (latest > round || first == count) return count;
      if (taken.compare_exchange_weak(seen, (uint64_t{round} << 32) + first + 1, std::memory_order_relaxed))
        return first;
    }
  }

  std::vector<Taken> taken_;
};

// The threads that work on one block. All of them run the same code and meet at barriers.
class Team {
 public:
  Team() = default;
  Team(int64_t rank_, int64_t size_, Shares& shares) : rank(rank_), size(size_), shares_(&shares) {}

  // Call work(i) for 0 ≤ i < count, each on one of the threads. It does not wait for the others.
  template <class Work>
  void share(int64_t count, const Work& work) const {
    if (size > 1) return shares_->take(++round_, rank, count, work);
    for (int64_t i = 0; i < count; ++i) work(i);
  }

  // Wait until every thread of the team is here.
  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }

  const int64_t rank = 0;
  const int64_t size = 1;

 private:
  Shares* shares_ = nullptr;
  mutable uint32_t round_ = 0;
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

// A thread in a region: its place among all of them, their scratches, and how they share work.
template <class Scratch>
class Region {
 public:
  Region(int64_t rank, int64_t threads, std::vector<Scratch>& scratches, Shares& shares)
      : everyone(rank, threads, shares), scratches_(scratches) {}

  // Call work(i) for 0 ≤ i < count, and wait until all of it is done.
  template <class Work>
  void share(int64_t count, const Work& work) {
    everyone.share(count, work);
    everyone.barrier();
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
};

// The CPUs of the calling thread and of those it works with, one each; none where the system chooses.
inline std::vector<int64_t>& chosen_cpus() {
  static thread_local std::vector<int64_t> cpus;
  return cpus;
}

// Have the calling thread run on one CPU alone. OpenMP makes new threads at times: each is asked in every region.
inline void run_on(int64_t cpu) {
  static thread_local int64_t current = -1;
  if (cpu == current) return;
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(cpu, &only);
  if (sched_setaffinity(0, sizeof only, &only) == 0) current = cpu;
}

// Call work(region) on all threads at once. `work` must not throw.
template <class Scratch, class Work>
void in_one_region(const Work& work) {
  std::vector<Scratch>& scratches = kept_scratches<Scratch>();
  const int64_t threads = at::get_num_threads();
  const std::vector<int64_t>& cpus = chosen_cpus();
  Shares shares(threads);
#pragma omp parallel num_threads(threads)
  {
    if (static_cast<int64_t>(cpus.size()) == threads) run_on(cpus[omp_get_thread_num()]);
    Region<Scratch> region(omp_get_thread_num(), threads, scratches, shares);
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
