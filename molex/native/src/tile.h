// The shape in which weights lie.
#pragma once

#include <cstdint>

namespace molex {

// Columns of a tile. 64 rows of it in float32 fit the first cache of a core.
constexpr int64_t kTile = 64;
// The vectors of 16 values in four bytes that they are.
constexpr int64_t kTileVectors = kTile / 16;
constexpr int64_t kCacheLine = 64;

}  // namespace molex
