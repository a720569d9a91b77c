// Lightning attention for sm_90a: O = scale * (((Q K^T) * M) V + decayed Q S), S <- lambda^L S + K^T (weighted V).
//
// One block per (piece of a document, head, 64 value columns), walking its 64-token chunks in (reversed) time:
//   warpgroup 0  one thread feeds Q, K, V tiles through kStages stages
//   warpgroup 1  scores: P = (Q K^T) * M in bf16, one chunk ahead
//   warpgroup 2  the scan: S^T [64 value, key] stays in fp32 registers from the first chunk to the last;
//                O^T = S^T Q^T, then O^T += V^T P^T, then S^T += weighted V^T K
// A document starts its own chunks and zeroes rows past its end, so its result is bitwise independent of what is
// packed beside it. The prepass (kOutput false) is the same walk without Q, P and O: the local state of a segment.
// Mathematics and tiling: Lightning Attention-2 (arXiv 2401.04658), algorithm 1; backward: see op.py.
#include "launch.h"
#include "tile.cuh"

namespace m1 {
namespace {

constexpr int kThreads = 384;
constexpr int kStages = 4;
constexpr int kBuffers = 2;
constexpr uint32_t kChunk = kTileRows;
constexpr uint32_t kConsumerWarps = 4;
constexpr float kLog2E = 1.4426950408889634f;
// 2^-25: what is left of a contribution that fp32 sums no longer see.
constexpr float kHorizonLog2 = 25.0f;
enum NamedBarrier : uint32_t { kScoreThreads = 1, kScanThreads = 2 };

struct Parameters {
  TensorMap q, k, v, o;
  M1LightningScan call;
  const M1LightningItem* items;
  int num_items;
};

// Shared memory, bytes at key dim 128 (64):
//   stages   4 x (Q 16384 (8192) + K 16384 (8192) + V 8192)  163840 (98304)
//   P        2 x 8192                                          16384
//   O        2 x 8192                                          16384
//   barriers 8 x 12                                               96
//   total                                                     196704 (131168)
template <int kKeyDim>
struct Shared {
  static_assert(kKeyDim == 64 || kKeyDim == 128, "key tiles are one or two swizzled tiles of 64 columns");
  static constexpr uint32_t kKeyBytes = kKeyDim / kTileColumns * kTileBytes;
  static constexpr uint32_t kStageBytes = 2 * kKeyBytes + kTileBytes;
  static constexpr uint32_t kScores = kStages * kStageBytes;
  static constexpr uint32_t kOutputs = kScores + kBuffers * kTileBytes;
  static constexpr uint32_t kBarriers = kOutputs + kBuffers * kTileBytes;
  static constexpr uint32_t kBytes = kBarriers + 8 * (2 * kStages + 2 * kBuffers);
  static_assert(kBytes <= 232448, "a block of sm_90 has 227 KB of shared memory");

