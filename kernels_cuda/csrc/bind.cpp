// Registers the kernel launchers as operators of the namespace m1_sm90, through the LibTorch stable ABI.
//
// The Python operators check arguments, allocate every output and plan the work; here tensors become pointers and
// strides. All outputs are arguments, so nothing is allocated. Registered for CUDA only; the schema is visible on any
// torch from 2.10 on, so the file loads where there is no CUDA.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <dlfcn.h>

#include <cstdint>
#include <optional>

#include "launch.h"
#include "moe/launch.h"

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void* current_stream(const Tensor& tensor) {
  // It lives in libtorch_cuda, which torch loads privately: a weak symbol of this library would stay null.
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(found);
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA: m1_sm90 needs a CUDA build");
  void* stream = nullptr;
  const AOTITorchError error = get_stream(tensor.get_device(), &stream);
  STD_TORCH_CHECK(error == 0, "torch has no current CUDA stream for device ", int(tensor.get_device()));
  return stream;
}

void check_launch(int code, const char* kernel) {
  STD_TORCH_CHECK(code != -1, kernel, ": the driver has no cuTensorMapEncodeTiled: CUDA 12 or newer is needed");
  STD_TORCH_CHECK(code != -2, kernel, ": the driver refused a tensor map: bases and strides must be multiples of 16 bytes");
  STD_TORCH_CHECK(code != -3, kernel, ": no instantiation for this shape");
  STD_TORCH_CHECK(code == 0, kernel, ": launch failed with cudaError ", code);
}

