// fathom inspect: what is in a weight file; and one tensor's values as float32.
#include "fathom/inspect.hpp"

#include <map>
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "f32_file.h"
#include "fathom/tokenizer.hpp"
#include "loading.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

struct InspectArgs {
  std::string model, tensor, out;
  OutputFlags output;
};

const char* scoring_name(fathom::ScoringFunc f) {
  return f == fathom::ScoringFunc::kSigmoid ? "sigmoid" : "softmax";
}

const char* topk_name(fathom::TopkMethod m) {
  switch (m) {
    case fathom::TopkMethod::kGreedy:
      return "greedy";
    case fathom::TopkMethod::kGroupLimitedGreedy:
      return "group_limited_greedy";
    case fathom::TopkMethod::kNoauxTc:
      return "noaux_tc";
  }
  return "";
}

const char* chat_name(fathom::ChatFormat f) {
  switch (f) {
    case fathom::ChatFormat::kNone:
      return "unknown";
    case fathom::ChatFormat::kDeepSeekV2:
      return "deepseek-v2";
    case fathom::ChatFormat::kDeepSeekV3:
      return "deepseek-v3";
    case fathom::ChatFormat::kDeepSeekR1:
      return "deepseek-r1";
  }
  return "";
}

// The model's shape under the names of the published config.json.
Json config_json(const fathom::ModelConfig& c) {
  Json rope_scaling = nullptr;
  if (c.yarn.enabled)
    rope_scaling = {{"type", "yarn"},
                    {"factor", c.yarn.factor},
                    {"original_max_position_embeddings", c.yarn.original_max_position_embeddings},
                    {"beta_fast", c.yarn.beta_fast},
                    {"beta_slow", c.yarn.beta_slow},
                    {"mscale", c.yarn.mscale},
                    {"mscale_all_dim", c.yarn.mscale_all_dim}};
  return {{"architecture", c.architecture},
          {"name", c.name},
          {"vocab_size", c.vocab_size},
          {"hidden_size", c.hidden_size},
          {"num_hidden_layers", c.num_hidden_layers},
          {"num_attention_heads", c.num_attention_heads},
          {"max_position_embeddings", c.max_position_embeddings},
          {"q_lora_rank", c.q_lora_rank},
          {"kv_lora_rank", c.kv_lora_rank},
          {"qk_nope_head_dim", c.qk_nope_head_dim},
          {"qk_rope_head_dim", c.qk_rope_head_dim},
          {"v_head_dim", c.v_head_dim},
          {"intermediate_size", c.intermediate_size},
          {"first_k_dense_replace", c.first_k_dense_replace},
          {"moe_intermediate_size", c.moe_intermediate_size},
          {"n_routed_experts", c.n_routed_experts},
          {"num_experts_per_tok", c.num_experts_per_tok},
          {"n_shared_experts", c.n_shared_experts},
          {"n_group", c.n_group},
          {"topk_group", c.topk_group},
          {"scoring_func", scoring_name(c.scoring_func)},
          {"topk_method", topk_name(c.topk_method)},
          {"norm_topk_prob", c.norm_topk_prob},
          {"routed_scaling_factor", c.routed_scaling_factor},
          {"rms_norm_eps", c.rms_norm_eps},
          {"rope_theta", c.rope_theta},
          {"rope_scaling", rope_scaling},
          {"tie_word_embeddings", c.tie_word_embeddings},
          {"bos_token_id", c.bos_token_id},
          {"eos_token_id", c.eos_token_id}};
}

struct TypeTotal {
  int64_t tensors = 0, elements = 0, bytes = 0;
};

std::map<std::string, TypeTotal> totals_by_type(const fathom::FileInfo& info) {
  std::map<std::string, TypeTotal> totals;
  for (const fathom::TensorEntry& tensor : info.tensors) {
    TypeTotal& total = totals[std::string(fathom::dtype_info(tensor.dtype).name)];
    ++total.tensors;
    total.elements += tensor.elements();
    total.bytes += tensor.bytes;
  }
  return totals;
}

