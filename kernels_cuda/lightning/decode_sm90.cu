// One token of lightning attention per sequence: S <- lambda S + k v^T in place, o = scale * S^T q.
//
// Pure bandwidth: every state is read and written once, 16 bytes a thread. One block per (sequence, head, 64 value
// columns): 16 threads across the columns, kRowGroups down the key dim; the groups' sums meet in shared memory and
// are added in a fixed order.
#include "launch.h"
#include "primitives.h"

namespace m1 {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 64;
constexpr int kColumnsPerThread = 4;
constexpr int kColumnThreads = kColumns / kColumnsPerThread;
constexpr int kRowGroups = kThreads / kColumnThreads;
// Shared memory: the partial sums of o, kRowGroups x 64 fp32 = 4096 bytes.
constexpr int kSharedBytes = kRowGroups * kColumns * 4;
constexpr float kLog2E = 1.4426950408889634f;

struct alignas(16) Four {
  float x[kColumnsPerThread];
};

M1_DEVICE float read_bf16(const void* address, int64_t index) {
  return low_bf16(static_cast<const uint16_t*>(address)[index]);
}

template <int kKeyDim>
M1_KERNEL(kThreads) decode_kernel(M1_GRID_CONSTANT M1LightningDecode call) {
  constexpr int kRows = kKeyDim / kRowGroups;
  static_assert(kKeyDim % kRowGroups == 0, "every row group takes the same number of key rows");
  const int blocks_per_head = call.value_dim / kColumns;
  const int block = int(block_index()) % blocks_per_head, pair = int(block_index()) / blocks_per_head;
  const int head = pair % call.num_heads, sequence = pair / call.num_heads;
  const int thread = int(thread_index()), group = thread / kColumnThreads;
  const int column = block * kColumns + thread % kColumnThreads * kColumnsPerThread;
  float* state = call.state + (int64_t(pair) * kKeyDim + group) * call.value_dim + column;
  Four rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = *reinterpret_cast<const Four*>(state + r * kRowGroups * call.value_dim);
  const float kept = exp2_fast(-call.slopes[head] * kLog2E);
  const int64_t q = sequence * call.q_stride_sequence + head * call.q_stride_head;
  const int64_t k = sequence * call.k_stride_sequence + head * call.k_stride_head;
  const int64_t v = sequence * call.v_stride_sequence + head * call.v_stride_head + column;
  Four value, sum = {};
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) value.x[c] = read_bf16(call.v, v + c);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = group + r * kRowGroups;
    const float key = read_bf16(call.k, k + row), query = read_bf16(call.q, q + row);
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      rows[r].x[c] = kept * rows[r].x[c] + key * value.x[c];
      sum.x[c] += query * rows[r].x[c];
    }
    *reinterpret_cast<Four*>(state + r * kRowGroups * call.value_dim) = rows[r];
  }
  const uint32_t partial = shared_base();
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) store_shared_float(partial + uint32_t(thread * kColumnsPerThread + c) * 4, sum.x[c]);
  sync_block();
  if (thread >= kColumns) return;
  float output = 0;
#pragma unroll
  for (int other = 0; other < kRowGroups; ++other) output += load_shared_float(partial + uint32_t(other * kColumns + thread) * 4);
  static_cast<uint16_t*>(call.o)[int64_t(pair) * call.value_dim + block * kColumns + thread] =
      uint16_t(pack_bf16(call.scale * output, 0.0f));
}

}  // namespace
}  // namespace m1

extern "C" __attribute__((visibility("default"))) int m1_lightning_decode_sm90(const M1LightningDecode* call) {
  using namespace m1;
  const auto supported = [](int32_t dim) { return dim == 64 || dim == 128; };
  if (!supported(call->key_dim) || !supported(call->value_dim)) return kNoInstantiation;
  const int blocks = call->num_sequences * call->num_heads * (call->value_dim / kColumns);
  if (blocks == 0) return 0;
  const auto kernel = call->key_dim == 64 ? decode_kernel<64> : decode_kernel<128>;
  return launch(kernel, blocks, kThreads, kSharedBytes, call->stream, *call);
}
