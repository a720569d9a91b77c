// Matrix products over rows grouped by expert, for sm_90a: TMA loads that serve pairs of blocks, wgmma, persistent
// blocks, SwiGLU in the epilogue.
//
// One kernel, six uses (Use below). Forward: gate_up with SwiGLU, then the product with down. Backward: d_y down with
// the derivative of SwiGLU, the product with gate_up, two weight gradients whose depth is an expert's rows. Weights
// are read as they lie, K-major or not: wgmma transposes either operand from shared memory. Which pair computes a tile
// is decided as they go; the order of each sum is not, so two runs are bit-equal.
// Source: MiniMax-01 (arXiv 2501.08313), section 2.1; backward without Y: SonicMoE (arXiv 2512.14080).
#include "grouped_epilogue.cuh"

namespace m1 {
namespace {

enum class Use { kGateUp, kProduct, kProductTransposed, kDownBackward, kGradientFp32, kGradientBf16 };

template <Use kUse>
struct Traits {
  static constexpr bool kGradient = kUse == Use::kGradientFp32 || kUse == Use::kGradientBf16;
  static constexpr bool kLeftTransposed = kGradient;
  static constexpr bool kRightTransposed =
      kGradient || kUse == Use::kProductTransposed || kUse == Use::kDownBackward;
  static constexpr int kColumnsPerTile = kUse == Use::kGateUp ? kTileWidth / 2 : kTileWidth;
  static constexpr int kLoadRegisters = 56;
  static constexpr int kMultiplyRegisters = 224;
  static_assert(kLoadRegisters + 2 * kMultiplyRegisters <= 3 * 168, "a block starts with 168 registers a thread");
};

template <typename Call>
struct Parameters {
  TensorMap left_map;
  TensorMap right_map;
  TensorMap epilogue_map;  // what a gradient is written to; what d_y down finds hidden in
  Call call;
  int depth;    // of a product; a gradient's depth is its expert's rows
  int height;   // of a gradient; a product's height is its expert's rows
  int columns;
};

template <Use kUse, typename Call>
M1_DEVICE int depth_of(const Parameters<Call>& p, const Tile& tile) {
  return Traits<kUse>::kGradient ? tile.num_rows : p.depth;
}

// The tile of block `rank` of the pair.
template <Use kUse>
M1_DEVICE Tile tile_of(const TilePair& pair, int rank) {
  Tile tile = pair.first;
  if (pair.side_by_side) {
    tile.left += rank * Traits<kUse>::kColumnsPerTile;
    return tile;
  }
  tile.top += rank * kTileHeight;
  if (Traits<kUse>::kGradient) return tile;
  tile.first_row += rank * kTileHeight;
  tile.num_rows -= rank * kTileHeight;
  return tile;
}

// The lower half of a tile's rows is not read where none of them exists (skip_tile).
template <Use kUse>
M1_DEVICE bool upper_half_only(const Tile& tile) {
  return !Traits<kUse>::kGradient && tile.num_rows <= 64;
}

// Which blocks of the pair a box goes to, a bit each.
constexpr uint16_t kBoth = 3;

template <Use kUse, typename Call>
M1_DEVICE void load_left(const Parameters<Call>& p, const Tile& tile, const Ring& ring, int k, uint16_t blocks) {
#pragma unroll
  for (int box = 0; box < kLeftBoxes; ++box) {
    if (box == 1 && upper_half_only<kUse>(tile)) break;
    const uint32_t to = ring.left() + box * kTileBytes;
    if constexpr (Traits<kUse>::kLeftTransposed) {
      tma_load_pair_3d(to, &p.left_map, ring.full(), blocks, tile.top + 64 * box, tile.first_row + k, 0);
    } else {
      tma_load_pair_3d(to, &p.left_map, ring.full(), blocks, k, tile.first_row + 64 * box, 0);
    }
  }
}

template <Use kUse, typename Call>
M1_DEVICE void load_right(const Parameters<Call>& p, const Tile& tile, const Ring& ring, int k, uint16_t blocks) {
#pragma unroll
  for (int box = 0; box < kRightBoxes; ++box) {
    const uint32_t to = ring.right() + box * kTileBytes;
    const int left = tile.left + 64 * box;
    if constexpr (Traits<kUse>::kGradient) {
      tma_load_pair_3d(to, &p.right_map, ring.full(), blocks, left, tile.first_row + k, 0);
    } else if constexpr (Traits<kUse>::kRightTransposed) {
      tma_load_pair_3d(to, &p.right_map, ring.full(), blocks, left, k, tile.expert);
    } else if constexpr (kUse == Use::kGateUp) {
      // Boxes 0 and 1 are gate, 2 and 3 up: one thread then holds both of a place.
      tma_load_pair_3d(to, &p.right_map, ring.full(), blocks, k, tile.left + 64 * (box % 2), 2 * tile.expert + box / 2);
    } else {
      tma_load_pair_3d(to, &p.right_map, ring.full(), blocks, k, left, tile.expert);
    }
  }
}

// So many bytes are to come before this stage is full, in either block.
M1_DEVICE void expect(const Ring& ring, uint32_t bytes) {
  barrier_expect(ring.full(), bytes);
  barrier_expect_pair(ring.in(1).full(), bytes);
}

// The loading warp goes through its loops as one, with the same values in every lane, so that addresses are computed
// in uniform registers; this lane speaks for it.
M1_DEVICE bool speaks() { return thread_index() == 0; }

// A lane that came late would take the stage's next lap for this one: all see it free before any goes on.
M1_DEVICE void await_free_stage(const Ring& ring) {
  barrier_wait(ring.empty(), ring.parity ^ 1);
  sync_warp();
}

M1_DEVICE TilePair uniform_pair(const TilePair& pair) {
  const Tile& tile = pair.first;
  return {{int(uniform(tile.expert)), int(uniform(tile.first_row)), int(uniform(tile.num_rows)),
           int(uniform(tile.top)), int(uniform(tile.left))},
          uniform(pair.side_by_side) != 0};
}

template <Use kUse, typename Call>
M1_DEVICE void load_stage(const Parameters<Call>& p, const TilePair& pair, const Ring& ring, int k) {
  if (pair.side_by_side) {
    load_left<kUse>(p, pair.first, ring, k, kBoth);
    for (int rank = 0; rank < 2; ++rank) load_right<kUse>(p, tile_of<kUse>(pair, rank), ring, k, 1 << rank);
  } else {
    for (int rank = 0; rank < 2; ++rank) load_left<kUse>(p, tile_of<kUse>(pair, rank), ring, k, 1 << rank);
    load_right<kUse>(p, pair.first, ring, k, kBoth);
  }
}

// Sends each block the tile that starts with this stage.
template <Use kUse>
M1_DEVICE void announce(const Ring& ring, const TilePair& pair) {
  for (int rank = 0; rank < 2; ++rank) {
    const Tile tile = tile_of<kUse>(pair, rank);
    const Ring there = ring.in(rank);
    store_pair16(there.tile(), {uint32_t(tile.expert), uint32_t(tile.first_row), uint32_t(tile.num_rows), 0},
                 there.full());
    store_pair16(there.tile() + 16, {uint32_t(tile.top), uint32_t(tile.left), 0, 0}, there.full());
  }
}

// What the epilogue of d_y down reads, behind the depth; see kHiddenStages.
template <Use kUse>
M1_DEVICE void load_hidden_stages(const TensorMap* map, Ring& ring, const TilePair& pair) {
  const int halves = upper_half_only<kUse>(pair.first) ? 1 : kLeftBoxes;
#pragma unroll 1
  for (int stage = 0; stage < kHiddenStages; ++stage, ring.advance()) {
    await_free_stage(ring);
    if (!speaks()) continue;
    expect(ring, 2 * halves * kTileBytes);
    for (int rank = 0; rank < 2; ++rank) {
      const Tile tile = tile_of<kUse>(pair, rank);
      for (int box = 0; box < kHiddenBoxes; ++box)
        if (box % kLeftBoxes < halves)
          tma_load_pair_3d(ring.left() + box * kTileBytes, map, ring.full(), 1 << rank, tile.left + 64 * stage,
                           tile.first_row + 64 * (box % kLeftBoxes), box / kLeftBoxes);
    }
  }
}

template <Use kUse, typename Call>
M1_DEVICE void load_pair(const Parameters<Call>& p, Ring& ring, const TilePair& pair) {
  const int depth = depth_of<kUse>(p, pair.first);
  const uint32_t bytes = upper_half_only<kUse>(pair.first) ? kStageBytes - kTileBytes : kStageBytes;
  int k = 0;
  // A gradient of no rows has a stage too, an empty one, that tells of the tile.
#pragma unroll 1
  do {
    await_free_stage(ring);
    if (speaks()) {
      expect(ring, (depth > 0 ? bytes : 0) + (k == 0 ? kTileWordsBytes : 0));
      if (k == 0) announce<kUse>(ring, pair);
      if (depth > 0) load_stage<kUse>(p, pair, ring, k);
    }
    ring.advance();
  } while ((k += kTileDepth) < depth);
  if constexpr (kUse == Use::kDownBackward) load_hidden_stages<kUse>(&p.epilogue_map, ring, pair);
}

template <Use kUse, typename Call, typename Tiles>
M1_DEVICE void load_queue(const Parameters<Call>& p, Ring& ring, Tiles tiles, int32_t* taken) {
  int index = uniform(speaks() ? take_ticket(taken) : 0);
  for (TilePair pair; tiles.find(index, pair);) {
    // Asked for now, needed when this pair's loads are out: the answer takes about a microsecond.
    const int next = speaks() ? take_ticket(taken) : 0;
    load_pair<kUse>(p, ring, uniform_pair(pair));
    index = uniform(next);
  }
}

// A product has two queues: a pair of blocks empties the one it begins with, then helps with the other.
template <Use kUse, typename Call>
M1_DEVICE void load_all(const Parameters<Call>& p, uint32_t base) {
  Ring ring{base};
  const M1Group& group = p.call.group;
  if constexpr (Traits<kUse>::kGradient) {
    load_queue<kUse>(p, ring, GradientTiles(group, p.height, p.columns), group.taken_tiles);
  } else {
    const int pairs = num_blocks() / 2;
    bool short_ones = int(block_index() / 2) >= pairs - pairs_for_short_tiles(group, pairs);
#pragma unroll 1
    for (int queue = 0; queue < 2; ++queue, short_ones = !short_ones)
      load_queue<kUse>(p, ring, ProductTiles(group, short_ones, p.columns, Traits<kUse>::kColumnsPerTile),
                       group.taken_tiles + short_ones);
  }
  await_free_stage(ring);
  if (!speaks()) return;
  expect(ring, kTileWordsBytes);
  announce<kUse>(ring, {{kNoExpert, 0, 0, 0, 0}, false});
}

// A gradient's depth ends inside a stage: what follows belongs to another expert and may be NaN, so it becomes zero.
M1_DEVICE void zero_rows_from(const Ring& ring, int first_row, int thread) {
  const int units = (kTileRows - first_row) * 8;
  for (int i = thread; i < units * (kLeftBoxes + kRightBoxes); i += 256)
    store_shared_zero16(ring.left() + i / units * kTileBytes + first_row * kRowBytes + i % units * 16);
  fence_async_proxy();
  sync_named(1, 256);
}

template <Use kUse>
M1_DEVICE void multiply_stage(float (&sums)[128], const Ring& ring, int half) {
  constexpr int kLeft = Traits<kUse>::kLeftTransposed;
  constexpr int kRight = Traits<kUse>::kRightTransposed;
  const uint32_t left = ring.left() + half * kTileBytes;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTileDepth / 16; ++step) {
    const uint64_t a = kLeft ? n_major(left, step) : k_major(left, step);
    const uint64_t b = kRight ? n_major(ring.right(), step) : k_major(ring.right(), step);
    wgmma_shared<kLeft, kRight>(sums, a, b, 1);
  }
  wgmma_commit();
}

// Adds the tile's depth to sums; one product stays in flight while the next stage is awaited.
template <Use kUse>
M1_DEVICE void multiply_tile(float (&sums)[128], Ring& ring, int depth, int half, int lane) {
  Ring previous = ring;
  for (int k = 0; k < depth; k += kTileDepth) {
    barrier_wait(ring.full(), ring.parity);
    if constexpr (Traits<kUse>::kGradient) {
      if (depth - k < kTileDepth) zero_rows_from(ring, depth - k, thread_index() - 128);
    }
    multiply_stage<kUse>(sums, ring, half);
    if (k > 0) {
      wgmma_wait<1>();
      release_stage(previous, lane);
    }
    previous = ring;
    ring.advance();
  }
  wgmma_wait<0>();
  keep_in_place(sums);
  release_stage(previous, lane);
  if (depth == 0) ring.advance();
}

// A tile outside its matrix, or the half of one that lies below its rows: its stages pass by unread.
M1_DEVICE void skip_tile(Ring& ring, int depth, int lane) {
  int k = 0;
  do {
    barrier_wait(ring.full(), ring.parity);
    release_stage(ring, lane);
    ring.advance();
  } while ((k += kTileDepth) < depth);
}

template <Use kUse, typename Call>
M1_DEVICE void store_result(const Parameters<Call>& p, const Tile& tile, const float (&sums)[128],
                            const WarpRows& mine, const RowWeights& weights, const Ring& ring, int warp) {
  if constexpr (kUse == Use::kGateUp) {
    store_swiglu(sums, mine, weights, p.call, tile.left);
  } else if constexpr (kUse == Use::kDownBackward) {
    store_swiglu_gradient(sums, mine, weights, p.call, tile.left, ring, warp);
  } else if constexpr (Traits<kUse>::kGradient) {
    constexpr bool kAdds = kUse == Use::kGradientFp32;
    if (!kAdds || tile.num_rows > 0) send_gradient<kAdds>(sums, mine, &p.epilogue_map, tile);
  } else {
    store_tile(sums, mine, static_cast<uint16_t*>(p.call.out), p.columns, tile.left);
  }
}

// The tile whose first stage comes next in the ring. Read by the lane that will give the stage back.
M1_DEVICE Tile announced_tile(const Ring& ring, int lane) {
  barrier_wait(ring.full(), ring.parity);
  uint4 rows = {}, place = {};
  if (lane == 0) {
    rows = load_shared16(ring.tile());
    place = load_shared16(ring.tile() + 16);
  }
  return {int(uniform(rows.x)), int(uniform(rows.y)), int(uniform(rows.z)), int(uniform(place.x)),
          int(uniform(place.y))};
}

template <Use kUse, typename Call>
M1_DEVICE void multiply_tiles(const Parameters<Call>& p, uint32_t base) {
  const int warp = uniform(thread_index() / 32) - 4;
  const int lane = thread_index() % 32;
  const int half = warp / 4;
  Ring ring{base};
  for (Tile tile; (tile = announced_tile(ring, lane)).expert != kNoExpert;) {
    const int depth = depth_of<kUse>(p, tile);
    const int height = Traits<kUse>::kGradient ? p.height - tile.top : tile.num_rows;
    // A tail whose depth is zeroed needs all 256 threads, so a gradient skips no half of a tile.
    const int first = Traits<kUse>::kGradient ? 0 : 64 * half;
    if (first >= height || tile.left >= p.columns) {
      skip_tile(ring, depth + (kUse == Use::kDownBackward ? kHiddenStages * kTileDepth : 0), lane);
      continue;
    }
    const WarpRows mine = warp_rows(base, warp, lane, tile.top, height);
    // Asked for now, needed behind the products: it may come from far.
    RowWeights weights = {};
    if constexpr (kUse == Use::kGateUp || kUse == Use::kDownBackward)
      weights = load_row_weights(p.call.row_weights, mine);
    // Zeroed rather than overwritten by the first product: else the last tile's sums stay alive and spill.
    float sums[128] = {};
    multiply_tile<kUse>(sums, ring, depth, half, lane);
    store_result<kUse>(p, tile, sums, mine, weights, ring, warp);
    // Not by the epilogue: the ring would leave the uniform registers, and every product compute its addresses anew.
    if (kUse == Use::kDownBackward)
      for (int stage = 0; stage < kHiddenStages; ++stage) ring.advance();
  }
  if (Traits<kUse>::kGradient && lane == 0) tma_store_wait_read<0>();
}

template <Use kUse, typename Call>
M1_KERNEL(kThreads) grouped_kernel(M1_GRID_CONSTANT Parameters<Call> p) {
  const uint32_t base = shared_base();
  if (thread_index() == 0) {
    prefetch_map(&p.left_map);
    prefetch_map(&p.right_map);
    init_ring(base);
  }
  sync_pair();
  if (uniform(thread_index() / 128) == 0) {
    release_registers<Traits<kUse>::kLoadRegisters>();
    if (uniform(thread_index() / 32) == 0 && rank_in_pair() == 0) load_all<kUse>(p, base);
  } else {
    acquire_registers<Traits<kUse>::kMultiplyRegisters>();
    multiply_tiles<kUse>(p, base);
  }
  // The second block may still give stages back to the first.
  sync_pair();
}

constexpr int kSumThreads = 128;

// d_row_weights[row] = the sum of the row's shares, in order.
M1_KERNEL(kSumThreads) sum_partials_kernel(M1_GRID_CONSTANT M1DownBackward call) {
  const int row = block_index() * kSumThreads + thread_index();
  if (row >= call.group.num_rows) return;
  const int shares = 4 * ceil_div(call.ffn_width, kTileWidth);
  const float* share = call.partials + int64_t(row) * shares;
  float sum = 0.0f;
  for (int i = 0; i < shares; ++i) sum += share[i];
  call.d_row_weights[row] = sum;
}

// A stack of matrices of bf16, rows contiguous in their last dim; boxes of 64 x 64.
int matrix_map(TensorMap* map, const void* address, int64_t columns, int64_t rows, int64_t stride_row, int64_t count) {
  const uint64_t dims[3] = {uint64_t(columns), uint64_t(rows), uint64_t(count)};
  const uint64_t strides_bytes[2] = {uint64_t(stride_row) * 2, uint64_t(stride_row) * uint64_t(rows) * 2};
  return encode_map_3d(map, address, dims, strides_bytes, {64, 64, 1});
}

template <Use kUse, typename Call>
int launch_grouped(const Parameters<Call>& p) {
  const int halved = p.call.group.num_multiprocessors / 2;
  const int pairs = halved > 0 ? halved : 1;
  const int status = zero_device_memory(p.call.group.taken_tiles, 2 * sizeof(int32_t), p.call.group.stream);
  if (status != 0) return status;
  return launch_pairs(grouped_kernel<kUse, Call>, pairs, kThreads, kSharedBytes, p.call.group.stream, p);
}

}  // namespace
}  // namespace m1

