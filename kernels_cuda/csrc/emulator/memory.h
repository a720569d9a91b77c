// Shared memory, mbarriers and the bulk copy engine of the emulator.
// Shared memory starts as NaN. A load poisons its destination when issued and lands some rounds later; a store reads
// its source when it is waited for. Ordinary writes that no fence has published are remembered, and refused to the
// copy engine and to wgmma. A pair of blocks has two memories; an address with kPairBits names a place in either.
#pragma once

#include <stdint.h>

#include <deque>

#include "engine.h"

namespace m1 {

struct TensorMap {
  uint8_t* address = nullptr;
  uint64_t dims[3] = {};
  uint64_t strides_bytes[2] = {};
  uint32_t box[3] = {};
  uint32_t element_bytes = 2;
};

}  // namespace m1

namespace m1::emulator {

constexpr uint32_t kUnitBytes = 16;

struct Barrier {
  bool live = false;
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

// On its way into a shared memory: a box of a tensor, or 16 bytes that a thread of the pair sent.
struct Copy {
  const TensorMap* map;
  uint32_t shared, barrier;
  int coordinates[3];
  std::vector<uint8_t> sent;
  uint64_t due_round;
};

struct Store {
  const TensorMap* map;
  uint32_t shared;
  int coordinates[3];
  std::vector<uint8_t> seen;
  int group;
  bool adds;
};

// Who wrote a unit of shared memory, and how many fences each had issued by then.
struct Write {
  int first_thread;
  std::vector<uint32_t> fences;
};

struct Memory {
  alignas(1024) uint8_t shared[kSharedBytes];
  uint32_t writer[kSharedBytes / kUnitBytes];
  std::vector<Write> writes;
  std::vector<uint32_t> fences;
  std::map<uint32_t, Barrier> barriers;
  std::deque<Copy> copies;
  std::map<int, std::vector<Store>> stores;
  std::map<int, int> store_groups;
  uint64_t round = 0, random = 0;
};

inline Memory& memory_of(int rank) {
  static Memory instances[2];
  return instances[rank];
}
inline Memory& memory() { return memory_of(own_rank()); }

inline uint8_t* shared_at(uint32_t address, uint32_t bytes) {
  if (address % std::min(bytes, kUnitBytes) != 0 || uint64_t(address) + bytes > kSharedBytes)
    fail("shared address " + std::to_string(address) + " is misaligned or outside");
  return memory().shared + address;
}

// ---- the other block of a pair -------------------------------------------------------------------------------------
constexpr uint32_t kPairBits = 24;

inline uint32_t address_in(uint32_t address, uint32_t rank) { return address | (rank + 1) << kPairBits; }
inline uint32_t own_part(uint32_t address) { return address & ((1u << kPairBits) - 1); }
// Whose memory an address names; one without the bits is this block's own.
inline int rank_at(uint32_t address) {
  const uint32_t bits = address >> kPairBits;
  const int rank = bits == 0 ? own_rank() : int(bits) - 1;
  if (rank >= engine().num_threads / engine().block_threads) fail("an address in a block that does not run");
  if (has_ended(rank)) fail("block " + std::to_string(rank) + " of the pair has ended");
  return rank;
}

inline void note_write(uint32_t address, int first_thread, int threads) {
  Memory& m = memory();
  m.writes.push_back({first_thread, {m.fences.begin() + first_thread, m.fences.begin() + first_thread + threads}});
  m.writer[address / kUnitBytes] = uint32_t(m.writes.size());
}

// The asynchronous proxy touches these bytes: every ordinary write to them must have been fenced by its writers.
inline void check_published(uint32_t address, uint32_t bytes) {
  Memory& m = memory();
  for (uint32_t unit = address / kUnitBytes; unit < (address + bytes + kUnitBytes - 1) / kUnitBytes; ++unit) {
    if (m.writer[unit] == 0) continue;
    const Write& write = m.writes[m.writer[unit] - 1];
    for (size_t i = 0; i < write.fences.size(); ++i)
      if (m.fences[write.first_thread + i] == write.fences[i])
        return fail("the asynchronous proxy reads a write without a proxy fence at " + std::to_string(unit * kUnitBytes));
    m.writer[unit] = 0;
  }
}

// ---- mbarriers -----------------------------------------------------------------------------------------------------
inline Barrier& live_barrier(Memory& m, uint32_t address) {
  Barrier& barrier = m.barriers[address];
  if (!barrier.live) fail("barrier at " + std::to_string(address) + " was never initialised");
  return barrier;
}
inline void settle(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
}
inline void arrive(Memory& m, uint32_t address, int64_t expected_bytes) {
  Barrier& barrier = live_barrier(m, address);
  barrier.bytes += expected_bytes;
  if (--barrier.pending < 0) fail("more arrivals than the barrier at " + std::to_string(address) + " expects");
  settle(barrier);
}

// ---- the bulk copy engine ------------------------------------------------------------------------------------------
// Calls visit(byte offset in the swizzled box, address of the element outside or null) for every element of a box.
template <typename Visit>
void visit_box(const TensorMap& map, const int (&at)[3], const Visit& visit) {
  uint32_t row = 0;
  for (uint32_t i2 = 0; i2 < map.box[2]; ++i2)
    for (uint32_t i1 = 0; i1 < map.box[1]; ++i1, ++row)
      for (uint32_t i0 = 0; i0 < map.box[0]; ++i0) {
        const int64_t index[3] = {int64_t(at[0]) + i0, int64_t(at[1]) + i1, int64_t(at[2]) + i2};
        bool inside = true;
        for (int d = 0; d < 3; ++d) inside &= index[d] >= 0 && index[d] < int64_t(map.dims[d]);
        const uint32_t column = i0 * map.element_bytes;
        uint8_t* outside = map.address + index[0] * map.element_bytes + index[1] * int64_t(map.strides_bytes[0]) +
                           index[2] * int64_t(map.strides_bytes[1]);
        const uint32_t unit = column / kUnitBytes ^ (row & 7);
        visit(row * 128 + unit * kUnitBytes + column % kUnitBytes, inside ? outside : nullptr);
      }
}
inline uint32_t box_bytes(const TensorMap& map) { return map.box[0] * map.box[1] * map.box[2] * map.element_bytes; }

// Poisons what a copy will write, of which nobody may know anything until it has landed, and sends it off.
inline void send(int rank, Copy copy, uint32_t bytes) {
  Memory& m = memory_of(rank);
  live_barrier(m, copy.barrier);
  shared_at(copy.shared, bytes);
  memset(m.shared + copy.shared, 0xff, bytes);
  for (uint32_t unit = copy.shared / kUnitBytes; unit < (copy.shared + bytes) / kUnitBytes; ++unit) m.writer[unit] = 0;
  m.random = m.random * 6364136223846793005ull + 1442695040888963407ull;
  copy.due_round = m.round + 1 + (m.random >> 40) % 5;
  m.copies.push_back(std::move(copy));
}
inline void issue_copy(int rank, uint32_t shared, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  if (shared % 1024 != 0) fail("a swizzled copy lands on a misaligned tile");
  send(rank, {map, shared, barrier, {c0, c1, c2}, {}, 0}, box_bytes(*map));
}
inline void issue_message(uint32_t address, const void* bytes, uint32_t barrier) {
  const int rank = rank_at(address);
  if (rank != rank_at(barrier)) fail("a message and its barrier are in different blocks");
  const uint8_t* first = static_cast<const uint8_t*>(bytes);
  send(rank, {nullptr, own_part(address), own_part(barrier), {}, {first, first + kUnitBytes}, 0}, kUnitBytes);
}

inline void land(Memory& m, const Copy& copy) {
  int64_t bytes = int64_t(copy.sent.size());
  if (copy.map == nullptr) {
    memcpy(m.shared + copy.shared, copy.sent.data(), copy.sent.size());
  } else {
    bytes = box_bytes(*copy.map);
    visit_box(*copy.map, copy.coordinates, [&](uint32_t offset, const uint8_t* outside) {
      if (outside != nullptr) memcpy(m.shared + copy.shared + offset, outside, copy.map->element_bytes);
      else memset(m.shared + copy.shared + offset, 0, copy.map->element_bytes);
    });
  }
  Barrier& barrier = live_barrier(m, copy.barrier);
  barrier.bytes -= bytes;
  settle(barrier);
}
inline bool deliver_copies() {
  bool under_way = false;
  for (int rank = 0; rank < engine().num_threads / engine().block_threads; ++rank) {
    Memory& m = memory_of(rank);
    ++m.round;
    under_way |= !m.copies.empty();
    for (size_t i = 0; i < m.copies.size();) {
      if (m.copies[i].due_round > m.round) {
        ++i;
        continue;
      }
      const Copy copy = m.copies[i];
      m.copies.erase(m.copies.begin() + long(i));
      if (has_ended(rank)) fail("a load lands in a block that has ended");
      land(m, copy);
    }
  }
  return under_way;
}

inline void issue_store(const TensorMap* map, uint32_t shared, int c0, int c1, int c2, bool adds) {
  const int thread = engine().current;
  if (shared % 1024 != 0) fail("a swizzled store leaves a misaligned tile");
  const uint8_t* source = shared_at(shared, box_bytes(*map));
  check_published(shared, box_bytes(*map));
  if (adds && map->element_bytes != 4) fail("only fp32 is added by the copy engine");
  memory().stores[thread].push_back(
      {map, shared, {c0, c1, c2}, {source, source + box_bytes(*map)}, memory().store_groups[thread], adds});
}
inline void retire_stores(int pending_groups) {
  Memory& m = memory();
  const int thread = engine().current;
  std::vector<Store>& stores = m.stores[thread];
  while (!stores.empty() && stores.front().group < m.store_groups[thread] - pending_groups) {
    const Store& store = stores.front();
    if (memcmp(store.seen.data(), m.shared + store.shared, store.seen.size()) != 0)
      fail("shared memory changed while a store was reading it");
    visit_box(*store.map, store.coordinates, [&](uint32_t offset, uint8_t* outside) {
      if (outside == nullptr) return;
      if (!store.adds) {
        memcpy(outside, store.seen.data() + offset, store.map->element_bytes);
        return;
      }
      float sum, addend;
      memcpy(&sum, outside, 4);
      memcpy(&addend, store.seen.data() + offset, 4);
      sum += addend;
      memcpy(outside, &sum, 4);
    });
    stores.erase(stores.begin());
  }
}

inline void reset_memory(int blocks, int block_threads) {
  for (int rank = 0; rank < blocks; ++rank) {
    Memory& m = memory_of(rank);
    memset(m.shared, 0xff, sizeof m.shared);
    memset(m.writer, 0, sizeof m.writer);
    m.writes.clear();
    m.fences.assign(size_t(blocks * block_threads), 0);
    m.barriers.clear();
    m.copies.clear();
    m.stores.clear();
    m.store_groups.clear();
  }
}

inline void check_block_end() {
  for (int rank = 0; rank < engine().num_threads / engine().block_threads; ++rank) {
    for (const auto& [thread, stores] : memory_of(rank).stores)
      if (!stores.empty()) fail("the block ended while a store was reading its shared memory");
    if (!memory_of(rank).copies.empty()) fail("the block ended with a load under way");
  }
}

}  // namespace m1::emulator