Json to_json(const InspectArgs& args, const fathom::FileInfo& info,
             const fathom::Result<fathom::Tokenizer>& tokenizer) {
  Json json = {
      {"path", args.model},
      {"format", info.format},
      {"total_bytes", info.total_bytes},
      {"fingerprint", fmt::format("{:016x}{:016x}", info.fingerprint_hi, info.fingerprint_lo)},
      {"config", info.has_config ? config_json(info.config) : Json(nullptr)},
      {"remarks", info.config.remarks}};
  if (tokenizer.ok())
    json["tokenizer"] = {
        {"kind", tokenizer->kind()},         {"n_tokens", tokenizer->n_tokens()},
        {"bos", tokenizer->bos()},           {"eos", tokenizer->eos()},
        {"adds_bos", tokenizer->adds_bos()}, {"chat_format", chat_name(tokenizer->chat_format())}};
  else
    json["tokenizer"] = nullptr;
  Json& types = json["types"] = Json::object();
  for (const auto& [name, total] : totals_by_type(info))
    types[name] = {
        {"tensors", total.tensors}, {"elements", total.elements}, {"bytes", total.bytes}};
  Json& metadata = json["metadata"] = Json::object();
  for (const auto& [key, value] : info.metadata) metadata[key] = value;
  Json& tensors = json["tensors"] = Json::array();
  for (const fathom::TensorEntry& tensor : info.tensors)
    tensors.push_back({{"name", tensor.name},
                       {"dtype", fathom::dtype_info(tensor.dtype).name},
                       {"shape", tensor.shape},
                       {"bytes", tensor.bytes}});
  return json;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::string to_table(const InspectArgs& args, const fathom::FileInfo& info,
                     const fathom::Result<fathom::Tokenizer>& tokenizer) {
  std::string text = fmt::format("{}: {}, {} bytes ({})\n", args.model, info.format,
                                 with_commas(info.total_bytes), human_bytes(info.total_bytes));
  if (info.has_config) {
    const Json config = config_json(info.config);
    for (const auto& [key, value] : config.items())
      text += fmt::format("  {:<26} {}\n", key,
                          value.is_string() ? value.get<std::string>() : value.dump());
  }
  if (tokenizer.ok())
    text += fmt::format("tokenizer: {}, {} tokens, chat form {}\n", tokenizer->kind(),
                        with_commas(tokenizer->n_tokens()), chat_name(tokenizer->chat_format()));
  else
    text += fmt::format("tokenizer: {}\n", tokenizer.status().message());
  for (const std::string& remark : info.config.remarks) text += "remark: " + remark + "\n";
  if (!info.metadata.empty() && verbosity() == Verbosity::kVerbose) {
    text += "metadata:\n";
    for (const auto& [key, value] : info.metadata) text += fmt::format("  {} = {}\n", key, value);
  }
  text += "types:\n";
  for (const auto& [name, total] : totals_by_type(info))
    text += fmt::format("  {:<9} {:>6} tensors {:>20} values {:>20} bytes\n", name, total.tensors,
                        with_commas(total.elements), with_commas(total.bytes));
  text += "tensors:\n";
  for (const fathom::TensorEntry& tensor : info.tensors)
    text += fmt::format("  {:<48} {:<8} {:<22} {:>16}\n", tensor.name,
                        fathom::dtype_info(tensor.dtype).name, shape_text(tensor.shape),
                        with_commas(tensor.bytes));
  return text;
}

int export_tensor(const InspectArgs& args) {
  F32File out(args.out);
  fathom::Status status =
      fathom::read_tensor_f32(args.model, args.tensor, [&out](std::span<const float> values) {
        return !cancel_token().requested() && out.append(values);
      });
  if (out.failed()) out.close();
  if (signal_exit_code() != 0) throw Exit{signal_exit_code()};
  // A tensor that is not there is a mistake of the command line, not of the disk.
  if (status.code() == fathom::Code::kNotFound && status.key() == args.tensor)
    usage_error(status.message());
  must(std::move(status));
  out.close();
  if (args.output.json)
    put_json({{"tensor", args.tensor}, {"values", out.n_values()}, {"file", args.out}});
  else
    note(fmt::format("{}: {} values", args.out, with_commas(out.n_values())));
  return kExitOk;
}

int run(const InspectArgs& args) {
  apply(args.output);
  if (args.tensor.empty() != args.out.empty())
    usage_error("--tensor and --out go together: --tensor NAME --out FILE.f32");
  if (!args.tensor.empty()) return export_tensor(args);
  const fathom::FileInfo info = must(fathom::inspect_file(args.model));
  const fathom::Result<fathom::Tokenizer> tokenizer = fathom::Tokenizer::open(args.model);
  if (args.output.json)
    put_json(to_json(args, info, tokenizer));
  else
    put(to_table(args, info, tokenizer));
  return kExitOk;
}

}  // namespace

void add_inspect(CLI::App& app, Action& action) {
  auto args = std::make_shared<InspectArgs>();
  CLI::App* command = app.add_subcommand(
      "inspect", "List a weight file: shape, metadata, tensors; or write one tensor as float32");
  add_model_flag(*command, args->model);
  command->add_option("--tensor", args->tensor, "a tensor to write, dequantised");
  command->add_option("--out", args->out, "the file for it: raw float32");
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
