// Backend: what a device must provide - memory, weights in its own layout, and a dozen coarse
// operations over which the model's mathematics is written once (lib/nn).  Third-party backends
// stand on this header alone.
//
// Memory comes in address ranges: reserved as addresses, committed in multiples of granularity()
// when needed, decommitted when not.  A backend keeps no large memory of its own: what it needs
// beyond the operands is a workspace that the caller provides, of the size that workspace_bytes()
// answers for the same parameters; what it keeps for its lifetime is runtime_bytes().
//
// Operations take f32 activations, row-major.  They are queued in order per OpContext and cannot
// fail at the call; faults of the device surface at sync().  Results do not depend on the number
// of threads: work is cut by shape, never by thread count.
//
// Threads: memory calls and operations may come from several threads at once with different
// OpContexts.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/kv_page.hpp"
#include "fathom/memory.hpp"
#include "fathom/model_config.hpp"
#include "fathom/sampling.hpp"
#include "fathom/status.hpp"
#include "fathom/tensor.hpp"

namespace fathom {

// Interface version; a plug-in built against another one is refused.
inline constexpr uint32_t kBackendVersion = 6;

enum class DeviceKind : uint8_t { kCpu, kCuda, kSimulated };

// How products with stored weights are computed.
//   kFast   activations rounded to int8 or bf16 where a kernel wants them; f32 accumulation
//   kExact  f32 activations times dequantised weights
enum class Numerics : uint8_t { kFast, kExact };

// `count` stacked matrices of [rows, cols] (out features, in features) on one device, in the
// layout that weight_layout() chose.  A view: `data` belongs to the model's weight block.
struct Weight {
  DType dtype = DType::kF32;
  bool block_scaled = false;  // kF8E4M3 with f32 scales per 128 x 128 block (weight_scale_inv)
  uint8_t layout = 0;         // private to the backend
  int64_t rows = 0, cols = 0;
  int64_t count = 1;         // experts or heads
  int64_t matrix_bytes = 0;  // from one matrix to the next
  void* data = nullptr;
  // matrix() must not be called on a weight whose data is null.
  std::byte* matrix(int64_t index) const noexcept {
    return static_cast<std::byte*>(data) + index * matrix_bytes;
  }
};

// Where an operation runs and the scratch it may use.  The workspace is 64-byte aligned device
// memory of at least workspace_bytes() for the parameters passed, not shared between contexts.
struct OpContext {
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// out[t, :] = row tokens[t] of table.
struct EmbedParams {
  const int32_t* tokens;  // [n_tokens] host memory; 0 <= id < table->rows
  int64_t n_tokens;
  const Weight* table;  // [vocab_size, hidden_size]
  float* out;           // [n_tokens, hidden_size]
};

// out[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + eps) * weight.  May run in place.
struct RmsNormParams {
  const float* x;
  int64_t x_stride;     // values from row to row
  const float* weight;  // [n_cols]
  float eps;
  int64_t n_rows, n_cols;
  float* out;
  int64_t out_stride;
};

// out[t, r] (+)= sum_c x[t, c] * w[r, c].
struct MatmulParams {
  const float* x;  // [n_rows, w->cols]
  int64_t x_stride;
  int64_t n_rows;
  const Weight* w;  // count == 1
  float* out;       // [n_rows, w->rows]; must not overlap x
  int64_t out_stride;
  bool add = false;    // add to what out holds
  bool exact = false;  // f32 activations whatever the numerics (router)
};

// For every head h: out[t, h, :] = w[h] * x[t, h, :], or w[h] transposed * x[t, h, :].
struct HeadsMatmulParams {
  const float* x;  // [n_tokens, n_heads, in]
  int64_t x_token_stride, x_head_stride;
  int64_t n_tokens;
  const Weight* w;  // count == n_heads; [out, in], or [in, out] when transposed
  bool transposed;
  float* out;  // [n_tokens, n_heads, out]; must not overlap x
  int64_t out_token_stride, out_head_stride;
};

// cos_sin[t, i, :] = (cos, sin)((first_position + t) * inv_freq[i]) * multiplier, angle in double.
struct RopeTableParams {
  const double* inv_freq;  // [rope_dim / 2] host memory
  double multiplier;
  int64_t rope_dim;
  int64_t first_position, n_tokens;
  float* cos_sin;  // [n_tokens, rope_dim / 2, 2]
};

// Rotates pairs (2i, 2i+1) of x[t, h, 0 .. rope_dim) in place: interleaved RoPE.
struct RopeParams {
  float* x;  // first of the rope columns of token 0, head 0
  int64_t token_stride, head_stride;
  int64_t n_tokens, n_heads, rope_dim;
  const float* cos_sin;  // [n_tokens, rope_dim / 2, 2]
};

// Norms the latent columns, rotates the rope columns, and writes the rows into the pages in each
// page's type: rows.first_row .. + rows.n_rows of one layer.
struct KvAppendParams {
  const float* kv;  // [n_rows, kv_lora_rank + qk_rope_head_dim] as kv_a_proj leaves it; overwritten
                    // by nobody
  int64_t kv_stride;
  const float* norm_weight;  // [kv_lora_rank]
  float eps;
  const float* cos_sin;  // [n_rows, rope_dim / 2, 2]
  KvRows rows;
};

// Rewrites a page in place in a type of no more bytes per row (the RoPE columns too): rows of all
// layers, whether written or not.
struct KvConvertParams {
  void* page;
  KvLayout layout;
  int64_t n_layers;
  KvType from, to;  // row bytes of `to` <= those of `from`
};

// Attention of queries t (session position first_position + t) over the rows of `rows`, causal: a
// query sees rows <= its position.  Online softmax over three arrays of running state, so that the
// rows may be handed in several calls (pages that stream in, parts on other devices): `begin`
// starts the state, `finish` divides out by sum.  Calls meet at multiples of kKvSplitRows.
struct AttentionState {
  float* max;  // [n_tokens, n_heads]
  float* sum;  // [n_tokens, n_heads]
};

// Absorbed form: queries already multiplied into latent space; keys and values are the rows.
//   score = (q_latent . latent + q_rope . rope) * scale,  out = sum_rows softmax * latent
struct AttendAbsorbedParams {
  const float* q_latent;  // [n_tokens, n_heads, kv_lora_rank]
  int64_t q_latent_token_stride, q_latent_head_stride;
  const float* q_rope;  // [n_tokens, n_heads, qk_rope_head_dim], rotated
  int64_t q_rope_token_stride, q_rope_head_stride;
  int64_t n_tokens, n_heads;
  int64_t first_position;
  float scale;
  KvRows rows;
  AttentionState state;
  bool begin = true, finish = true;
  float* out;  // [n_tokens, n_heads, kv_lora_rank] dense; holds the running sum until finish
};

// state, out (+)= part, part_out: what attend_absorbed() found without finish of two parts of the
// rows, the second behind the first, becomes what it would have found of both; `finish` divides out
// by sum. The bits depend on where the parts meet: the caller decides.
struct MergeAttentionParams {
  int64_t n_tokens, n_heads, kv_lora_rank;
  AttentionState state;  // [n_tokens, n_heads] each
  float* out;            // [n_tokens, n_heads, kv_lora_rank]
  AttentionState part;   // the same shapes; not written
  const float* part_out;
  bool finish = false;
};

// Expanded form: tiles of rows are expanded to keys and values per head, used, and dropped.
struct AttendExpandedParams {
  const float* q;  // [n_tokens, n_heads, qk_nope_head_dim + qk_rope_head_dim], rope part rotated
  int64_t q_token_stride, q_head_stride;
  int64_t n_tokens, n_heads;
  int64_t qk_nope_head_dim, v_head_dim;
  int64_t first_position;
  float scale;
  // count == n_heads; [kv_lora_rank, nope], or [nope, kv_lora_rank] when k_b_transposed
  const Weight* k_b;
  bool k_b_transposed;
  const Weight* v_b;  // count == n_heads; [v_head_dim, kv_lora_rank]
  KvRows rows;
  AttentionState state;
  bool begin = true, finish = true;
  float* out;  // [n_tokens, n_heads, v_head_dim] dense
};

// Chooses experts.  softmax: V2; sigmoid + bias: V3 (DeepSeek-V3 report, section 2.1.2).  Group
// score: maximum for kGroupLimitedGreedy, sum of the two best for kNoauxTc.  Ties: lower index.
struct RouteParams {
  const float* scores;  // [n_tokens, n_experts] router logits
  const float* bias;    // [n_experts] e_score_correction_bias, or null
  int64_t n_tokens, n_experts;
  int64_t num_experts_per_tok, n_group, topk_group;
  ScoringFunc scoring_func;
  TopkMethod topk_method;
  bool norm_topk_prob;
  float routed_scaling_factor;
  int32_t* ids;    // [n_tokens, num_experts_per_tok], by descending choice score
  float* weights;  // [n_tokens, num_experts_per_tok], scaling included
};

// out (+)= down * (silu(gate * x) . (up * x)).
struct FfnParams {
  const float* x;  // [n_tokens, hidden_size]
  int64_t n_tokens;
  const Weight *gate, *up, *down;
  float* out;  // [n_tokens, hidden_size]; must not overlap x
  bool add;
};

// out[t] (+)= sum_k weights[t, k] * ffn of expert ids[t, k]; experts summed in ascending id order,
// one after the other into `out`.  The weights hold experts [first_expert, first_expert +
// gate->count); ids of others are passed over, so that a sum over experts on several devices can be
// handed on from one to the next with the same bits as on one device.
struct ExpertsParams {
  const float* x;  // [n_tokens, hidden_size]
  int64_t n_tokens;
  const int32_t* ids;    // [n_tokens, num_experts_per_tok]
  const float* weights;  // [n_tokens, num_experts_per_tok]
  int64_t num_experts_per_tok;
  const Weight *gate, *up, *down;  // the same count
  float* out;                      // [n_tokens, hidden_size]
  int64_t first_expert = 0;
  int64_t n_experts = 0;  // of the layer, on all devices; 0: gate->count
  bool add = true;        // to what out holds; otherwise the sum begins at zero in every row
  // Where set, nothing is summed and `out` is not touched: the result of each (t, k) whose expert
  // is here goes, without its weight, to row t * num_experts_per_tok + k, for sum_experts().  Other
  // rows are left alone.  Only for backends with keeps_expert_rows().
  float* rows = nullptr;  // [n_tokens, num_experts_per_tok, hidden_size]
};

// out[t] = sum_k weights[t, k] * rows[t, k], begun at zero and in ascending order of ids, one after
// the other: the bits that experts() gives when one device has all of them.  The ids of a token
// differ.
struct SumExpertsParams {
  const float* rows;     // [n_tokens, num_experts_per_tok, hidden_size]
  const int32_t* ids;    // [n_tokens, num_experts_per_tok]
  const float* weights;  // [n_tokens, num_experts_per_tok]
  int64_t n_tokens, num_experts_per_tok, hidden_size;
  float* out;  // [n_tokens, hidden_size]
};

// out[i] += x[i].
struct AddParams {
  const float* x;  // [n]
  int64_t n;
  float* out;  // [n]; does not overlap x
};

// The k likeliest tokens of each row, by descending logit, equal ones by ascending id; behind them
// the first token whose logit is NaN or +infinity, or one with id -1.
inline constexpr int64_t kMaxTopK = 64;
struct TopKParams {
  const float* logits;  // [n_rows, n_cols]
  int64_t n_rows, n_cols;
  int64_t k;        // in [1, max_top_k()], at most n_cols
  TokenLogit* out;  // [n_rows, k + 1]
};

struct MemoryState {
  int64_t total_bytes = 0;  // of the device; the host: of the machine or its cgroup
  int64_t free_bytes = 0;   // what could be had now
};

class Backend {
 public:
  virtual ~Backend();
  virtual DeviceKind kind() const noexcept = 0;
  virtual std::string_view name() const noexcept = 0;  // "cpu", "cuda:0"
  // What was chosen and why, for people: instruction set, kernels refused and for what reason.
  virtual std::string describe() const = 0;