template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* input(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
T* output(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

int32_t size(const Tensor& tensor, size_t dim) { return static_cast<int32_t>(tensor.sizes()[dim]); }

void lightning_scan(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slopes, const OptionalTensor& state_in,
    const Tensor& items, const Tensor& state_items, int64_t segment_tokens, bool reverse, double scale,
    int64_t num_multiprocessors, const Tensor& o, const OptionalTensor& state_out, const OptionalTensor& workspace) {
  M1LightningScan call = {};
  call.q = input<void>(q);
  call.k = input<void>(k);
  call.v = input<void>(v);
  call.o = output<void>(o);
  call.slopes = input<float>(slopes);
  call.state_in = input<float>(state_in);
  call.state_out = output<float>(state_out);
  call.workspace = output<float>(workspace);
  call.items = input<M1LightningItem>(items);
  call.state_items = input<M1LightningItem>(state_items);
  call.q_stride_token = q.strides()[0];
  call.q_stride_head = q.strides()[1];
  call.k_stride_token = k.strides()[0];
  call.k_stride_head = k.strides()[1];
  call.v_stride_token = v.strides()[0];
  call.v_stride_head = v.strides()[1];
  call.o_stride_token = o.strides()[0];
  call.o_stride_head = o.strides()[1];
  if (state_in.has_value()) {
    call.state_in_stride_document = state_in->strides()[0];
    call.state_in_stride_head = state_in->strides()[1];
    call.state_in_stride_key = state_in->strides()[2];
    call.state_in_stride_value = state_in->strides()[3];
  }
  call.num_items = size(items, 0);
  call.num_state_items = size(state_items, 0);
  call.segment_tokens = static_cast<int32_t>(segment_tokens);
  call.num_tokens = size(q, 0);
  call.num_heads = size(q, 1);
  call.key_dim = size(q, 2);
  call.value_dim = size(v, 2);
  call.reverse = reverse ? 1 : 0;
  call.scale = static_cast<float>(scale);
  call.num_multiprocessors = static_cast<int32_t>(num_multiprocessors);
  call.stream = current_stream(q);
  check_launch(m1_lightning_scan_sm90(&call), "lightning_scan");
}

void lightning_states(
    const Tensor& k, const Tensor& v, const Tensor& slopes, const Tensor& state_items, bool reverse,
    int64_t num_multiprocessors, const Tensor& workspace) {
  M1LightningScan call = {};
  call.k = input<void>(k);
  call.v = input<void>(v);
  call.slopes = input<float>(slopes);
  call.workspace = output<float>(workspace);
  call.state_items = input<M1LightningItem>(state_items);
  call.k_stride_token = k.strides()[0];
  call.k_stride_head = k.strides()[1];
  call.v_stride_token = v.strides()[0];
  call.v_stride_head = v.strides()[1];
  call.num_state_items = size(state_items, 0);
  call.num_tokens = size(k, 0);
  call.num_heads = size(k, 1);
  call.key_dim = size(k, 2);
  call.value_dim = size(v, 2);
  call.reverse = reverse ? 1 : 0;
  call.num_multiprocessors = static_cast<int32_t>(num_multiprocessors);
  call.stream = current_stream(k);
  check_launch(m1_lightning_scan_sm90(&call), "lightning_states");
}

void lightning_decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slopes, const Tensor& state, double scale,
    const Tensor& o) {
  M1LightningDecode call = {};
  call.q = input<void>(q);
  call.k = input<void>(k);
  call.v = input<void>(v);
  call.o = output<void>(o);
  call.slopes = input<float>(slopes);
  call.state = output<float>(state);
  call.q_stride_sequence = q.strides()[0];
  call.q_stride_head = q.strides()[1];
  call.k_stride_sequence = k.strides()[0];
  call.k_stride_head = k.strides()[1];
  call.v_stride_sequence = v.strides()[0];
  call.v_stride_head = v.strides()[1];
  call.num_sequences = size(q, 0);
  call.num_heads = size(q, 1);
  call.key_dim = size(q, 2);
  call.value_dim = size(v, 2);
  call.scale = static_cast<float>(scale);
  call.stream = current_stream(q);
  check_launch(m1_lightning_decode_sm90(&call), "lightning_decode");
}

void moe_route(const Tensor& logits, const Tensor& weights, const Tensor& experts) {
  M1MoeRoute call = {};
  call.logits = input<float>(logits);
  call.weights = output<float>(weights);
  call.experts = output<int64_t>(experts);
  call.num_tokens = size(logits, 0);
  call.num_experts = size(logits, 1);
  call.num_choices = size(experts, 1);
  call.stream = current_stream(logits);
  check_launch(m1_moe_route(&call), "moe_route");
}

void moe_sort(
    const Tensor& experts, const Tensor& pair_of_row, const Tensor& row_of_pair, const Tensor& rows_per_expert,
    const Tensor& chunk_counts) {
  M1MoeSort call = {};
  call.experts = input<int64_t>(experts);
  call.pair_of_row = output<int64_t>(pair_of_row);
  call.row_of_pair = output<int64_t>(row_of_pair);
  call.rows_per_expert = output<int64_t>(rows_per_expert);
  call.chunk_counts = output<int32_t>(chunk_counts);
  call.num_pairs = size(pair_of_row, 0);
  call.num_experts = size(rows_per_expert, 0);
  call.stream = current_stream(experts);
  check_launch(m1_moe_sort(&call), "moe_sort");
}

M1MoeMove move_call(const Tensor& from, const Tensor& row_map, int64_t num_choices, const Tensor& to) {
  M1MoeMove call = {};
  call.from = input<void>(from);
  call.to = output<void>(to);
  call.row_map = input<int64_t>(row_map);
  call.num_rows = size(to, 0);
  call.num_choices = static_cast<int32_t>(num_choices);
  call.width = size(to, 1);
  call.stream = current_stream(from);
  return call;
}

void moe_permute(const Tensor& x, const Tensor& pair_of_row, int64_t num_choices, const Tensor& rows) {
  const M1MoeMove call = move_call(x, pair_of_row, num_choices, rows);
  check_launch(m1_moe_permute(&call), "moe_permute");
}

void moe_unpermute(const Tensor& rows, const Tensor& row_of_pair, int64_t num_choices, const Tensor& out) {
  const M1MoeMove call = move_call(rows, row_of_pair, num_choices, out);
  check_launch(m1_moe_unpermute(&call), "moe_unpermute");
}

M1Group group_of(
    const Tensor& rows, const Tensor& rows_per_expert, int64_t num_multiprocessors, const Tensor& taken_tiles) {
  M1Group group = {};
  group.rows_per_expert = input<int64_t>(rows_per_expert);
  group.taken_tiles = output<int32_t>(taken_tiles);
  group.num_rows = size(rows, 0);
  group.num_experts = size(rows_per_expert, 0);
  group.num_multiprocessors = static_cast<int32_t>(num_multiprocessors);
  group.stream = current_stream(rows);
  return group;
}

void grouped_gate_up(
    const Tensor& x, const Tensor& gate_up, const Tensor& rows_per_expert, const OptionalTensor& row_weights,
    int64_t num_multiprocessors, const Tensor& taken_tiles, const Tensor& hidden, const Tensor& act) {
  M1GateUp call = {};
  call.group = group_of(x, rows_per_expert, num_multiprocessors, taken_tiles);
  call.x = input<void>(x);
  call.gate_up = input<void>(gate_up);
  call.row_weights = input<float>(row_weights);
  call.hidden = output<void>(hidden);
  call.act = output<void>(act);
  call.x_stride_row = x.strides()[0];
  call.width = size(x, 1);
  call.ffn_width = size(act, 1);
  check_launch(m1_grouped_gate_up_sm90(&call), "grouped_gate_up");
}

void grouped_down_backward(
    const Tensor& d_y, const Tensor& down, const Tensor& hidden, const Tensor& rows_per_expert,
    const OptionalTensor& row_weights, int64_t num_multiprocessors, const Tensor& taken_tiles, const Tensor& d_hidden,
    const Tensor& act, const OptionalTensor& partials, const OptionalTensor& d_row_weights) {
  M1DownBackward call = {};
  call.group = group_of(d_y, rows_per_expert, num_multiprocessors, taken_tiles);
  call.d_y = input<void>(d_y);
  call.down = input<void>(down);
  call.hidden = input<void>(hidden);
  call.row_weights = input<float>(row_weights);
  call.d_hidden = output<void>(d_hidden);
  call.act = output<void>(act);
  call.partials = output<float>(partials);
  call.d_row_weights = output<float>(d_row_weights);
  call.width = size(d_y, 1);
  call.ffn_width = size(act, 1);
  check_launch(m1_grouped_down_backward_sm90(&call), "grouped_down_backward");
}

void grouped_product(
    const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert, bool transposed,
    int64_t num_multiprocessors, const Tensor& taken_tiles, const Tensor& out) {
  M1GroupedProduct call = {};
  call.group = group_of(out, rows_per_expert, num_multiprocessors, taken_tiles);
  call.in = input<void>(rows);
  call.weight = input<void>(weight);
  call.out = output<void>(out);
  call.columns = size(out, 1);
  call.depth = size(weight, transposed ? 1 : 2);
  call.transposed = transposed ? 1 : 0;
  check_launch(m1_grouped_product_sm90(&call), "grouped_product");
}

void grouped_weight_gradient(
    const Tensor& left, const Tensor& right, const Tensor& rows_per_expert, bool accumulate_fp32,
    int64_t num_multiprocessors, const Tensor& taken_tiles, const Tensor& grad) {
  M1WeightGradient call = {};
  call.group = group_of(left, rows_per_expert, num_multiprocessors, taken_tiles);
  call.left = input<void>(left);
  call.right = input<void>(right);
  call.grad = output<void>(grad);
  call.right_stride_row = right.strides()[0];
  call.left_columns = size(left, 1);
  call.right_columns = size(right, 1);
  call.accumulate_fp32 = accumulate_fp32 ? 1 : 0;
  check_launch(m1_grouped_weight_gradient_sm90(&call), "grouped_weight_gradient");
}

}  // namespace

