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

// Call use.operator()<n>(first) for up to four neighbouring ones of 0..count at a time.
template <class Use>
void in_fours(int64_t count, const Use& use) {
  int64_t first = 0;
  for (; first + 4 <= count; first += 4) use.template operator()<4>(first);
  switch (count - first) {
    case 1: use.template operator()<1>(first); break;
    case 2: use.template operator()<2>(first); break;
    case 3: use.template operator()<3>(first); break;
    default: break;
  }
}

}  // namespace molex
