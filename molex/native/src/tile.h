// The shape in which weights lie.
#pragma once

#include <cstdint>

namespace molex {

// Columns of a tile. 64 rows of it in float32 fit the first cache of a core.
constexpr int64_t kTile = 64;
// The vectors of 16 values in four bytes that they are.
constexpr int64_t kTileVectors = kTile / 16;
constexpr int64_t kCacheLine = 64;

// A kernel is compiled for each number of rows: a few numbers have to do.
inline int64_t padded_rows(int64_t rows) { return rows <= 4 ? rows : (rows + 3) / 4 * 4; }

}  // namespace molex
