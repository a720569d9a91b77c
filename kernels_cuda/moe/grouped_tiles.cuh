// What the grouped products share: tile sizes, the shared-memory ledger, the walk over tiles, and the load pipeline.
//
// A block computes tiles of 128 rows x 256 columns, 64 deep per stage: warpgroup 0 loads, warpgroups 1 and 2 multiply
// 64 rows each. Experts' rows are not padded: a tile that reaches into the next expert computes rows it never stores.
//
// Two blocks work as a pair (a cluster) on two tiles that have an operand in common: each of its boxes is read from the
// second-level cache once and lands in both, which saves power, and power bounds the clock. One warp of the first
// block loads for both rings and tells each block its tile; see Ring.
//
// Pairs that share a weight tile must read it at about the same time, while it is in the second-level cache: once they
// drift apart, each reads the weights from memory for itself, and memory bounds the product. So the order of tiles is
// followed as they are finished (take_ticket), not dealt out, and there are two such queues: whole tiles (65 to 128
// rows), which all take equally long, and short ones, for which a few pairs are set apart that share with nobody.
#pragma once

#include "launch.h"

#include "tile.cuh"

namespace m1 {

constexpr int kTileHeight = 128;
constexpr int kTileWidth = 256;
constexpr int kTileDepth = 64;
constexpr int kThreads = 384;
constexpr int kWarpsThatMultiply = 8;
constexpr int kStages = 4;
constexpr int kLeftBoxes = kTileHeight / 64;
constexpr int kRightBoxes = kTileWidth / 64;

// Shared memory, bytes:              per stage          total
//   left  2 boxes of 64 x 64 bf16     16384              65536
//   right 4 boxes of 64 x 64 bf16     32768             131072
//   staging of results, 8 warps x 3 x 16 rows x 80 bytes 30720
//   row sums, 8 warps x 2 x 32 lanes x 4 bytes            2048
//   barriers full, empty, 4 each, 8 bytes                   64
//   tile of each stage, 32 bytes                           128
//   sum                                                 229568   (limit 232448)
// A gradient's warp has two boxes of 2048 bytes in the 4096 of its staging and row sums.
constexpr uint32_t kStageBytes = (kLeftBoxes + kRightBoxes) * kTileBytes;
constexpr uint32_t kStagingPitchBytes = 80;
constexpr uint32_t kStagingRows = 16;
constexpr uint32_t kStagingBytes = kStagingRows * kStagingPitchBytes;
constexpr uint32_t kStagingPerWarp = 3 * kStagingBytes + 2 * 32 * 4;
constexpr uint32_t kStagingOffset = kStages * kStageBytes;
constexpr uint32_t kBarrierOffset = kStagingOffset + kWarpsThatMultiply * kStagingPerWarp;
constexpr uint32_t kTileOfStageOffset = kBarrierOffset + 2 * kStages * 8;
constexpr uint32_t kTileWordsBytes = 32;  // of what a block is told of its tile
constexpr uint32_t kSharedBytes = kTileOfStageOffset + kStages * kTileWordsBytes;
static_assert(kSharedBytes == 229568, "the ledger above tells the truth");
static_assert(kSharedBytes <= 232448, "a Hopper block has 227 KiB");
static_assert(kStageBytes % kSwizzlePeriodBytes == 0, "every stage starts on the swizzle's period");

M1_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The rows of one expert after another, clamped to the rows there are.
class ExpertRows {
 public:
  M1_DEVICE explicit ExpertRows(const M1Group& group) : group_(group) { read(); }
  M1_DEVICE bool valid() const { return expert_ < group_.num_experts; }
  M1_DEVICE int expert() const { return expert_; }
  M1_DEVICE int first_row() const { return first_row_; }
  M1_DEVICE int num_rows() const { return num_rows_; }
  M1_DEVICE void next() {
    first_row_ += num_rows_;
    ++expert_;
    read();
  }

 private:
  M1_DEVICE void read() {
    if (!valid()) return;
    const int64_t rows = group_.rows_per_expert[expert_];
    const int64_t left = group_.num_rows - first_row_;
    num_rows_ = int(rows < 0 ? 0 : rows < left ? rows : left);
  }