extern "C" int m1_grouped_gate_up_sm90(const M1GateUp* call) {
  const M1Group& group = call->group;
  m1::Parameters<M1GateUp> p = {{}, {}, {}, *call, call->width, 0, call->ffn_width};
  int status = m1::matrix_map(&p.left_map, call->x, call->width, group.num_rows, call->x_stride_row, 1);
  if (status != 0) return status;
  status = m1::matrix_map(&p.right_map, call->gate_up, call->width, call->ffn_width, call->width,
                          2 * int64_t(group.num_experts));
  return status != 0 ? status : m1::launch_grouped<m1::Use::kGateUp>(p);
}

extern "C" int m1_grouped_product_sm90(const M1GroupedProduct* call) {
  const M1Group& group = call->group;
  const int depth = call->depth, columns = call->columns;
  m1::Parameters<M1GroupedProduct> p = {{}, {}, {}, *call, depth, 0, columns};
  int status = m1::matrix_map(&p.left_map, call->in, depth, group.num_rows, depth, 1);
  if (status != 0) return status;
  const int weight_columns = call->transposed ? columns : depth;
  const int weight_rows = call->transposed ? depth : columns;
  status = m1::matrix_map(&p.right_map, call->weight, weight_columns, weight_rows, weight_columns, group.num_experts);
  if (status != 0) return status;
  return call->transposed ? m1::launch_grouped<m1::Use::kProductTransposed>(p)
                          : m1::launch_grouped<m1::Use::kProduct>(p);
}

