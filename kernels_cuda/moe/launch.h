// The plain C face of the MoE kernels: pointers, sizes in elements, a stream. csrc/bind.cpp is the only caller.
//
// Launchers check nothing a tensor library can check better. Returned: 0, or a cudaError_t of the launch; -1 where the
// driver has no cuTensorMapEncodeTiled; -2 where it refuses a tensor map.
// Legend: T tokens, K choices per token, R = T * K rows sorted by expert, D width, F ffn width, E experts.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// logits fp32 [T, E] -> weights fp32 [T, K], experts int64 [T, K]; K <= E.
typedef struct M1MoeRoute {
  const float* logits;
  float* weights;
  int64_t* experts;
  int32_t num_tokens, num_experts, num_choices;
  void* stream;
} M1MoeRoute;

int m1_moe_route(const M1MoeRoute* call);

// Pairs per chunk of the counting sort; chunk_counts has one row of E per chunk.
#define M1_SORT_CHUNK 512

// experts int64 [R] -> pair_of_row int64 [R], row_of_pair int64 [R], rows_per_expert int64 [E].
// chunk_counts: int32 [ceil(R / M1_SORT_CHUNK), E], workspace; E <= 1024.
typedef struct M1MoeSort {
  const int64_t* experts;
  int64_t* pair_of_row;
  int64_t* row_of_pair;
  int64_t* rows_per_expert;
  int32_t* chunk_counts;
  int32_t num_pairs, num_experts;
  void* stream;
} M1MoeSort;

int m1_moe_sort(const M1MoeSort* call);

// bf16 rows of a width that is a multiple of 8, rows contiguous, 16-byte aligned.
// permute: to[r] = from[row_map[r] / K], row_map = pair_of_row, num_rows = R.
// unpermute: to[t] = sum_k from[row_map[t * K + k]] in fp32, row_map = row_of_pair, num_rows = T.
typedef struct M1MoeMove {
  const void* from;
  void* to;
  const int64_t* row_map;
  int32_t num_rows, num_choices, width;
  void* stream;
} M1MoeMove;

int m1_moe_permute(const M1MoeMove* call);
int m1_moe_unpermute(const M1MoeMove* call);

// Products over rows grouped by expert. All matrices bf16 with a contiguous last dim, bases and other strides
// multiples of 16 bytes; rows_per_expert int64 [E] in device memory. num_multiprocessors sizes the persistent grid,
// which has an even number of blocks, at least two.
// taken_tiles: two int32 in device memory, workspace: how many pairs of tiles of each queue have been asked for.
typedef struct M1Group {
  const int64_t* rows_per_expert;
  int32_t* taken_tiles;
  int32_t num_rows, num_experts, num_multiprocessors;
  void* stream;
} M1Group;

// hidden [R, 2, F] = x [R, D] gate_up_e^T, act [R, F] = silu(hidden 0) * hidden 1 * weight; row_weights fp32 [R] or
// null for ones.
typedef struct M1GateUp {
  M1Group group;
  const void* x;
  const void* gate_up;
  const float* row_weights;
  void* hidden;
  void* act;
  int64_t x_stride_row;
  int32_t width, ffn_width;
} M1GateUp;

int m1_grouped_gate_up_sm90(const M1GateUp* call);

// d_act = d_y [R, D] down_e [D, F], never stored; from it and hidden: d_hidden [R, 2, F], act [R, F] (weighted, for
// the weight gradient), and with row_weights also d_row_weights fp32 [R] = <d_act, unweighted act>.
// partials: fp32 [R, ceil(F / 256)], workspace for d_row_weights (null without row_weights).
typedef struct M1DownBackward {
  M1Group group;
  const void* d_y;
  const void* down;
  const void* hidden;
  const float* row_weights;
  void* d_hidden;
  void* act;
  float* partials;
  float* d_row_weights;
  int32_t width, ffn_width;
} M1DownBackward;

int m1_grouped_down_backward_sm90(const M1DownBackward* call);

// out [R, N] = in [R, K] weight_e^T with weight [E, N, K], or in weight_e with weight [E, K, N] when transposed is 1.
typedef struct M1GroupedProduct {
  M1Group group;
  const void* in;
  const void* weight;
  void* out;
  int32_t depth, columns;
  int32_t transposed;
} M1GroupedProduct;

int m1_grouped_product_sm90(const M1GroupedProduct* call);

// grad_e [M, N] = left_e^T right_e over the expert's rows, left [R, M], right [R, N].
// accumulate_fp32 1: grad is fp32 and added to; 0: grad is bf16 and written (zeros for an expert without rows).
// grad's base is a multiple of 16 bytes.
typedef struct M1WeightGradient {
  M1Group group;
  const void* left;
  const void* right;
  void* grad;
  int64_t right_stride_row;
  int32_t left_columns, right_columns;
  int32_t accumulate_fp32;
} M1WeightGradient;

int m1_grouped_weight_gradient_sm90(const M1WeightGradient* call);

#ifdef __cplusplus
}
#endif