  const M1Group& group_;
  int expert_ = 0;
  int first_row_ = 0;
  int num_rows_ = 0;
};

// One tile of work: output rows and columns for products, rows of the gradient and its columns for weight gradients.
struct Tile {
  int expert;
  int first_row;     // of the expert's rows that the tile touches
  int num_rows;      // of them
  int top, left;     // first row and column of the tile in its output matrix
};
constexpr int kNoExpert = -1;  // of a tile that ends the work

// What a pair of blocks computes in step, a tile each: one above the other (they share the right operand; num_rows is
// of both), or side by side (they share the left). The second tile may lie outside its matrix.
struct TilePair {
  Tile first;
  bool side_by_side;
};

// The pairs that run at once should share what they read: up to 8 pairs of tile rows go through all columns together,
// row fastest, about 8 x 8 pairs at a time on 132 multiprocessors. At M1's widths that is 25 MB of each operand, which
// the second-level cache holds; an expert of fewer rows reads each of its weight tiles from memory once.
constexpr int kBandPairs = 8;
constexpr int kPairHeight = 2 * kTileHeight;
constexpr int kShortTileHeight = 64;
// Time of a short pair and of a whole one: half the products, most of the loads.
constexpr int kShortTileCost = 5;
constexpr int kWholeTileCost = 8;

// How rows are cut into pairs: of 193 to 256 rows one above the other, then at most one side by side of 65 to 128
// rows, then at most one, short, of 1 to 64.
struct RowCut {
  int stacked, beside, short_ones;

  M1_DEVICE explicit RowCut(int rows) {
    stacked = (rows + kShortTileHeight - 1) / kPairHeight;
    const int rest = rows - stacked * kPairHeight;
    beside = rest > kShortTileHeight;
    short_ones = rest > beside * kTileHeight;
  }
};

struct Place {
  int row, column;  // in pairs of tile rows, in tile columns
};

// Place of a whole pair among `stacked` pairs of tile rows and, after them, `beside` pairs side by side (0 or 1).
// Two columns at a time, so that the latter meet the others' weights.
M1_DEVICE Place place_in_bands(int index, int stacked, int beside, int column_tiles) {
  const int last_band = stacked > 0 ? (stacked - 1) / kBandPairs : 0;
  const int band_of_index = index / (kBandPairs * column_tiles);
  const int band = band_of_index < last_band ? band_of_index : last_band;
  const int first_row = band * kBandPairs;
  const int rows = stacked - first_row < kBandPairs ? stacked - first_row : kBandPairs;
  const int local = index - first_row * column_tiles;
  const int pairs_per_two = 2 * rows + (band == last_band ? beside : 0);
  const int column = local / pairs_per_two * 2;
  const int rest = local % pairs_per_two;
  if (rest >= (column + 1 < column_tiles ? 2 : 1) * rows) return {stacked, column};
  return {first_row + rest % rows, column + rest / rows};
}

// How many pairs of blocks begin with short tiles: their share of the time, at least one if there are any.
M1_DEVICE int pairs_for_short_tiles(const M1Group& group, int pairs) {
  int whole = 0, shorts = 0;
  for (ExpertRows rows(group); rows.valid(); rows.next()) {
    const RowCut cut(rows.num_rows());
    whole += kWholeTileCost * (2 * cut.stacked + cut.beside);
    shorts += kShortTileCost * cut.short_ones;
  }
  if (shorts == 0) return 0;
  const int share = int((int64_t(pairs) * shorts + (whole + shorts) / 2) / (whole + shorts));
  return share > 0 ? share : 1;
}

// One of the two queues of a product over row groups.
class ProductTiles {
 public:
  M1_DEVICE ProductTiles(const M1Group& group, bool short_ones, int columns, int columns_per_tile)
      : rows_(group), short_ones_(short_ones), columns_per_tile_(columns_per_tile),
        column_tiles_(ceil_div(columns, columns_per_tile)) {}
  // Finds pair `index` of the queue; calls must ascend. False after the last.
  M1_DEVICE bool find(int index, TilePair& pair) {
    for (; rows_.valid(); rows_.next()) {
      const RowCut cut(rows_.num_rows());
      const int twos = (column_tiles_ + 1) / 2;
      const int pairs = short_ones_ ? cut.short_ones * twos : cut.stacked * column_tiles_ + cut.beside * twos;
      if (index - first_pair_ < pairs) {
        fill(pair, cut, index - first_pair_);
        return true;
      }
      first_pair_ += pairs;
    }
    return false;
  }

