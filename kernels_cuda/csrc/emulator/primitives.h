// ptx.cuh and launch.cuh for a CPU: the same names with the same meaning, carried out by the emulator.
// Not modelled: time, register limits, the caches. Those are for the device and its checkers.
#pragma once

#include <math.h>
#include <stdint.h>

#include "wgmma.h"

#define M1_DEVICE inline
#define M1_KERNEL(threads) void
#define M1_GRID_CONSTANT const

struct uint4 {
  uint32_t x, y, z, w;
};

namespace m1 {

namespace emu = emulator;

// ---- threads -------------------------------------------------------------------------------------------------------
inline uint32_t thread_index() { return uint32_t(emu::engine().current % emu::engine().block_threads); }
inline uint32_t block_index() { return emu::engine().first_block + uint32_t(emu::own_rank()); }
inline uint32_t num_blocks() { return emu::engine().num_blocks; }
inline int take_ticket(int32_t* counter) { return (*counter)++; }
inline void sync_warp() {
  emu::meet(emu::own_warp(), emu::kWarpThreads, "sync_warp", [] {});
}
inline void sync_named(uint32_t id, uint32_t threads) {
  emu::meet(emu::engine().named[emu::own_rank()][id], int(threads), "sync_named", [] {});
}
inline void sync_block() { sync_named(0, uint32_t(emu::engine().block_threads)); }
inline uint32_t rank_in_pair() { return uint32_t(emu::own_rank()); }
inline void sync_pair() {
  emu::meet(emu::engine().pair, emu::engine().num_threads, "sync_pair", [] {});
}

// What each lane brought to a warp-wide exchange, and what it takes away.
struct Lane {
  uint32_t in[5], out[4];
};
inline Lane* lanes_of_warp() {
  static Lane lanes[1024];
  return lanes + emu::engine().current / emu::kWarpThreads * emu::kWarpThreads;
}
template <typename Act>
Lane& exchange(const char* operation, const uint32_t (&in)[5], const Act& act) {
  Lane* warp = lanes_of_warp();
  Lane& own = warp[emu::engine().current % emu::kWarpThreads];
  memcpy(own.in, in, sizeof own.in);
  emu::meet(emu::own_warp(), emu::kWarpThreads, operation, [&] { act(warp); });
  return own;
}
inline uint32_t uniform(uint32_t value) {
  return exchange("uniform", {value}, [](Lane* warp) {
           for (int i = 0; i < 32; ++i) warp[i].out[0] = warp[0].in[0];
         }).out[0];
}
inline float sum_over_warp(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const Lane& own = exchange("sum_over_warp", {bits}, [](Lane* warp) {
    float values[32], next[32];
    for (int i = 0; i < 32; ++i) memcpy(&values[i], &warp[i].in[0], 4);
    for (int offset = 16; offset > 0; offset /= 2) {
      for (int i = 0; i < 32; ++i) next[i] = values[i] + values[i ^ offset];
      memcpy(values, next, sizeof values);
    }
    for (int i = 0; i < 32; ++i) memcpy(&warp[i].out[0], &values[i], 4);
  });
  float sum;
  memcpy(&sum, &own.out[0], 4);
  return sum;
}
template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void acquire_registers() {}

// ---- numbers -------------------------------------------------------------------------------------------------------
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline uint32_t round_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline float low_bf16(uint32_t packed) { return emu::from_bf16(uint16_t(packed)); }
inline float high_bf16(uint32_t packed) { return emu::from_bf16(uint16_t(packed >> 16)); }

// ---- shared memory -------------------------------------------------------------------------------------------------
inline uint32_t shared_base() { return 0; }
inline uint32_t in_block(uint32_t address, uint32_t rank) { return emu::address_in(address, rank); }
inline void store_shared_zero16(uint32_t address) {
  memset(emu::shared_at(address, 16), 0, 16);
  emu::note_write(address, emu::engine().current, 1);
}
inline uint4 load_shared16(uint32_t address) {
  uint4 x;
  memcpy(&x, emu::shared_at(address, 16), 16);
  return x;
}
inline uint32_t load_shared4(uint32_t address) {
  uint32_t x;
  memcpy(&x, emu::shared_at(address, 4), 4);
  return x;
}
inline void store_shared_float(uint32_t address, float value) {
  memcpy(emu::shared_at(address, 4), &value, 4);
  emu::note_write(address, emu::engine().current, 1);
}
inline float load_shared_float(uint32_t address) {
  float value;
  memcpy(&value, emu::shared_at(address, 4), 4);
  return value;
}
inline void store_shared16(uint32_t address, uint4 x) {
  memcpy(emu::shared_at(address, 16), &x, 16);
  emu::note_write(address, emu::engine().current, 1);
}
inline void store_shared_pair(uint32_t address, float low, float high) {
  const float pair[2] = {low, high};
  memcpy(emu::shared_at(address, 8), pair, 8);
  emu::note_write(address, emu::engine().current, 1);
}
inline void store_global16(void* address, uint4 x) { memcpy(address, &x, 16); }

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  const Lane& own = exchange("ldmatrix_x4_trans", {address}, [](Lane* warp) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i)
          memcpy(&pair[i], emu::shared_at(warp[8 * matrix + 2 * (lane % 4) + i].in[0], 16) + lane / 4 * 2, 2);
        warp[lane].out[matrix] = pair[0] | uint32_t(pair[1]) << 16;
      }
  });
  memcpy(r, own.out, sizeof r);
}
template <bool kTransposed>
void store_matrices(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  exchange("stmatrix_x4", {address, r0, r1, r2, r3}, [](Lane* warp) {
    const int first = emu::engine().current / 32 * 32;
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int row = 0; row < 8; ++row) {
        const uint32_t target = warp[8 * matrix + row].in[0];
        uint8_t* bytes = emu::shared_at(target, 16);
        emu::note_write(target, first, 32);
        for (int column = 0; column < 8; ++column) {
          const int fragment_row = kTransposed ? column : row, fragment_column = kTransposed ? row : column;
          const uint32_t word = warp[4 * fragment_row + fragment_column / 2].in[1 + matrix];
          const uint16_t value = uint16_t(word >> (16 * (fragment_column % 2)));
          memcpy(bytes + 2 * column, &value, 2);
        }
      }
  });
}
inline void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  store_matrices<false>(address, r0, r1, r2, r3);
}
inline void stmatrix_x4_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  store_matrices<true>(address, r0, r1, r2, r3);
}
inline void fence_async_proxy() { ++emu::memory().fences[size_t(emu::engine().current)]; }

