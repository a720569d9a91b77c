// From accumulators to memory: what each grouped product does with its finished tile.
//
// A warp owns 16 rows and writes 32 columns at a time: it packs them to bf16, turns them through its own staging in
// shared memory (80-byte rows: 16-byte accesses without bank conflicts) and stores 16 bytes a lane, only rows and
// columns that exist. Accumulator layout: csrc/wgmma.cuh. SwiGLU starts from gate and up rounded to bf16, so that
// backward, which reads them back, sees the very activation that forward used.
#pragma once

#include "grouped_tiles.cuh"

namespace m1 {

constexpr float kLog2OfE = 1.44269504088896340736f;
constexpr int kPassColumns = 32;
constexpr int kPassAccumulators = kPassColumns / 2;
// Results are computed and staged 16 columns at a time: more would not fit in registers beside the accumulators.
constexpr int kStepColumns = 16;
constexpr int kStepAccumulators = kStepColumns / 2;
constexpr int kStepWords = kStepAccumulators / 2;
constexpr int kStepsPerPass = kPassColumns / kStepColumns;
// What a gradient's warp gives to the copy engine at once: 16 rows of 128 bytes.
constexpr uint32_t kBoxBytes = 16 * kRowBytes;
static_assert(2 * kBoxBytes <= kStagingPerWarp && kStagingPerWarp % kSwizzlePeriodBytes == 0, "two boxes per warp");

// The part of a tile that one warp owns, and where this lane's accumulators are in it.
struct WarpRows {
  uint32_t staging;
  int lane;
  int first_row;  // in the output matrix
  int num_rows;   // that exist, 0 to 16

  // Row of accumulators with bit 1 of their index equal to half.
  M1_DEVICE int row(int half) const { return lane / 4 + 8 * half; }
};

M1_DEVICE WarpRows warp_rows(uint32_t base, int warp, int lane, int top, int rows_below_top) {
  const int offset = 16 * warp;
  const int rest = rows_below_top - offset;
  return {base + kStagingOffset + warp * kStagingPerWarp, lane, top + offset, rest < 0 ? 0 : rest < 16 ? rest : 16};
}

M1_DEVICE void pack(uint32_t (&packed)[kStepWords], const float* values) {
#pragma unroll
  for (int i = 0; i < kStepWords; ++i) packed[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
}

// Columns 16 * step and on of the 32 that are staged.
M1_DEVICE void stage(uint32_t staging, int lane, int step, const uint32_t (&packed)[kStepWords]) {
  const int matrix = lane / 8;
  const uint32_t row = lane % 8 + 8 * (matrix & 1);
  const uint32_t address = staging + row * kStagingPitchBytes + step * 32 + (matrix / 2) * 16;
  stmatrix_x4(address, packed[0], packed[1], packed[2], packed[3]);
}

// Stores the staged 32 columns at out, which points at the first of them in row first_row of a matrix.
// Offsets inside a warp's 16 rows have 32 bits: the base is then the same in every lane and costs no registers.
M1_DEVICE void copy_out(const WarpRows& mine, uint32_t staging, uint16_t* out, int stride, int columns) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = mine.lane / 4 + 8 * i;
    const int unit = mine.lane % 4;
    const uint4 values = load_shared16(staging + row * kStagingPitchBytes + unit * 16);
    if (row < mine.num_rows && unit * 8 < columns) store_global16(out + (row * stride + unit * 8), values);
  }
}

M1_DEVICE float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-x * kLog2OfE)); }

struct RowWeights {
  float of_half[2];
};

M1_DEVICE RowWeights load_row_weights(const float* weights, const WarpRows& mine) {
  RowWeights loaded = {{1.0f, 1.0f}};
  if (weights == nullptr) return loaded;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (mine.row(half) < mine.num_rows) loaded.of_half[half] = weights[mine.first_row + mine.row(half)];
  return loaded;
}

// out [.., columns] of `values`, bf16.
M1_DEVICE void store_tile(const float (&values)[128], const WarpRows& mine, uint16_t* out, int columns, int left) {
  uint16_t* corner = out + int64_t(mine.first_row) * columns + left;
#pragma unroll
  for (int pass = 0; pass < kTileWidth / kPassColumns; ++pass) {
    const int column = pass * kPassColumns;
#pragma unroll
    for (int step = 0; step < kStepsPerPass; ++step) {
      uint32_t packed[kStepWords];
      pack(packed, values + pass * kPassAccumulators + step * kStepAccumulators);
      stage(mine.staging, mine.lane, step, packed);
    }
    sync_warp();
    copy_out(mine, mine.staging, corner + column, columns, columns - left - column);
    sync_warp();
  }
}