  // ---- memory; counted by the ledger, which is the only caller ----
  virtual int64_t granularity() const noexcept = 0;  // commits are multiples of it
  virtual MemoryState memory() const noexcept = 0;
  virtual int64_t runtime_bytes() const noexcept = 0;  // kept for life: thread stacks, contexts
  // What this machine refused the device so far, for people: it works without, perhaps slower.
  virtual std::vector<std::string> remarks() const { return {}; }
  // Called on a thread of the library that will make this device's calls and no other's: a device
  // may bind it to the processors near its memory.
  virtual void adopt_thread() noexcept {}
  // Addresses only; aligned to granularity().  Errors: kMemory.
  virtual Result<void*> reserve(int64_t bytes) noexcept = 0;
  // Where what is committed at `offset` really lies.  A device that cannot map memory into reserved
  // addresses gives each commit() a chunk of its own: bytes of one commit lie together, those of
  // two do not, and a decommit() of a part may move the rest.
  virtual void* address(void* base, int64_t offset) const noexcept {
    return static_cast<std::byte*>(base) + offset;
  }
  // Backs [offset, offset + bytes) with zeroed memory, all or nothing.  Errors: kMemory.
  virtual Status commit(void* base, int64_t offset, int64_t bytes) noexcept = 0;
  // Gives the memory back to the system; the addresses stay reserved.
  virtual void decommit(void* base, int64_t offset, int64_t bytes) noexcept = 0;
  virtual void release(void* base, int64_t bytes) noexcept = 0;
  virtual bool host_accessible() const noexcept = 0;  // device pointers may be read by the host
  // Copies between the host's memory and the device's, done when they return; from any thread.  The
  // caller has waited (sync) for operations that write what is read or use what is written: a
  // device may put the copy behind what is queued, or not.  Errors: kDevice.
  virtual Status upload(void* device, const void* host, int64_t bytes) noexcept = 0;
  virtual Status download(void* host, const void* device, int64_t bytes) noexcept = 0;
  // Committed host memory that copies will go to or come from often: a device may pin it, so that
  // they run at the link's rate; without effect where it cannot.  Unpinned before it is given back.
  virtual void pin_host(void* host, int64_t bytes) noexcept { (void)host, (void)bytes; }
  virtual void unpin_host(void* host, int64_t bytes) noexcept { (void)host, (void)bytes; }

