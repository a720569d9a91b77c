// Shared-memory tiles of 64 bf16 columns (128 bytes a row) in the copy engine's 128-byte swizzle, as wgmma reads them.
// Wider operands are several such tiles side by side, kTileBytes apart for 64 rows.
// Source: PTX ISA 9.0, sections 9.7.15.5 (matrix descriptors) and 5.5.7 (swizzle).
#pragma once

#include <stdint.h>

#include "primitives.h"

namespace m1 {

constexpr uint32_t kRowBytes = 128;
constexpr uint32_t kTileRows = 64;
constexpr uint32_t kTileColumns = 64;
constexpr uint32_t kTileBytes = kTileRows * kRowBytes;
// Eight rows of 128 bytes repeat the swizzle; tiles must start on its period.
constexpr uint32_t kSwizzlePeriodBytes = 1024;

// Byte offset of 16-byte unit `unit` (0 to 7) of row `row`.
M1_DEVICE uint32_t swizzled(uint32_t row, uint32_t unit) { return row * kRowBytes + ((unit ^ (row & 7)) << 4); }

M1_DEVICE uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | (uint64_t(address & 0x3ffff) >> 4) | (uint64_t(leading_bytes >> 4) << 16) |
         (uint64_t(stride_bytes >> 4) << 32);
}
// An operand whose K dim runs along the tile's rows' 64 columns: 16 of them from column 16 * step.
M1_DEVICE uint64_t k_major(uint32_t tile, uint32_t step) {
  return descriptor(tile + step * 32, 16, kSwizzlePeriodBytes);
}
// An operand whose K dim runs down the tile's rows: 16 of them from row 16 * step; N along the columns, 64 a tile.
M1_DEVICE uint64_t n_major(uint32_t tile, uint32_t step) {
  return descriptor(tile + step * 16 * kRowBytes, kTileBytes, kSwizzlePeriodBytes);
}

}  // namespace m1