// A gradient's tile has no other writer. Each warp hands its 16 rows to the copy engine, 128 bytes of each at a time,
// from two buffers in turn. The engine leaves out what lies outside the matrix, and adds (kAdds, fp32; else bf16 is
// written) in the second-level cache: no warp waits for the sums of before, which would take longer than the product.
template <bool kAdds>
M1_DEVICE void send_gradient(const float (&values)[128], const WarpRows& mine, const TensorMap* map, const Tile& tile) {
  constexpr int kColumns = int(kRowBytes) / (kAdds ? 4 : 2);
  if (mine.num_rows == 0) return;
#pragma unroll
  for (int pass = 0; pass < kTileWidth / kColumns; ++pass) {
    const uint32_t box = mine.staging + pass % 2 * kBoxBytes;
    const float* sums = values + pass * kColumns / 2;
    // The engine has to be through with what was here two boxes ago.
    if (mine.lane == 0) tma_store_wait_read<1>();
    sync_warp();
    if constexpr (kAdds) {
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) {
        const uint32_t unit = i / 2 * 2 + mine.lane % 4 / 2;
        store_shared_pair(box + swizzled(mine.row(i % 2), unit) + mine.lane % 2 * 8, sums[2 * i], sums[2 * i + 1]);
      }
    } else {
#pragma unroll
      for (int step = 0; step < kColumns / kStepColumns; ++step) {
        uint32_t packed[kStepWords];
        pack(packed, sums + step * kStepAccumulators);
        const int matrix = mine.lane / 8;
        const uint32_t row = mine.lane % 8 + 8 * (matrix & 1);
        stmatrix_x4(box + swizzled(row, 2 * step + matrix / 2), packed[0], packed[1], packed[2], packed[3]);
      }
    }
    fence_async_proxy();
    sync_warp();
    if (mine.lane != 0) continue;
    const int column = tile.left + pass * kColumns;
    if constexpr (kAdds) {
      tma_add_3d(map, box, column, mine.first_row, tile.expert);
    } else {
      tma_store_3d(map, box, column, mine.first_row, tile.expert);
    }
    tma_store_commit();
  }
}

// Columns 0 to 127 of the tile are gate, 128 to 255 up, of the same 128 ffn columns from left.
M1_DEVICE void store_swiglu(const float (&values)[128], const WarpRows& mine, const RowWeights& weights,
                            const M1GateUp& call, int left) {
  const int width = call.ffn_width;
  uint16_t* hidden = static_cast<uint16_t*>(call.hidden) + int64_t(mine.first_row) * 2 * width + left;
  uint16_t* act = static_cast<uint16_t*>(call.act) + int64_t(mine.first_row) * width + left;
#pragma unroll
  for (int pass = 0; pass < kTileWidth / 2 / kPassColumns; ++pass) {
#pragma unroll
    for (int step = 0; step < kStepsPerPass; ++step) {
      const float* sums = values + pass * kPassAccumulators + step * kStepAccumulators;
      uint32_t gate[kStepWords], up[kStepWords], result[kStepWords];
      pack(gate, sums);
      pack(up, sums + 64);
#pragma unroll
      for (int i = 0; i < kStepWords; ++i) {
        const float weight = weights.of_half[i % 2];
        const float low = low_bf16(gate[i]), high = high_bf16(gate[i]);
        result[i] = pack_bf16(low * sigmoid(low) * low_bf16(up[i]) * weight,
                              high * sigmoid(high) * high_bf16(up[i]) * weight);
      }
      stage(mine.staging, mine.lane, step, gate);
      stage(mine.staging + kStagingBytes, mine.lane, step, up);
      stage(mine.staging + 2 * kStagingBytes, mine.lane, step, result);
    }
    sync_warp();
    const int column = pass * kPassColumns;
    const int columns = call.ffn_width - left - column;
    copy_out(mine, mine.staging, hidden + column, 2 * width, columns);
    copy_out(mine, mine.staging + kStagingBytes, hidden + width + column, 2 * width, columns);
    copy_out(mine, mine.staging + 2 * kStagingBytes, act + column, width, columns);
    sync_warp();
  }
}

// The derivative of weight * silu(gate) * up at one place, given d = dL/d(weight * silu * up).
struct SwigluGradient {
  float gate, up, act, weight;
};

M1_DEVICE SwigluGradient swiglu_gradient(float d, float gate, float up, float weight) {
  const float slope = sigmoid(gate);
  const float silu = gate * slope;
  const float act = silu * up;
  // The weight goes to what was just loaded: d * weight would be computed early for the whole tile, and spill.
  return {d * (weight * up * (slope + silu * (1.0f - slope))), d * (weight * silu), act * weight, d * act};
}

// What backward reads of hidden comes through the ring behind the tile's depth, 64 columns a stage: gate of the upper
// 64 rows and of the lower, then up.
constexpr int kHiddenStages = kTileWidth / int(kTileColumns);
constexpr int kHiddenBoxes = 2 * kLeftBoxes;
static_assert(kHiddenBoxes <= kLeftBoxes + kRightBoxes, "a stage holds them");