  uint32_t base = shared_base();
  M1_DEVICE uint32_t q(uint32_t stage) const { return base + stage * kStageBytes; }
  M1_DEVICE uint32_t k(uint32_t stage) const { return q(stage) + kKeyBytes; }
  M1_DEVICE uint32_t v(uint32_t stage) const { return q(stage) + 2 * kKeyBytes; }
  M1_DEVICE uint32_t scores(uint32_t buffer) const { return base + kScores + buffer * kTileBytes; }
  M1_DEVICE uint32_t outputs(uint32_t buffer) const { return base + kOutputs + buffer * kTileBytes; }
  M1_DEVICE uint32_t full(uint32_t stage) const { return base + kBarriers + 8 * stage; }
  M1_DEVICE uint32_t empty(uint32_t stage) const { return full(kStages + stage); }
  M1_DEVICE uint32_t scores_full(uint32_t buffer) const { return full(2 * kStages + buffer); }
  M1_DEVICE uint32_t scores_empty(uint32_t buffer) const { return full(2 * kStages + kBuffers + buffer); }
};

// Where a warpgroup's thread stands in the 64-row accumulators and fragments.
struct Place {
  uint32_t thread = thread_index() % 128, warp = thread / 32, lane = thread % 32;
  uint32_t row = 16 * warp + lane / 4;
  uint32_t column = 2 * (lane % 4);
};

M1_DEVICE uint32_t num_chunks(const M1LightningItem& item) { return (uint32_t(item.num_tokens) + kChunk - 1) / kChunk; }

template <bool kReverse>
M1_DEVICE uint32_t chunk_at(uint32_t step, uint32_t chunks) {
  return kReverse ? chunks - 1 - step : step;
}
M1_DEVICE int valid_rows(const M1LightningItem& item, uint32_t chunk) {
  const int rest = item.num_tokens - int(chunk * kChunk);
  return rest < int(kChunk) ? rest : int(kChunk);
}

// Read one piece ahead of its use: between short documents the wait for memory would show.
M1_DEVICE M1LightningItem item_at(const Parameters& p, int index) {
  return p.items[index < p.num_items ? index : p.num_items - 1];
}

// The piece of work as this pass walks it: all of it, or, in the prepass, only as many whole chunks at its end as are
// still seen there.
template <bool kReverse, bool kOutput>
M1_DEVICE M1LightningItem walked(const Parameters& p, M1LightningItem item) {
  if (kOutput) return item;
  const float seen = kHorizonLog2 / (p.call.slopes[item.head] * kLog2E) + float(kChunk);
  if (seen < float(item.num_tokens)) {
    const int kept = int(seen) / int(kChunk) * int(kChunk);
    if (!kReverse) item.first_token += item.num_tokens - kept;
    item.num_tokens = kept;
  }
  return item;
}

// Zeroes the rows of a tile that belong to the next document: 0 times its NaN would still be NaN in a product.
M1_DEVICE void zero_rows_from(uint32_t tile, int first_row, uint32_t thread) {
  for (uint32_t unit = thread; unit < kTileRows * 8; unit += 128)
    if (int(unit / 8) >= first_row) store_shared_zero16(tile + unit / 8 * kRowBytes + unit % 8 * 16);
}

template <int kKeyDim, bool kReverse, bool kOutput>
M1_DEVICE void feed(const Parameters& p, const Shared<kKeyDim>& shared) {
  using Layout = Shared<kKeyDim>;
  constexpr uint32_t kBytes = kOutput ? Layout::kStageBytes : Layout::kStageBytes - Layout::kKeyBytes;
  if (kOutput) prefetch_map(&p.q);
  prefetch_map(&p.k);
  prefetch_map(&p.v);
  uint32_t turn = 0;
  M1LightningItem next = item_at(p, int(block_index()));
  for (int i = int(block_index()); i < p.num_items; i += int(num_blocks())) {
    const M1LightningItem item = walked<kReverse, kOutput>(p, next);
    next = item_at(p, i + int(num_blocks()));
    const uint32_t chunks = num_chunks(item);
    for (uint32_t step = 0; step < chunks; ++step, ++turn) {
      const uint32_t stage = turn % kStages;
      const int token = item.first_token + int(chunk_at<kReverse>(step, chunks) * kChunk);
      barrier_wait(shared.empty(stage), (turn / kStages & 1) ^ 1);
      barrier_expect(shared.full(stage), kBytes);
#pragma unroll
      for (uint32_t tile = 0; tile < kKeyDim / kTileColumns; ++tile) {
        const int column = int(tile * kTileColumns);
        if (kOutput) tma_load_3d(shared.q(stage) + tile * kTileBytes, &p.q, shared.full(stage), column, item.head, token);
        tma_load_3d(shared.k(stage) + tile * kTileBytes, &p.k, shared.full(stage), column, item.head, token);
      }
      tma_load_3d(shared.v(stage), &p.v, shared.full(stage), item.value_block * int(kTileColumns), item.head, token);
    }
  }
}

// A thread's 32 scores of a 64x64 tile meet only 18 distances |i - j|: 9 multiples of 8, times 2.
template <bool kReverse>
struct ScoreDecays {
  float factor[9][2];
  M1_DEVICE ScoreDecays(const Place& at, float slope_log2, float scale) {
#pragma unroll
    for (int eights = 0; eights < 9; ++eights)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int ahead = int(at.row) - int(at.column) + 8 * (eights - 7) - odd;
        const int distance = kReverse ? -ahead : ahead;
        factor[eights][odd] = distance < 0 ? 0.0f : scale * exp2_fast(-slope_log2 * float(distance));
      }
  }
  M1_DEVICE float of(int i) const { return factor[i / 2 % 2 - i / 4 + 7][i % 2]; }
};

template <int kKeyDim, bool kReverse>
M1_DEVICE void score(const Parameters& p, const Shared<kKeyDim>& shared) {
  const Place at;
  const uint32_t store_row = 16 * at.warp + at.lane % 8 + 8 * (at.lane / 8 % 2), store_unit = at.lane / 16;
  uint32_t turn = 0;
  M1LightningItem next = item_at(p, int(block_index()));
  for (int i = int(block_index()); i < p.num_items; i += int(num_blocks())) {
    const M1LightningItem item = next;
    next = item_at(p, i + int(num_blocks()));
    const uint32_t chunks = num_chunks(item);
    const ScoreDecays<kReverse> decays(at, p.call.slopes[item.head] * kLog2E, p.call.scale);
    for (uint32_t step = 0; step < chunks; ++step, ++turn) {
      const uint32_t stage = turn % kStages, buffer = turn % kBuffers;
      const int valid = valid_rows(item, chunk_at<kReverse>(step, chunks));
      barrier_wait(shared.full(stage), turn / kStages & 1);
      if (valid < int(kChunk)) {
        for (uint32_t tile = 0; tile < kKeyDim / kTileColumns; ++tile)
          zero_rows_from(shared.k(stage) + tile * kTileBytes, valid, at.thread);
        fence_async_proxy();
        sync_named(kScoreThreads, 128);
      }
      float scores[32];
      wgmma_fence();
#pragma unroll
      for (uint32_t depth = 0; depth < kKeyDim / 16; ++depth)
        wgmma_shared(scores, k_major(shared.q(stage) + depth / 4 * kTileBytes, depth % 4),
                     k_major(shared.k(stage) + depth / 4 * kTileBytes, depth % 4), depth > 0);
      wgmma_commit();
      wgmma_wait<0>();
      sync_warp();
      if (at.lane == 0) barrier_arrive(shared.empty(stage));
      barrier_wait(shared.scores_empty(buffer), (turn / kBuffers & 1) ^ 1);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t word[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int first = 8 * pair + 2 * r;
          word[r] = pack_bf16(scores[first] * decays.of(first), scores[first + 1] * decays.of(first + 1));
        }
        stmatrix_x4(shared.scores(buffer) + swizzled(store_row, 2 * uint32_t(pair) + store_unit), word[0], word[1],
                    word[2], word[3]);
      }
      fence_async_proxy();
      sync_warp();
      if (at.lane == 0) barrier_arrive(shared.scores_full(buffer));
    }
  }
}