 private:
  M1_DEVICE void fill(TilePair& pair, const RowCut& cut, int index) const {
    const Place place = short_ones_ ? Place{cut.stacked, 2 * index}
                                    : place_in_bands(index, cut.stacked, cut.beside, column_tiles_);
    const int offset = place.row * kPairHeight + (short_ones_ ? cut.beside * kTileHeight : 0);
    const int top = rows_.first_row() + offset;
    pair.first = {rows_.expert(), top, rows_.num_rows() - offset, top, place.column * columns_per_tile_};
    pair.side_by_side = place.row == cut.stacked;
  }

  ExpertRows rows_;
  bool short_ones_;
  int columns_per_tile_;
  int column_tiles_;
  int first_pair_ = 0;
};

// The tiles of the experts' weight gradients; every expert has all of them, its rows are the depth. One queue.
class GradientTiles {
 public:
  M1_DEVICE GradientTiles(const M1Group& group, int height, int width)
      : rows_(group), row_pairs_(ceil_div(height, kPairHeight)), column_tiles_(ceil_div(width, kTileWidth)) {}
  M1_DEVICE bool find(int index, TilePair& pair) {
    const int pairs = row_pairs_ * column_tiles_;
    while (rows_.valid() && index - first_pair_ >= pairs) {
      first_pair_ += pairs;
      rows_.next();
    }
    if (!rows_.valid()) return false;
    const Place place = place_in_bands(index - first_pair_, row_pairs_, 0, column_tiles_);
    pair.first = {rows_.expert(), rows_.first_row(), rows_.num_rows(), place.row * kPairHeight,
                  place.column * kTileWidth};
    pair.side_by_side = false;
    return true;
  }

 private:
  ExpertRows rows_;
  int row_pairs_;
  int column_tiles_;
  int first_pair_ = 0;
};

// Position in the ring of stages; goes on from tile to tile. Both blocks of a pair have one and go through the same
// stages. `full` is each block's own: its boxes and, with a tile's first stage, the words that tell of the tile.
// `empty` is the first block's: the 16 warps that multiply in both blocks give every stage back there, after their last
// look at its boxes and words. Only then are they written again, in either block; and as a warp gives back what it saw
// full, no box can land in a phase of `full` before the one that it is meant for.
struct Ring {
  uint32_t base;
  uint32_t stage = 0;
  uint32_t parity = 0;

  M1_DEVICE uint32_t left() const { return base + stage * kStageBytes; }
  M1_DEVICE uint32_t right() const { return left() + kLeftBoxes * kTileBytes; }
  M1_DEVICE uint32_t full() const { return base + kBarrierOffset + stage * 8; }
  M1_DEVICE uint32_t empty() const { return full() + kStages * 8; }
  // Holds the tile whose first stage this is.
  M1_DEVICE uint32_t tile() const { return base + kTileOfStageOffset + stage * kTileWordsBytes; }
  // The ring of either block of the pair, at the same stage: its addresses are for the _pair primitives.
  M1_DEVICE Ring in(uint32_t rank) const { return {in_block(base, rank), stage, parity}; }
  M1_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

M1_DEVICE void release_stage(const Ring& ring, int lane) {
  if (lane == 0) barrier_arrive_pair(ring.in(0).empty());
}

M1_DEVICE void init_ring(uint32_t base) {
  Ring ring{base};
  for (int i = 0; i < kStages; ++i, ring.advance()) {
    barrier_init(ring.full(), 1);
    barrier_init(ring.empty(), 2 * kWarpsThatMultiply);
  }
  fence_barrier_init();
}

}  // namespace m1
