// Products of few rows with a tile of weights, on vectors. Their time is that of the weights' way from memory, so AMX
// gains nothing; and on shared machines products of few rows took up to twice as long on it, for minutes.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "tile.h"
#include "vectors.h"

#ifdef __AVX512F__

namespace molex {

// The most rows of a product that is computed here. For sixteen AMX is as fast or faster.
constexpr int64_t kFewRows = 16, kFewRowsBesideAmx = 8;
// As many as the registers hold sums of.
constexpr int64_t kRowsAtOnce = 6;

#define MOLEX_DOTS __attribute__((target("avx512bf16,avx512vnni")))

// Whether as many rows are better multiplied here.
inline bool few_enough(int64_t rows) {
  static const int64_t few = __builtin_cpu_supports("amx-tile") ? kFewRowsBesideAmx : kFewRows;
  return rows <= few;
}

// Dot products of two values in bfloat16.
struct HalfDots {
  using Sum = float;
  using Sums = __m512;
  MOLEX_DOTS static Sums add(Sums sums, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static void store(Sums sums, float* c) { _mm512_storeu_ps(c, sums); }
};

// Dot products of four bytes, of which those of x have no sign.
struct ByteDots {
  using Sum = int32_t;
  using Sums = Integers;
  MOLEX_DOTS static Sums add(Sums sums, __m512i w, __m512i x) { return byte_dots(sums, x, w); }
  static void store(Sums sums, int32_t* c) { _mm512_storeu_si512(c, std::bit_cast<__m512i>(sums)); }
};

// What is fetched from memory meanwhile: some lines from `first` on.
struct Ahead {
  const char* first;
  int64_t lines;
};

// c [kRows, kTile] = x · W for rows x, `stride` apart. Both come in steps of what one dot product takes: 4 bytes of each
// row, and of each column of the tile w, whose vectors are cache lines.
template <class Dots, int64_t kRows>
MOLEX_DOTS void multiply_at_once(const int32_t* x, int64_t stride, const char* w, int64_t steps, Ahead ahead,
                                 typename Dots::Sum* c) {
  typename Dots::Sums sums[kRows][kTileVectors] = {};
  int64_t fetched = 0;
  for (int64_t k = 0; k < steps; ++k, w += kTileVectors * kCacheLine) {
    for (; fetched * steps < ahead.lines * (k + 1); ++fetched) _mm_prefetch(ahead.first + fetched * kCacheLine, _MM_HINT_T1);
    for (int64_t r = 0; r < kRows; ++r) {
      const __m512i value = _mm512_set1_epi32(x[r * stride + k]);
      for (int64_t v = 0; v < kTileVectors; ++v)
        sums[r][v] = Dots::add(sums[r][v], _mm512_loadu_si512(w + v * kCacheLine), value);
    }
  }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kTileVectors; ++v) Dots::store(sums[r][v], c + r * kTile + v * 16);
}

// c [rows, kTile] = x · W. The tile behind W is fetched meanwhile: it is likely the next, and where there is none,
// asking does nothing.
template <class Dots>
void multiply_few(int64_t rows, const int32_t* x, int64_t stride, const char* w, int64_t steps, typename Dots::Sum* c) {
  const int64_t passes = (rows + kRowsAtOnce - 1) / kRowsAtOnce, lines = steps * kTileVectors;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t begin = rows * pass / passes, count = rows * (pass + 1) / passes - begin;
    const int64_t first = lines * pass / passes;
    const Ahead ahead{w + (lines + first) * kCacheLine, lines * (pass + 1) / passes - first};
    const auto with = [&]<int64_t kRows>() {
      multiply_at_once<Dots, kRows>(x + begin * stride, stride, w, steps, ahead, c + begin * kTile);
    };
    switch (count) {
      case 1: with.template operator()<1>(); break;
      case 2: with.template operator()<2>(); break;
      case 3: with.template operator()<3>(); break;
      case 4: with.template operator()<4>(); break;
      case 5: with.template operator()<5>(); break;
      default: with.template operator()<kRowsAtOnce>();
    }
  }
}

}  // namespace molex

#endif
