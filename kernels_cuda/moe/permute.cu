// The two row moves between tokens and rows sorted by expert: gather, and the sum over a token's rows in a fixed order.
// One block per output row, 16 bytes a thread and step; both are bound by memory. Legend: launch.h.
#include "launch.h"

#include "primitives.h"

namespace m1 {
namespace {

constexpr int kMoveThreads = 128;
constexpr int kUnitElements = 8;

M1_DEVICE const uint4* row_of(const void* matrix, int64_t row, int units) {
  return static_cast<const uint4*>(matrix) + row * units;
}

M1_KERNEL(kMoveThreads) permute_kernel(M1_GRID_CONSTANT M1MoeMove call) {
  const int units = call.width / kUnitElements;
  const int64_t row = block_index();
  const uint4* from = row_of(call.from, call.row_map[row] / call.num_choices, units);
  uint4* to = static_cast<uint4*>(call.to) + row * units;
#pragma unroll 4
  for (int unit = thread_index(); unit < units; unit += kMoveThreads) store_global16(to + unit, from[unit]);
}

M1_DEVICE void add_pair(float& low, float& high, uint32_t packed) {
  low += low_bf16(packed);
  high += high_bf16(packed);
}

M1_KERNEL(kMoveThreads) unpermute_kernel(M1_GRID_CONSTANT M1MoeMove call) {
  const int units = call.width / kUnitElements;
  const int64_t token = block_index();
  const int64_t* rows = call.row_map + token * call.num_choices;
  uint4* to = static_cast<uint4*>(call.to) + token * units;
#pragma unroll 2
  for (int unit = thread_index(); unit < units; unit += kMoveThreads) {
    float sums[kUnitElements] = {};
    for (int choice = 0; choice < call.num_choices; ++choice) {
      const uint4 values = row_of(call.from, rows[choice], units)[unit];
      add_pair(sums[0], sums[1], values.x);
      add_pair(sums[2], sums[3], values.y);
      add_pair(sums[4], sums[5], values.z);
      add_pair(sums[6], sums[7], values.w);
    }
    uint4 packed;
    packed.x = pack_bf16(sums[0], sums[1]);
    packed.y = pack_bf16(sums[2], sums[3]);
    packed.z = pack_bf16(sums[4], sums[5]);
    packed.w = pack_bf16(sums[6], sums[7]);
    store_global16(to + unit, packed);
  }
}

}  // namespace
}  // namespace m1

extern "C" int m1_moe_permute(const M1MoeMove* call) {
  return m1::launch(m1::permute_kernel, call->num_rows, m1::kMoveThreads, 0, call->stream, *call);
}

extern "C" int m1_moe_unpermute(const M1MoeMove* call) {
  return m1::launch(m1::unpermute_kernel, call->num_rows, m1::kMoveThreads, 0, call->stream, *call);
}