// Weights of the 16 token columns that a thread holds: of the entering state on each (scale included), and of each
// in the leaving state; total: what the entering state keeps. Computed for the valid rows of a chunk.
template <bool kReverse>
struct ScanWeights {
  float enter[16], leave[16], total = 0;
  int valid = 0;
  M1_DEVICE void compute(const Place& at, float slope_log2, float scale, int valid_tokens) {
    valid = valid_tokens;
    total = exp2_fast(-slope_log2 * float(valid));
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int token = 8 * (i / 2) + int(at.column) + i % 2;
      const int entered = kReverse ? valid - token : token + 1, left = kReverse ? token : valid - 1 - token;
      const bool own = token < valid;
      enter[i] = own ? scale * exp2_fast(-slope_log2 * float(entered)) : 0.0f;
      leave[i] = own ? exp2_fast(-slope_log2 * float(left)) : 0.0f;
    }
  }
};

M1_DEVICE int key_of(const Place& at, int i) { return 8 * (i / 4) + int(at.column) + i % 2; }
M1_DEVICE int value_of(const Place& at, const M1LightningItem& item, int i) {
  return item.value_block * int(kTileColumns) + int(at.row) + 8 * (i / 2 % 2);
}
M1_DEVICE float* slot_address(const M1LightningScan& call, float* states, int64_t slot, int head) {
  return states + (slot * call.num_heads + head) * call.key_dim * call.value_dim;
}