  // ---- weights ----
  // Sets layout and matrix_bytes of `weight` from its dtype, block_scaled, rows, cols.
  // Errors: kUnsupported for a type without kernels.
  virtual Status weight_layout(Weight& weight) const noexcept = 0;
  // Stores rows [first_row, first_row + n_rows) of matrix `index`, given as in the file (row_bytes
  // each, dense, host memory).  first_row is a multiple of 16, n_rows too except at the end.
  // Different rows may be stored from several threads.
  virtual Status store_rows(const Weight& weight, int64_t index, int64_t first_row, int64_t n_rows,
                            const void* rows) noexcept = 0;
  // Block scales of matrix `index`: f32 [ceil(rows/128), ceil(cols/128)], host memory.
  virtual Status store_scales(const Weight& weight, int64_t index,
                              const float* scales) noexcept = 0;

  // ---- workspace: from shapes and flags alone (data pointers are not followed); never falls when
  // n_rows or n_tokens grows, so that the longest pass decides, and never depends on rows.n_rows or
  // first_position, so that no peak depends on the context ----
  virtual int64_t workspace_bytes(const MatmulParams&) const noexcept = 0;
  virtual int64_t workspace_bytes(const HeadsMatmulParams&) const noexcept = 0;
  virtual int64_t workspace_bytes(const AttendAbsorbedParams&) const noexcept = 0;
  virtual int64_t workspace_bytes(const AttendExpandedParams&) const noexcept = 0;
  virtual int64_t workspace_bytes(const FfnParams&) const noexcept = 0;
  virtual int64_t workspace_bytes(const ExpertsParams&) const noexcept = 0;
  virtual int64_t workspace_bytes(const TopKParams&) const noexcept { return 0; }

