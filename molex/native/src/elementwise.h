// Functions of single values and rows, written so that the compiler makes vectors of them.
#pragma once

#include <c10/util/BFloat16.h>

#include <bit>
#include <cmath>
#include <cstdint>

// A call in a loop keeps the compiler from making vectors of it.
#define MOLEX_INLINE [[gnu::always_inline]] inline

namespace molex {

// exp(x) to two units in the last place, NaN for NaN. Cody and Waite's reduction, then a polynomial.
MOLEX_INLINE float exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = std::floor(clamped * 1.44269504f + 0.5f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// 0.5 · x · (1 + erf(x / √2)). erf as in Abramowitz and Stegun, 7.1.26: within 1.5e-7.
MOLEX_INLINE float gelu(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * exponential(-z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// The same within 5e-6, in less than half the time, for what is rounded to bfloat16 next: 0.5 + x · p(x²) is a
// least-squares fit of the normal distribution on [-4.75, 4.75], held to 0 and 1 at its ends, with the powers taken
// of x² on a scale from -1 to 1, where they lose no digits.
MOLEX_INLINE float gelu_for_bfloat16(float x) {
  constexpr float kEnd = 4.75f;
  const float inner = x < -kEnd ? -kEnd : (x > kEnd ? kEnd : x);
  const float s = inner * inner * (2.0f / (kEnd * kEnd)) - 1.0f;
  float p = 0.00143136387f;
  p = p * s - 0.00394059625f;
  p = p * s + 0.00477359956f;
  p = p * s - 0.00687934738f;
  p = p * s + 0.0135226985f;
  p = p * s - 0.0218081493f;
  p = p * s + 0.0303869173f;
  p = p * s - 0.0405375808f;
  p = p * s + 0.0532349721f;
  p = p * s - 0.0736690462f;
  p = p * s + 0.148748323f;
  return x * (0.5f + inner * p);
}

MOLEX_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// 0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), and 1 + tanh(u) = 2 · sigmoid(2u).
MOLEX_INLINE float gelu_tanh(float x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }

MOLEX_INLINE float silu(float x) { return x * sigmoid(x); }

// y = x + bias, n of each.
template <class T>
void add_bias(const float* x, const float* bias, int64_t n, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i] + bias[i]);
}

struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;  // nullptr for RMSNorm, which takes no mean off either
  float eps = 0.0f;
};

// The norm of one row [n], into values of type T.
template <class T>
void normalize(const float* x, T* y, int64_t n, const Norm& norm) {
  float mean = 0.0f;
  if (norm.bias) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < n; ++i) mean += x[i];
    mean /= static_cast<float>(n);
  }
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(square / static_cast<float>(n) + norm.eps);
  if (norm.bias) {
    for (int64_t i = 0; i < n; ++i)
      y[i] = static_cast<T>((x[i] - mean) * factor * norm.weight[i] + norm.bias[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i] * factor * norm.weight[i]);
  }
}

// What a row of unsigned bytes q stands for: x ≈ scale · (q − zero).
struct Rounding {
  float scale;
  int32_t zero;
};

// Round one row [n] to bytes that reach from its smallest value, or 0, to its largest, or 0: what an activation
// returns lies nearly all on one side. The scale is NaN where a value is not finite, so that what is wrong with a
// row stays visible.
template <class T>
Rounding quantize(const T* x, uint8_t* q, int64_t n) {
  float least = 0.0f, most = 0.0f, poison = 0.0f;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : poison)
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(x[i]);
    least = value < least ? value : least;
    most = value > most ? value : most;
    poison += value * 0.0f;
  }
  const float range = most - least, inverse = range > 0.0f ? 255.0f / range : 0.0f;
  const float zero = std::floor(0.5f - least * inverse);
  for (int64_t i = 0; i < n; ++i) {
    const float value = std::floor(static_cast<float>(x[i]) * inverse + (zero + 0.5f));
    q[i] = static_cast<uint8_t>(static_cast<int32_t>(value < 255.0f ? value : 255.0f));
  }
  return {range / 255.0f + poison, static_cast<int32_t>(zero)};
}

}  // namespace molex