// The state that enters a piece: state_in decayed through the earlier segments, plus what each of them adds.
template <int kCount>
M1_DEVICE void load_state(const M1LightningScan& call, const M1LightningItem& item, const Place& at, float slope_log2,
                          float (&state)[kCount]) {
  const float segment_log2 = slope_log2 * float(call.segment_tokens);
  const float seen = kHorizonLog2 / segment_log2 + 1.0f;
  const int oldest = float(item.earlier_segments) > seen ? item.earlier_segments - int(seen) : 0;
  const float* entering = call.state_in == nullptr || oldest > 0
                              ? nullptr
                              : call.state_in + item.document * call.state_in_stride_document +
                                    item.head * call.state_in_stride_head;
#pragma unroll
  for (int i = 0; i < kCount; ++i) state[i] = 0.0f;
  if (entering != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      state[i] = entering[key_of(at, i) * call.state_in_stride_key + value_of(at, item, i) * call.state_in_stride_value];
  }
  const float kept = exp2_fast(-segment_log2);
  for (int segment = oldest; segment < item.earlier_segments; ++segment) {
    const float* local = slot_address(call, call.workspace, item.first_slot + segment, item.head);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      state[i] = kept * state[i] + local[key_of(at, i) * call.value_dim + value_of(at, item, i)];
  }
}

template <int kCount>
M1_DEVICE void store_state(const M1LightningScan& call, const M1LightningItem& item, const Place& at, float* target,
                           const float (&state)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) target[key_of(at, i) * call.value_dim + value_of(at, item, i)] = state[i];
}

// One finished O^T tile to memory: whole tiles through the copy engine, a document's last rows one by one.
M1_DEVICE void store_output(const Parameters& p, const M1LightningItem& item, const Place& at, uint32_t tile,
                            uint32_t chunk, int valid, const float (&output)[32]) {
  const uint32_t row = at.lane % 8 + 8 * (at.lane / 16), unit = 2 * at.warp + at.lane / 8 % 2;
  // The store that read this buffer two chunks ago has to be through with it.
  if (at.thread == 0) tma_store_wait_read<1>();
  sync_named(kScanThreads, 128);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    uint32_t word[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) word[r] = pack_bf16(output[8 * pair + 2 * r], output[8 * pair + 2 * r + 1]);
    stmatrix_x4_trans(tile + swizzled(row + 16 * uint32_t(pair), unit), word[0], word[1], word[2], word[3]);
  }
  fence_async_proxy();
  sync_named(kScanThreads, 128);
  const int token = item.first_token + int(chunk * kChunk), column = item.value_block * int(kTileColumns);
  if (valid == int(kChunk)) {
    if (at.thread == 0) tma_store_3d(&p.o, tile, column, item.head, token);
  } else {
    auto* rows = static_cast<uint16_t*>(p.call.o) + token * p.call.o_stride_token + item.head * p.call.o_stride_head + column;
    for (int unit16 = int(at.thread); unit16 < valid * 8; unit16 += 128)
      store_global16(rows + unit16 / 8 * p.call.o_stride_token + unit16 % 8 * 8,
                     load_shared16(tile + swizzled(uint32_t(unit16) / 8, uint32_t(unit16) % 8)));
  }
  if (at.thread == 0) tma_store_commit();
}

// V^T and the weighted V^T as A fragments, from one read of the V tile.
template <bool kReverse>
M1_DEVICE void load_values(uint32_t tile, const Place& at, const ScanWeights<kReverse>& weights, uint32_t (&plain)[4][4],
                           uint32_t (&weighted)[4][4]) {
  const uint32_t row = at.lane % 8 + 8 * (at.lane / 16), unit = 2 * at.warp + at.lane / 8 % 2;
#pragma unroll
  for (int depth = 0; depth < 4; ++depth) {
    ldmatrix_x4_trans(plain[depth], tile + swizzled(row + 16 * uint32_t(depth), unit));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int first = 4 * depth + 2 * (r / 2);
      weighted[depth][r] = pack_bf16(low_bf16(plain[depth][r]) * weights.leave[first],
                                     high_bf16(plain[depth][r]) * weights.leave[first + 1]);
    }
  }
}