  // ---- operations ----
  virtual void embed(const OpContext&, const EmbedParams&) noexcept = 0;
  virtual void rms_norm(const OpContext&, const RmsNormParams&) noexcept = 0;
  virtual void matmul(const OpContext&, const MatmulParams&) noexcept = 0;
  virtual void heads_matmul(const OpContext&, const HeadsMatmulParams&) noexcept = 0;
  virtual void rope_table(const OpContext&, const RopeTableParams&) noexcept = 0;
  virtual void rope(const OpContext&, const RopeParams&) noexcept = 0;
  virtual void kv_append(const OpContext&, const KvAppendParams&) noexcept = 0;
  virtual void kv_convert(const OpContext&, const KvConvertParams&) noexcept = 0;
  virtual void attend_absorbed(const OpContext&, const AttendAbsorbedParams&) noexcept = 0;
  virtual void merge_attention(const OpContext&, const MergeAttentionParams&) noexcept = 0;
  virtual void attend_expanded(const OpContext&, const AttendExpandedParams&) noexcept = 0;
  // attend_absorbed() for several texts, which share n_heads, strides, scale and layout: the same
  // bits as one after the other, for devices on which every launch takes its time.  The workspace
  // is that of one text with the tokens of all.
  virtual void attend_texts(const OpContext& op, const AttendAbsorbedParams* texts,
                            int64_t n_texts) noexcept {
    for (int64_t i = 0; i < n_texts; ++i) attend_absorbed(op, texts[i]);
  }
  virtual void route(const OpContext&, const RouteParams&) noexcept = 0;
  virtual void ffn(const OpContext&, const FfnParams&) noexcept = 0;
  virtual void experts(const OpContext&, const ExpertsParams&) noexcept = 0;
  virtual void add(const OpContext&, const AddParams&) noexcept = 0;
  // Whether experts() can keep its rows apart and sum_experts() adds them up: what copies of
  // experts on a second device need (experts.cache).  A backend without it has no such copies.
  virtual bool keeps_expert_rows() const noexcept { return false; }
  virtual void sum_experts(const OpContext&, const SumExpertsParams&) noexcept {}
  // For devices whose logits would have to be brought to the host: the most tokens that top_k()
  // finds, at most kMaxTopK.  0: there is no such operation, and it is not called.
  virtual int64_t max_top_k() const noexcept { return 0; }
  virtual void top_k(const OpContext&, const TopKParams&) noexcept {}
  // Waits for all operations of this context.  Errors: kDevice.
  virtual Status sync(const OpContext&) noexcept = 0;
};

// ---- memory nodes (NUMA) ----
// A part of the machine's memory with the processors that are near it.
struct NumaNode {
  int id = 0;             // as the system numbers it; numbers may have gaps
  std::vector<int> cpus;  // that this process may use, ascending; none: memory alone (CXL, HBM)
  int64_t total_bytes = 0, free_bytes = 0;  // 0: no memory, or none that this process may use
  std::vector<int> distances;  // to each node of the list, as the firmware says: 10 to itself
};
// The nodes that this process may use, ascending; those without processors are among them.  A
// machine that does not tell is one node.  `root` is put before /sys and /proc, for tests.
std::vector<NumaNode> numa_nodes(const std::string& root = {});
// Of all nodes together: the machine's, or what control groups and limits leave to this process.
MemoryState host_memory(const std::string& root = {}) noexcept;

// What a CPU device makes of several nodes.  Results do not depend on it.
//   kAuto  kRows where the process may use processors of several nodes
//   kOff   nothing: memory lies where the system puts it, threads run where it lets them
//   kRows  each matrix is cut by rows over the nodes, in proportion to their processors; those of
//          a node lie in its memory and are multiplied by threads bound to it; other memory is
//          spread
enum class NumaMode : uint8_t { kAuto, kOff, kRows };

// ---- built-in backends ----
struct CpuOptions {
  std::string name = "cpu";
  int threads = 0;           // 0: the processors this process may use (of the node)
  std::string isa = "auto";  // "scalar", "avx2", "avx512", "amx"; refused when the machine lacks it
  Numerics numerics = Numerics::kFast;
  HostAllocator allocator = {};  // with one, memory is not bound to nodes: it is the host's
  NumaMode numa = NumaMode::kAuto;
  int node = -1;  // the device is this node alone: its threads and its memory; -1: all nodes
};
// Starts the thread pool.  Errors: kConfig (unknown isa or node), kUnsupported (this machine lacks
// it, and the message says what it lacks), kMemory.
Result<std::unique_ptr<Backend>> make_cpu_backend(const CpuOptions&);

// Instruction sets compiled in, best first, with whether this machine runs them and why not.
struct IsaInfo {
  std::string name;
  bool available = false;
  std::string reason;  // empty when available
};
std::vector<IsaInfo> cpu_isas();

}  // namespace fathom