// Gate and up words of one step: what this lane needs of its two rows.
struct HiddenWords {
  uint32_t gate[kStepWords], up[kStepWords];
};

// `warp` counts from the first that multiplies; column is the step's first among the stage's 64.
M1_DEVICE HiddenWords load_hidden(const Ring& ring, const WarpRows& mine, int warp, int column) {
  HiddenWords words;
  const uint32_t gate = ring.left() + warp / 4 * kTileBytes;
#pragma unroll
  for (int i = 0; i < kStepWords; ++i) {
    const uint32_t row = warp % 4 * 16 + mine.row(i % 2);
    const uint32_t place = swizzled(row, column / 8 + i / 2) + mine.lane % 4 * 4;
    words.gate[i] = load_shared4(gate + place);
    words.up[i] = load_shared4(gate + kLeftBoxes * kTileBytes + place);
  }
  return words;
}

M1_DEVICE uint32_t row_sum_slot(const WarpRows& mine, int half) {
  return mine.staging + 3 * kStagingBytes + half * 128 + mine.lane * 4;
}

// The running sum of a row lies in shared memory: in a register the compiler puts the additions off to the end, and
// spills what it has yet to add.
M1_DEVICE void add_to_row_sum(const WarpRows& mine, int half, bool first, float value) {
  const uint32_t slot = row_sum_slot(mine, half);
  store_shared_float(slot, first ? value : load_shared_float(slot) + value);
}

// The tile is dL/d(weighted activation); writes d_hidden, the weighted activation, and this lane's share of every
// row's <d, activation> at partials[row][4 * column tile + lane % 4].
M1_DEVICE void store_swiglu_gradient(const float (&values)[128], const WarpRows& mine, const RowWeights& weights,
                                     const M1DownBackward& call, int left, Ring ring, int warp) {
  const int width = call.ffn_width;
  uint16_t* d_hidden = static_cast<uint16_t*>(call.d_hidden) + int64_t(mine.first_row) * 2 * width + left;
  uint16_t* act = static_cast<uint16_t*>(call.act) + int64_t(mine.first_row) * width + left;
#pragma unroll
  for (int pass = 0; pass < kTileWidth / kPassColumns; ++pass) {
    constexpr int kPassesPerStage = int(kTileColumns) / kPassColumns;
    if (pass % kPassesPerStage == 0) barrier_wait(ring.full(), ring.parity);
    float row_sums[2] = {};
#pragma unroll
    for (int step = 0; step < kStepsPerPass; ++step) {
      const int column_in_stage = pass % kPassesPerStage * kPassColumns + step * kStepColumns;
      const HiddenWords words = load_hidden(ring, mine, warp, column_in_stage);
      const float* d = values + pass * kPassAccumulators + step * kStepAccumulators;
      uint32_t d_gate[kStepWords], d_up[kStepWords], result[kStepWords];
#pragma unroll
      for (int i = 0; i < kStepWords; ++i) {
        const int half = i % 2;
        const uint32_t gate = words.gate[i], up = words.up[i];
        const float weight = weights.of_half[half];
        const SwigluGradient low = swiglu_gradient(d[2 * i], low_bf16(gate), low_bf16(up), weight);
        const SwigluGradient high = swiglu_gradient(d[2 * i + 1], high_bf16(gate), high_bf16(up), weight);
        d_gate[i] = pack_bf16(low.gate, high.gate);
        d_up[i] = pack_bf16(low.up, high.up);
        result[i] = pack_bf16(low.act, high.act);
        row_sums[half] += low.weight + high.weight;
      }
      stage(mine.staging, mine.lane, step, d_gate);
      stage(mine.staging + kStagingBytes, mine.lane, step, d_up);
      stage(mine.staging + 2 * kStagingBytes, mine.lane, step, result);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) add_to_row_sum(mine, half, pass == 0, row_sums[half]);
    sync_warp();
    if (pass % kPassesPerStage == kPassesPerStage - 1) {
      release_stage(ring, mine.lane);
      ring.advance();
    }
    const int column = pass * kPassColumns;
    const int columns = call.ffn_width - left - column;
    copy_out(mine, mine.staging, d_hidden + column, 2 * width, columns);
    copy_out(mine, mine.staging + kStagingBytes, d_hidden + width + column, 2 * width, columns);
    copy_out(mine, mine.staging + 2 * kStagingBytes, act + column, width, columns);
    sync_warp();
  }
  if (call.partials == nullptr) return;
  const int64_t shares = 4 * ceil_div(call.ffn_width, kTileWidth);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (mine.row(half) >= mine.num_rows) continue;
    const int64_t row = mine.first_row + mine.row(half);
    call.partials[row * shares + 4 * (left / kTileWidth) + mine.lane % 4] = load_shared_float(row_sum_slot(mine, half));
  }
}

}  // namespace m1