template <int kKeyDim, bool kReverse, bool kOutput>
M1_DEVICE void scan(const Parameters& p, const Shared<kKeyDim>& shared) {
  const Place at;
  const M1LightningScan& call = p.call;
  ScanWeights<kReverse> weights;
  uint32_t turn = 0;
  M1LightningItem next = item_at(p, int(block_index()));
  for (int i = int(block_index()); i < p.num_items; i += int(num_blocks())) {
    const M1LightningItem item = walked<kReverse, kOutput>(p, next);
    next = item_at(p, i + int(num_blocks()));
    const uint32_t chunks = num_chunks(item);
    const float slope_log2 = call.slopes[item.head] * kLog2E;
    float state[kKeyDim / 2], output[32];
    if (kOutput) {
      load_state(call, item, at, slope_log2, state);
    } else {
#pragma unroll
      for (int j = 0; j < kKeyDim / 2; ++j) state[j] = 0.0f;
    }
    weights.valid = 0;
    for (uint32_t step = 0; step < chunks; ++step, ++turn) {
      const uint32_t stage = turn % kStages, buffer = turn % kBuffers, chunk = chunk_at<kReverse>(step, chunks);
      const int valid = valid_rows(item, chunk);
      if (valid != weights.valid) weights.compute(at, slope_log2, call.scale, valid);
      // The accumulator layout of S^T is the A fragment layout: no shuffle between the two.
      uint32_t entering[kKeyDim / 16][4];
#pragma unroll
      for (int j = 0; kOutput && j < kKeyDim / 4; ++j) entering[j / 4][j % 4] = pack_bf16(state[2 * j], state[2 * j + 1]);
      // Scaled before any wgmma is under way: later, the compiler would wait for all of them first.
#pragma unroll
      for (int j = 0; j < kKeyDim / 2; ++j) state[j] *= weights.total;
      keep_in_place(state);
      barrier_wait(shared.full(stage), turn / kStages & 1);
      if (valid < int(kChunk)) {
        zero_rows_from(shared.v(stage), valid, at.thread);
        // With output the scores' warpgroup does this.
        for (uint32_t tile = 0; !kOutput && tile < kKeyDim / kTileColumns; ++tile)
          zero_rows_from(shared.k(stage) + tile * kTileBytes, valid, at.thread);
        // The copy engine will write these rows again.
        fence_async_proxy();
        sync_named(kScanThreads, 128);
      }
      if (kOutput) {
        wgmma_fence();
#pragma unroll
        for (uint32_t depth = 0; depth < kKeyDim / 16; ++depth)
          wgmma_registers(output, entering[depth], k_major(shared.q(stage) + depth / 4 * kTileBytes, depth % 4), depth > 0);
        wgmma_commit();
      }
      uint32_t plain[4][4], weighted[4][4];
      load_values(shared.v(stage), at, weights, plain, weighted);
      if (kOutput) {
        wgmma_wait<0>();
#pragma unroll
        for (int j = 0; j < 32; ++j) output[j] *= weights.enter[j / 4 * 2 + j % 2];
        keep_in_place(output);
        barrier_wait(shared.scores_full(buffer), turn / kBuffers & 1);
      }
      wgmma_fence();
      if (kOutput) {
#pragma unroll
        for (uint32_t depth = 0; depth < 4; ++depth)
          wgmma_registers(output, plain[depth], k_major(shared.scores(buffer), depth), 1);
        wgmma_commit();
      }
#pragma unroll
      for (uint32_t depth = 0; depth < 4; ++depth)
        wgmma_registers<1>(state, weighted[depth], n_major(shared.k(stage), depth), 1);
      wgmma_commit();
      if (kOutput) {
        wgmma_wait<1>();
        sync_warp();
        if (at.lane == 0) barrier_arrive(shared.scores_empty(buffer));
        store_output(p, item, at, shared.outputs(buffer), chunk, valid, output);
      }
      wgmma_wait<0>();
      sync_warp();
      if (at.lane == 0) barrier_arrive(shared.empty(stage));
    }
    if (!kOutput) {
      store_state(call, item, at, slot_address(call, call.workspace, item.first_slot + item.earlier_segments, item.head), state);
    } else if (item.closes != 0 && call.state_out != nullptr) {
      store_state(call, item, at, slot_address(call, call.state_out, item.document, item.head), state);
    }
  }
  if (kOutput && at.thread == 0) tma_store_wait_read<0>();
}