STABLE_TORCH_LIBRARY(m1_sm90, m) {
  m.def("lightning_scan(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor? state_in, Tensor items, "
        "Tensor state_items, int segment_tokens, bool reverse, float scale, int num_multiprocessors, Tensor(a!) o, "
        "Tensor(b!)? state_out, Tensor(c!)? workspace) -> ()");
  m.def("lightning_states(Tensor k, Tensor v, Tensor slopes, Tensor state_items, bool reverse, "
        "int num_multiprocessors, Tensor(a!) workspace) -> ()");
  m.def("lightning_decode(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor(a!) state, float scale, "
        "Tensor(b!) o) -> ()");
  m.def("moe_route(Tensor logits, Tensor(a!) weights, Tensor(b!) experts) -> ()");
  m.def("moe_sort(Tensor experts, Tensor(a!) pair_of_row, Tensor(b!) row_of_pair, Tensor(c!) rows_per_expert, "
        "Tensor(d!) chunk_counts) -> ()");
  m.def("moe_permute(Tensor x, Tensor pair_of_row, int num_choices, Tensor(a!) rows) -> ()");
  m.def("moe_unpermute(Tensor rows, Tensor row_of_pair, int num_choices, Tensor(a!) out) -> ()");
  m.def("grouped_gate_up(Tensor x, Tensor gate_up, Tensor rows_per_expert, Tensor? row_weights, "
        "int num_multiprocessors, Tensor(a!) taken_tiles, Tensor(b!) hidden, Tensor(c!) act) -> ()");
  m.def("grouped_down_backward(Tensor d_y, Tensor down, Tensor hidden, Tensor rows_per_expert, "
        "Tensor? row_weights, int num_multiprocessors, Tensor(a!) taken_tiles, Tensor(b!) d_hidden, Tensor(c!) act, "
        "Tensor(d!)? partials, Tensor(e!)? d_row_weights) -> ()");
  m.def("grouped_product(Tensor rows, Tensor weight, Tensor rows_per_expert, bool transposed, "
        "int num_multiprocessors, Tensor(a!) taken_tiles, Tensor(b!) out) -> ()");
  m.def("grouped_weight_gradient(Tensor left, Tensor right, Tensor rows_per_expert, bool accumulate_fp32, "
        "int num_multiprocessors, Tensor(a!) taken_tiles, Tensor(b!) grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(m1_sm90, CUDA, m) {
  m.impl("lightning_scan", TORCH_BOX(&lightning_scan));
  m.impl("lightning_states", TORCH_BOX(&lightning_states));
  m.impl("lightning_decode", TORCH_BOX(&lightning_decode));
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_sort", TORCH_BOX(&moe_sort));
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_unpermute", TORCH_BOX(&moe_unpermute));
  m.impl("grouped_gate_up", TORCH_BOX(&grouped_gate_up));
  m.impl("grouped_down_backward", TORCH_BOX(&grouped_down_backward));
  m.impl("grouped_product", TORCH_BOX(&grouped_product));
  m.impl("grouped_weight_gradient", TORCH_BOX(&grouped_weight_gradient));
}
