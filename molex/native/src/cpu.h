// What the CPU has products of, and PyTorch too: in its environment oneDNN can be told to leave instructions alone.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstdint>
#include <vector>

#include "tile.h"

namespace molex {

#ifdef __AVX512F__

// Whether PyTorch multiplies X by W. It throws where it does not, which in a parallel region would end the process.
template <class X, class W, class Sum>
bool has_product() {
  constexpr int64_t inputs = 64;
  const std::vector<X> x(inputs);
  const std::vector<W> w(inputs * kTile);
  std::vector<Sum> c(kTile);
  try {
    at::native::cpublas::brgemm(1, kTile, inputs, inputs, kTile, kTile, false, x.data(), w.data(), c.data(), true);
    at::native::cpublas::brgemm_release();
  } catch (const c10::Error&) {
    return false;
  }
  return true;
}

inline bool multiplies_halves() {
  static const bool does =
      __builtin_cpu_supports("avx512bf16") && has_product<at::BFloat16, at::BFloat16, float>();
  return does;
}

inline bool multiplies_bytes() {
  static const bool does = __builtin_cpu_supports("avx512vnni") && has_product<uint8_t, int8_t, int32_t>();
  return does;
}
#else
constexpr bool multiplies_halves() { return false; }
constexpr bool multiplies_bytes() { return false; }
#endif

}  // namespace molex