// ---- mbarriers -----------------------------------------------------------------------------------------------------
inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  emu::shared_at(barrier, 8);
  emu::memory().barriers[barrier] = {true, int(arrivals), int(arrivals), 0, 0};
}
inline void fence_barrier_init() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emu::arrive(emu::memory(), barrier, bytes); }
inline void barrier_arrive(uint32_t barrier) { emu::arrive(emu::memory(), barrier, 0); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emu::Barrier& own = emu::live_barrier(emu::memory(), barrier);
  emu::wait_until("barrier_wait", [&own, parity] { return (own.phase & 1) != parity; });
}
inline void barrier_expect_pair(uint32_t barrier, uint32_t bytes) {
  emu::arrive(emu::memory_of(emu::rank_at(barrier)), emu::own_part(barrier), bytes);
}
inline void barrier_arrive_pair(uint32_t barrier) { barrier_expect_pair(barrier, 0); }
inline void store_pair16(uint32_t address, uint4 x, uint32_t barrier) { emu::issue_message(address, &x, barrier); }

// ---- the bulk copy engine ------------------------------------------------------------------------------------------
inline void prefetch_map(const TensorMap*) {}
inline void tma_load_3d(uint32_t destination, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  emu::issue_copy(emu::own_rank(), destination, map, barrier, c0, c1, c2);
}
inline void tma_load_pair_3d(uint32_t destination, const TensorMap* map, uint32_t barrier, uint16_t blocks, int c0,
                             int c1, int c2) {
  for (uint32_t rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1)
      emu::issue_copy(emu::rank_at(in_block(destination, rank)), destination, map, barrier, c0, c1, c2);
}
inline void tma_store_3d(const TensorMap* map, uint32_t source, int c0, int c1, int c2) {
  emu::issue_store(map, source, c0, c1, c2, false);
}
inline void tma_add_3d(const TensorMap* map, uint32_t source, int c0, int c1, int c2) {
  emu::issue_store(map, source, c0, c1, c2, true);
}
inline void tma_store_commit() { ++emu::memory().store_groups[emu::engine().current]; }
template <int kPending>
void tma_store_wait_read() {
  emu::retire_stores(kPending);
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------
inline void wgmma_fence() { emu::fence_group(); }
inline void wgmma_commit() { ++emu::own_group().committed[size_t(emu::own_lane())]; }
template <int kPending>
void wgmma_wait() {
  emu::wait_groups(kPending);
}
template <int kCount>
void keep_in_place(float (&)[kCount]) {}
template <int kTransposedA = 0, int kTransposedB = 0, int kCount>
void wgmma_shared(float (&d)[kCount], uint64_t a, uint64_t b, int accumulate) {
  emu::issue_multiply(kCount * 2, d, nullptr, a, b, accumulate, kTransposedA, kTransposedB);
}
template <int kTransposedB = 0, int kCount>
void wgmma_registers(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emu::issue_multiply(kCount * 2, d, a, 0, b, accumulate, 0, kTransposedB);
}

// ---- the host's side -----------------------------------------------------------------------------------------------
using Stream = void*;
enum Element : uint32_t { kBf16 = 2, kFp32 = 4 };
constexpr int kNoTensorMapEncoder = -1;
constexpr int kTensorMapRefused = -2;
constexpr int kNoInstantiation = -3;
constexpr int kEmulatorFailed = -4;

inline int encode_map_3d(TensorMap* map, const void* address, const uint64_t (&dims)[3],
                         const uint64_t (&strides_bytes)[2], const uint32_t (&box)[3], Element element = kBf16) {
  bool legal = uintptr_t(address) % 16 == 0 && box[0] * element == 128 && strides_bytes[0] % 16 == 0 && strides_bytes[1] % 16 == 0;
  for (int d = 0; d < 3; ++d) legal &= dims[d] > 0 && box[d] > 0 && box[d] <= 256;
  if (!legal) return kTensorMapRefused;
  map->element_bytes = element;
  map->address = static_cast<uint8_t*>(const_cast<void*>(address));
  for (int d = 0; d < 3; ++d) map->dims[d] = dims[d], map->box[d] = box[d];
  for (int d = 0; d < 2; ++d) map->strides_bytes[d] = strides_bytes[d];
  return 0;
}

inline int zero_device_memory(void* address, size_t bytes, void*) {
  memset(address, 0, bytes);
  return 0;
}

template <typename Parameters>
int launch_together(int together, void (*kernel)(Parameters), int blocks, int threads, int shared_bytes,
                    const Parameters& parameters) {
  emu::Engine& engine = emu::engine();
  engine.error.clear();
  engine.num_blocks = uint32_t(blocks);
  engine.deliver = emu::deliver_copies;
  if (uint32_t(shared_bytes) > emu::kSharedBytes || blocks % together != 0) return kEmulatorFailed;
  for (int block = 0; block < blocks && engine.error.empty(); block += together) {
    emu::reset_memory(together, threads);
    emu::reset_groups(together * threads);
    emu::run_blocks(uint32_t(block), together, threads, [&] { kernel(parameters); });
    if (engine.error.empty()) emu::check_block_end();
    if (engine.error.empty()) emu::check_multiplies_done();
  }
  return engine.error.empty() ? 0 : kEmulatorFailed;
}
template <typename Parameters>
int launch(void (*kernel)(Parameters), int blocks, int threads, int shared_bytes, void*, const Parameters& parameters) {
  return launch_together(1, kernel, blocks, threads, shared_bytes, parameters);
}
template <typename Parameters>
int launch_pairs(void (*kernel)(Parameters), int pairs, int threads, int shared_bytes, void*,
                 const Parameters& parameters) {
  return launch_together(2, kernel, 2 * pairs, threads, shared_bytes, parameters);
}

}  // namespace m1

// Why the last launch returned kEmulatorFailed.
extern "C" __attribute__((used, visibility("default"))) inline const char* m1_emulator_error() {
  return m1::emu::engine().error.c_str();
}
