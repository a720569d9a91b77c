// Routing: top-k with softmax over the chosen, and the stable counting sort of the token-expert pairs. No atomics.
// The sort counts per chunk and expert, turns the counts into first rows, and lets one thread per expert and chunk
// hand out its rows in pair order. At 16K pairs its traffic is under 1 MB, so it needs neither shared memory nor warps'
// tricks. Legend: launch.h.
#include "launch.h"

#include "primitives.h"

namespace m1 {
namespace {

constexpr int kRouteThreads = 128;
constexpr int kScanBatch = 8;
constexpr float kLog2E = 1.44269504088896340736f;

// A key that orders floats as torch.sort does (NaN above all, -0 equal to +0) and, on ties, lower experts first.
M1_DEVICE uint64_t order_key(float value, uint32_t expert) {
  union {
    float number;
    uint32_t bits;
  } view;
  view.number = value + 0.0f;
  const bool negative = view.bits >> 31;
  uint32_t rank = negative ? ~view.bits : view.bits | 0x80000000u;
  if (value != value) rank = 0xffffffffu;
  return (uint64_t(rank) << 32) | (0xffffffffu - expert);
}

M1_KERNEL(kRouteThreads) route_kernel(M1_GRID_CONSTANT M1MoeRoute call) {
  const int token = block_index() * kRouteThreads + thread_index();
  if (token >= call.num_tokens) return;
  const float* logits = call.logits + int64_t(token) * call.num_experts;
  float* weights = call.weights + int64_t(token) * call.num_choices;
  int64_t* experts = call.experts + int64_t(token) * call.num_choices;
  uint64_t previous = ~0ull;
  float largest = 0.0f;
  float total = 0.0f;
  for (int choice = 0; choice < call.num_choices; ++choice) {
    uint64_t best = 0;
    for (int expert = 0; expert < call.num_experts; ++expert) {
      const uint64_t key = order_key(logits[expert], expert);
      if (key < previous && key > best) best = key;
    }
    previous = best;
    const uint32_t expert = 0xffffffffu - uint32_t(best);
    if (choice == 0) largest = logits[expert];
    const float weight = exp2_fast((logits[expert] - largest) * kLog2E);
    total += weight;
    experts[choice] = expert;
    weights[choice] = weight;
  }
  const float scale = 1.0f / total;
  for (int choice = 0; choice < call.num_choices; ++choice) weights[choice] *= scale;
}

constexpr int kSortThreads = 1024;

M1_KERNEL(kSortThreads) count_kernel(M1_GRID_CONSTANT M1MoeSort call) {
  const int chunk = block_index();
  const int first = chunk * M1_SORT_CHUNK;
  const int last = first + M1_SORT_CHUNK < call.num_pairs ? first + M1_SORT_CHUNK : call.num_pairs;
  const int expert = thread_index();
  if (expert >= call.num_experts) return;
  int count = 0;
#pragma unroll 8
  for (int pair = first; pair < last; ++pair) count += call.experts[pair] == expert;
  call.chunk_counts[int64_t(chunk) * call.num_experts + expert] = count;
}

// Replaces each count by the row that the chunk's first pair of that expert gets.
M1_KERNEL(kSortThreads) scan_kernel(M1_GRID_CONSTANT M1MoeSort call) {
  const int expert = thread_index();
  const int num_chunks = (call.num_pairs + M1_SORT_CHUNK - 1) / M1_SORT_CHUNK;
  int64_t total = 0;
  if (expert < call.num_experts) {
    for (int chunk = 0; chunk < num_chunks; ++chunk)
      total += call.chunk_counts[int64_t(chunk) * call.num_experts + expert];
    call.rows_per_expert[expert] = total;
  }
  sync_block();
  if (expert >= call.num_experts) return;
  int row = 0;
  for (int earlier = 0; earlier < expert; ++earlier) row += int(call.rows_per_expert[earlier]);
  int32_t* column = call.chunk_counts + expert;
  // A batch is read before it is overwritten, so that its loads overlap.
  for (int first = 0; first < num_chunks; first += kScanBatch) {
    int counts[kScanBatch];
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i)
      counts[i] = first + i < num_chunks ? column[int64_t(first + i) * call.num_experts] : 0;
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) {
      if (first + i < num_chunks) column[int64_t(first + i) * call.num_experts] = row;
      row += counts[i];
    }
  }
}

M1_KERNEL(kSortThreads) place_kernel(M1_GRID_CONSTANT M1MoeSort call) {
  const int chunk = block_index();
  const int first = chunk * M1_SORT_CHUNK;
  const int last = first + M1_SORT_CHUNK < call.num_pairs ? first + M1_SORT_CHUNK : call.num_pairs;
  const int expert = thread_index();
  if (expert >= call.num_experts) return;
  int64_t row = call.chunk_counts[int64_t(chunk) * call.num_experts + expert];
  for (int pair = first; pair < last; ++pair) {
    if (call.experts[pair] != expert) continue;
    call.pair_of_row[row] = pair;
    call.row_of_pair[pair] = row;
    ++row;
  }
}

}  // namespace
}  // namespace m1

extern "C" int m1_moe_route(const M1MoeRoute* call) {
  const int blocks = (call->num_tokens + m1::kRouteThreads - 1) / m1::kRouteThreads;
  return m1::launch(m1::route_kernel, blocks, m1::kRouteThreads, 0, call->stream, *call);
}

extern "C" int m1_moe_sort(const M1MoeSort* call) {
  const int num_chunks = (call->num_pairs + M1_SORT_CHUNK - 1) / M1_SORT_CHUNK;
  const int threads = (call->num_experts + 31) / 32 * 32;
  int status = m1::launch(m1::count_kernel, num_chunks, threads, 0, call->stream, *call);
  if (status == 0) status = m1::launch(m1::scan_kernel, 1, threads, 0, call->stream, *call);
  if (status == 0) status = m1::launch(m1::place_kernel, num_chunks, threads, 0, call->stream, *call);
  return status;
}