template <int kKeyDim, bool kReverse, bool kOutput>
M1_KERNEL(kThreads) lightning_kernel(M1_GRID_CONSTANT Parameters p) {
  const Shared<kKeyDim> shared;
  if (thread_index() == 0) {
    for (uint32_t stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), kOutput ? 2 * kConsumerWarps : kConsumerWarps);
    }
    for (uint32_t buffer = 0; buffer < kBuffers; ++buffer) {
      barrier_init(shared.scores_full(buffer), kConsumerWarps);
      barrier_init(shared.scores_empty(buffer), kConsumerWarps);
    }
    fence_barrier_init();
  }
  sync_block();
  const uint32_t warpgroup = uniform(thread_index() / 128);
  if (warpgroup == 0) {
    release_registers<24>();
    if (thread_index() == 0) feed<kKeyDim, kReverse, kOutput>(p, shared);
  } else if (warpgroup == 1) {
    release_registers<128>();
    if (kOutput) score<kKeyDim, kReverse>(p, shared);
  } else {
    acquire_registers<240>();
    scan<kKeyDim, kReverse, kOutput>(p, shared);
  }
}

// Strides in elements; a dim of one element may carry any stride, which the driver would refuse.
int encode_operand(TensorMap* map, const void* address, const M1LightningScan& call, int32_t head_dim,
                   int64_t stride_token, int64_t stride_head) {
  const uint64_t dims[3] = {uint64_t(head_dim), uint64_t(call.num_heads), uint64_t(call.num_tokens)};
  const uint64_t strides[2] = {uint64_t(call.num_heads > 1 ? stride_head : head_dim) * 2,
                               uint64_t(call.num_tokens > 1 ? stride_token : int64_t(head_dim) * call.num_heads) * 2};
  return encode_map_3d(map, address, dims, strides, {kTileColumns, 1, kTileRows});
}

template <int kKeyDim, bool kReverse, bool kOutput>
int run(Parameters& parameters, const M1LightningItem* items, int num_items) {
  if (num_items == 0) return 0;
  parameters.items = items;
  parameters.num_items = num_items;
  const int multiprocessors = parameters.call.num_multiprocessors;
  return launch(lightning_kernel<kKeyDim, kReverse, kOutput>, num_items < multiprocessors ? num_items : multiprocessors,
                kThreads, int(Shared<kKeyDim>::kBytes), parameters.call.stream, parameters);
}

template <int kKeyDim, bool kReverse>
int run_both(Parameters& parameters) {
  const M1LightningScan& call = parameters.call;
  const int status = run<kKeyDim, kReverse, false>(parameters, call.state_items, call.num_state_items);
  return status != 0 ? status : run<kKeyDim, kReverse, true>(parameters, call.items, call.num_items);
}

}  // namespace
}  // namespace m1

extern "C" __attribute__((visibility("default"))) int m1_lightning_scan_sm90(const M1LightningScan* call) {
  using namespace m1;
  const auto supported = [](int32_t dim) { return dim == 64 || dim == 128; };
  if (!supported(call->key_dim) || !supported(call->value_dim)) return kNoInstantiation;
  Parameters p{};
  p.call = *call;
  int status = 0;
  if (call->num_tokens > 0) {
    status = encode_operand(&p.k, call->k, *call, call->key_dim, call->k_stride_token, call->k_stride_head);
    if (status == 0) status = encode_operand(&p.v, call->v, *call, call->value_dim, call->v_stride_token, call->v_stride_head);
    // A prepass alone has neither.
    if (call->num_items > 0) {
      if (status == 0) status = encode_operand(&p.q, call->q, *call, call->key_dim, call->q_stride_token, call->q_stride_head);
      if (status == 0) status = encode_operand(&p.o, call->o, *call, call->value_dim, call->o_stride_token, call->o_stride_head);
    }
  }
  if (status != 0) return status;
  if (call->key_dim == 64) return call->reverse != 0 ? run_both<64, true>(p) : run_both<64, false>(p);
  return call->reverse != 0 ? run_both<128, true>(p) : run_both<128, false>(p);
}