extern "C" int m1_grouped_down_backward_sm90(const M1DownBackward* call) {
  const M1Group& group = call->group;
  m1::Parameters<M1DownBackward> p = {{}, {}, {}, *call, call->width, 0, call->ffn_width};
  int status = m1::matrix_map(&p.left_map, call->d_y, call->width, group.num_rows, call->width, 1);
  if (status != 0) return status;
  status = m1::matrix_map(&p.right_map, call->down, call->ffn_width, call->width, call->ffn_width, group.num_experts);
  if (status != 0) return status;
  const uint64_t ffn = uint64_t(call->ffn_width);
  status = m1::encode_map_3d(&p.epilogue_map, call->hidden, {ffn, uint64_t(group.num_rows), 2}, {4 * ffn, 2 * ffn},
                             {64, 64, 1});
  if (status == 0) status = m1::launch_grouped<m1::Use::kDownBackward>(p);
  if (status != 0 || call->partials == nullptr) return status;
  const int blocks = (group.num_rows + m1::kSumThreads - 1) / m1::kSumThreads;
  return m1::launch(m1::sum_partials_kernel, blocks, m1::kSumThreads, 0, group.stream, *call);
}

extern "C" int m1_grouped_weight_gradient_sm90(const M1WeightGradient* call) {
  const M1Group& group = call->group;
  m1::Parameters<M1WeightGradient> p = {{}, {}, {}, *call, 0, call->left_columns, call->right_columns};
  int status = m1::matrix_map(&p.left_map, call->left, call->left_columns, group.num_rows, call->left_columns, 1);
  if (status != 0) return status;
  status = m1::matrix_map(&p.right_map, call->right, call->right_columns, group.num_rows, call->right_stride_row, 1);
  if (status != 0) return status;
  const m1::Element element = call->accumulate_fp32 ? m1::kFp32 : m1::kBf16;
  const uint64_t dims[3] = {uint64_t(call->right_columns), uint64_t(call->left_columns), uint64_t(group.num_experts)};
  const uint64_t strides_bytes[2] = {dims[0] * element, dims[0] * dims[1] * element};
  status = m1::encode_map_3d(&p.epilogue_map, call->grad, dims, strides_bytes, {m1::kRowBytes / element, 16, 1},
                             element);
  if (status != 0) return status;
  return call->accumulate_fp32 ? m1::launch_grouped<m1::Use::kGradientFp32>(p)
                               : m1::launch_grouped<m1::Use::kGradientBf16>(p);
}
