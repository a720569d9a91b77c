// The Hopper primitives of our kernels: one thin wrapper per PTX instruction, and the host calls that launch.
// emulator/primitives.h has the same names with the same meaning. Source: PTX ISA 9.0, sections 9.7.8, 9.7.13-15.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "wgmma.cuh"

#define M1_DEVICE __device__ __forceinline__
#define M1_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define M1_GRID_CONSTANT const __grid_constant__

namespace m1 {

using TensorMap = CUtensorMap;

// ---- threads -------------------------------------------------------------------------------------------------------
M1_DEVICE uint32_t thread_index() { return threadIdx.x; }
M1_DEVICE uint32_t block_index() { return blockIdx.x; }
M1_DEVICE uint32_t num_blocks() { return gridDim.x; }
// Adds 1 to a counter that all blocks share; returns what it was before.
M1_DEVICE int take_ticket(int32_t* counter) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
M1_DEVICE void sync_warp() { __syncwarp(); }
M1_DEVICE void sync_block() { __syncthreads(); }
// Barrier `id` (1 to 15) among `threads` threads, a multiple of 32; 0 is sync_block's.
M1_DEVICE void sync_named(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// 0 or 1: which block of its pair this is. Blocks 2 i and 2 i + 1 of launch_pairs run at the same time and reach each
// other's shared memory, through addresses from in_block.
M1_DEVICE uint32_t rank_in_pair() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of both blocks of a pair. Orders no writes but what a fence has published (fence_barrier_init).
M1_DEVICE void sync_pair() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
// The same value in every lane of a warp, so that the compiler keeps it in a uniform register.
M1_DEVICE uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }
M1_DEVICE float sum_over_warp(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}
template <int kRegisters>
M1_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
M1_DEVICE void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- numbers -------------------------------------------------------------------------------------------------------
M1_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
M1_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two fp32 to packed bf16, nearest even; `low` lands in bits 0-15.
M1_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
M1_DEVICE float low_bf16(uint32_t packed) { return __uint_as_float(packed << 16); }
M1_DEVICE float high_bf16(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

// ---- shared memory -------------------------------------------------------------------------------------------------
// Address of the block's dynamic shared memory, in the 32-bit shared window.
M1_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}
// Where block `rank` of the pair has what this block has at `address`; plain loads and stores do not reach there.
M1_DEVICE uint32_t in_block(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
M1_DEVICE void store_shared_zero16(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}
M1_DEVICE uint4 load_shared16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
M1_DEVICE uint32_t load_shared4(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
M1_DEVICE void store_shared_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
M1_DEVICE float load_shared_float(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
M1_DEVICE void store_shared16(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
M1_DEVICE void store_shared_pair(uint32_t address, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(low), "f"(high) : "memory");
}
M1_DEVICE void store_global16(void* address, uint4 x) { *static_cast<uint4*>(address) = x; }

// Four 8x8 matrices of bf16, each lane giving one row address; transposed on the way.
M1_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
M1_DEVICE void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}
M1_DEVICE void stmatrix_x4_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
// Ordinary writes of this thread become visible to the copy engine and the tensor cores.
M1_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- mbarriers -----------------------------------------------------------------------------------------------------
M1_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
M1_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
M1_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
M1_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of parity `parity` is complete.
M1_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra complete;\n"
      "bra again;\n"
      "complete:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same for a barrier of either block of the pair, at an address from in_block. Neither makes this thread's writes
// seen there (a fence for the whole device, which no loop can afford, would): send what is to be seen by store_pair16.
M1_DEVICE void barrier_expect_pair(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
M1_DEVICE void barrier_arrive_pair(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Writes 16 bytes on the side of the pair where `barrier` is, which learns of them as of the copy engine's.
M1_DEVICE void store_pair16(uint32_t address, uint4 x, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
               : "memory");
}

// ---- the bulk copy engine ------------------------------------------------------------------------------------------
M1_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
M1_DEVICE void tma_load_3d(uint32_t destination, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// To the same place in every block of the pair whose bit is set in `blocks`; the barrier there learns of the bytes.
M1_DEVICE void tma_load_pair_3d(uint32_t destination, const TensorMap* map, uint32_t barrier, uint16_t blocks, int c0,
                                int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
      : "memory");
}
M1_DEVICE void tma_store_3d(const TensorMap* map, uint32_t source, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
// Adds a box of fp32 to the tensor; each addition is one rounding, in the second-level cache.
M1_DEVICE void tma_add_3d(const TensorMap* map, uint32_t source, int c0, int c1, int c2) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                   map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
M1_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the newest kPending groups of this thread have read their shared memory.
template <int kPending>
M1_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ---- wgmma ordering ------------------------------------------------------------------------------------------------
M1_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
M1_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
M1_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Tells the compiler that an accumulator may change here, so that it moves no use across an asynchronous wgmma.
template <int kCount>
M1_DEVICE void keep_in_place(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

}  // namespace m1

#include "launch.cuh"
