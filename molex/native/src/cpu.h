// What the CPU has products of.
#pragma once

namespace molex {

#ifdef __AVX512F__
inline bool multiplies_halves() {
  static const bool does = __builtin_cpu_supports("avx512bf16");
  return does;
}

inline bool multiplies_bytes() {
  static const bool does = __builtin_cpu_supports("avx512vnni");
  return does;
}
#else
constexpr bool multiplies_halves() { return false; }
constexpr bool multiplies_bytes() { return false; }
#endif

}  // namespace molex
