// As many values in float32 as one register holds, and what the compiler does not make of them by itself.
#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <bit>
#include <cstdint>

namespace molex {

#ifdef __AVX512F__

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
// GCC keeps sums of this type in registers, and moves those of __m512i to memory and back at every step.
typedef int32_t Integers __attribute__((vector_size(64)));

inline Vector widened(const at::BFloat16* x) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return std::bit_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// sums + the dot products of four bytes, of which those of x have no sign.
__attribute__((target("avx512vnni"))) inline Integers byte_dots(Integers sums, __m512i x, __m512i w) {
  return std::bit_cast<Integers>(_mm512_dpbusd_epi32(std::bit_cast<__m512i>(sums), x, w));
}

inline float sum_of(Vector x) { return _mm512_reduce_add_ps(std::bit_cast<__m512>(x)); }

// The sums of four vectors, in fewer steps than one after the other.
inline void sums_of(const Vector* x, float* sums) {
  const auto at = [&](int64_t i) { return std::bit_cast<__m512>(x[i]); };
  // Of each quarter of the vectors: x₀ and x₁ in turn, each value the sum of two; then all four, the sums of four.
  const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(at(0), at(1)), _mm512_unpackhi_ps(at(0), at(1)));
  const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(at(2), at(3)), _mm512_unpackhi_ps(at(2), at(3)));
  const __m512 quarters =
      _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

#else

typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));

inline Vector widened(const at::BFloat16* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return std::bit_cast<Vector>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// The sums of four vectors, in fewer steps than one after the other.
inline void sums_of(const Vector* x, float* sums) {
  const auto at = [&](int64_t i) { return std::bit_cast<__m256>(x[i]); };
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(at(0), at(1)), _mm256_hadd_ps(at(2), at(3)));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

inline float sum_of(Vector x) {
  const __m256 whole = std::bit_cast<__m256>(x);
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

#endif

constexpr int64_t kVector = sizeof(Vector) / sizeof(float);

// Neighbouring values in float32.
inline Vector widened(const float* x) { return *reinterpret_cast<const Vector*>(x); }

}  // namespace molex
