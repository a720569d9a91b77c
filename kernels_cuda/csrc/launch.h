// The plain C face of the CUDA kernels: pointers, strides in elements, a stream. bind.cpp is the only caller.
//
// Every launcher checks nothing a tensor library can check better: bind.cpp and the Python ops have done so.
// Returned: 0, or a cudaError_t of the launch; -1 where the driver has no cuTensorMapEncodeTiled; -2 where it
// refuses a tensor map; -3 for a shape that has no instantiation.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// One piece of one head's work, eight int32 in device memory. With few heads a long document is cut into segments of
// segment_tokens (a multiple of 64), counted from its first token in (reversed) time: only the last may be shorter.
// The prepass writes the local state of every segment but the last to the workspace.
typedef struct M1LightningItem {
  int32_t first_token;      // lowest token of the piece
  int32_t num_tokens;       // may be 0: an empty document passes its state through
  int32_t head;
  int32_t value_block;      // which 64 columns of the value dim
  int32_t document;
  int32_t earlier_segments; // segments of this document that come before this one in (reversed) time
  int32_t first_slot;       // workspace slot of the document's first segment in (reversed) time
  int32_t closes;           // 1: this piece ends the document in (reversed) time and writes state_out
} M1LightningItem;

// q, k: bf16 [T, H, key_dim], v, o: bf16 [T, H, value_dim]; key_dim and value_dim 64 or 128; last dim contiguous,
// other strides and base addresses multiples of 16 bytes. slopes: fp32 [H].
// state_in: fp32 [N, H, key_dim, value_dim] with any strides, or null for zeros; state_out: the same, contiguous,
// or null. workspace: fp32 [slots, H, key_dim, value_dim], or null when no document is cut.
// items: work of the main pass; state_items: pieces whose local state the prepass writes to the workspace, at slot
// first_slot + earlier_segments. Without items (a prepass alone) q and o are not read.
typedef struct M1LightningScan {
  const void* q;
  const void* k;
  const void* v;
  void* o;
  const float* slopes;
  const float* state_in;
  float* state_out;
  float* workspace;
  const M1LightningItem* items;
  const M1LightningItem* state_items;
  int64_t q_stride_token, q_stride_head;
  int64_t k_stride_token, k_stride_head;
  int64_t v_stride_token, v_stride_head;
  int64_t o_stride_token, o_stride_head;
  int64_t state_in_stride_document, state_in_stride_head, state_in_stride_key, state_in_stride_value;
  int32_t num_items, num_state_items, segment_tokens;
  int32_t num_tokens, num_heads, key_dim, value_dim;
  int32_t reverse;
  float scale;
  int32_t num_multiprocessors;
  void* stream;
} M1LightningScan;

int m1_lightning_scan_sm90(const M1LightningScan* call);

// One token of each of num_sequences sequences. q, k: bf16 [B, H, key_dim], v, o: bf16 [B, H, value_dim], last dim
// contiguous; o contiguous. state: fp32 [B, H, key_dim, value_dim], contiguous, updated in place.
typedef struct M1LightningDecode {
  const void* q;
  const void* k;
  const void* v;
  void* o;
  const float* slopes;
  float* state;
  int64_t q_stride_sequence, q_stride_head;
  int64_t k_stride_sequence, k_stride_head;
  int64_t v_stride_sequence, v_stride_head;
  int32_t num_sequences, num_heads, key_dim, value_dim;
  float scale;
  void* stream;
} M1LightningDecode;

int m1_lightning_decode_sm90(const M1LightningDecode* call);

// The ops bind.cpp registers for them (device CUDA; the Python op allocates every tensor and plans the items):
//   m1_sm90::lightning_scan(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor? state_in, Tensor items,
//       Tensor state_items, int segment_tokens, bool reverse, float scale, int num_multiprocessors, Tensor(a!) o,
//       Tensor(b!)? state_out, Tensor(c!)? workspace) -> ()          items, state_items: int32 [n, 8]
//   m1_sm90::lightning_states(Tensor k, Tensor v, Tensor slopes, Tensor state_items, bool reverse,
//       int num_multiprocessors, Tensor(a!) workspace) -> ()
//   m1_sm90::lightning_decode(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor(a!) state, float scale,
//       Tensor(b!) o) -> ()

#ifdef __cplusplus
}
#endif
