// The public Tokenizer over its tables, and the decoder of streams.
#include "tokenizer.h"

#include <fmt/format.h>

#include <filesystem>
#include <new>

#include "chat.h"
#include "gguf_header.h"
#include "hash128.h"
#include "tokenizer_data.h"
#include "unicode.h"

namespace fathom {
namespace {

constexpr size_t kMaxTextBytes = (size_t{1} << 31) - 1;

Status out_of_memory() {
  return Status(Code::kMemory, "no memory for the tokenizer's work");
}

// ids of a text, through all stages.
class Encoder {
 public:
  Encoder(const Tokenizer::Data& data, std::vector<int32_t>& ids) noexcept
      : data_(data), bpe_(data.merges, data.byte_token), ids_(ids) {}

  void plain(std::string_view text) {
    io::split_text(
        data_.split, text,
        [](void* self, std::string_view piece) {
          auto* const encoder = static_cast<Encoder*>(self);
          encoder->bpe_.encode(piece, encoder->ids_);
        },
        this);
  }

  // Added tokens are cut out, in two passes, and the text between them is plain.
  void with_added(std::string_view text, int pass = 0) {
    if (pass == 2) return plain(text);
    size_t at = 0;
    while (at < text.size()) {
      const io::AddedMatcher::Match match = data_.added[pass].next(text, at);
      with_added(text.substr(at, match.begin - at), pass + 1);
      if (match.id >= 0) ids_.push_back(match.id);
      at = match.end;
    }
  }

 private:
  const Tokenizer::Data& data_;
  io::BpeEncoder bpe_;
  std::vector<int32_t>& ids_;
};

Status check_id(const Tokenizer::Data& data, int32_t id) {
  if (data.has(id)) return {};
  return Status(Code::kInvalidArgument,
                fmt::format("token id is {}, must be in [0, {})", id, data.n_tokens))
      .about("token id");
}

// What Tokenizer::open finds at a path.
Result<io::TokenizerSource> find_source(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::path file = path;
  io::TokenizerSource source;
  const bool is_folder = fs::is_directory(file, error);
  if (is_folder) {
    file /= "tokenizer.json";
    if (!fs::exists(file, error))
      return Status(Code::kNotFound, fmt::format("{} has no tokenizer.json", path));
  }
  if (file.extension() == ".safetensors") file.replace_filename("tokenizer.json");
  if (file.extension() == ".json") {
    source.json_path = file.string();
    const fs::path config = file.replace_filename("tokenizer_config.json");
    if (fs::exists(config, error)) source.config_json_path = config.string();
    return source;
  }
  // The header alone, whatever architecture it is of and whether or not it has tensors.
  FATHOM_TRY_ASSIGN(const std::shared_ptr<io::ByteSource> bytes, io::open_file(path));
  io::Hash128 unused;
  FATHOM_TRY_ASSIGN(io::GgufHeader header, io::read_gguf_header(*bytes, 0, unused));
  return std::move(header.tokenizer);
}

Result<Tokenizer> open_path(const std::string& path) {
  FATHOM_TRY_ASSIGN(const io::TokenizerSource source, find_source(path));
  FATHOM_TRY_ASSIGN(io::TokenizerBuilder builder, io::TokenizerBuilder::parse(source));
  const auto size = static_cast<size_t>(builder.size_bytes());
  constexpr std::align_val_t kAlignment{Arena::kAlignment};
  std::shared_ptr<void> block(::operator new(size, kAlignment),
                              [](void* p) { ::operator delete(p, kAlignment); });
  const std::span storage(static_cast<std::byte*>(block.get()), size);
  return std::move(builder).build(storage, std::move(block));
}

}  // namespace

Tokenizer::Tokenizer(std::shared_ptr<const Data> data) noexcept : data_(std::move(data)) {}

Result<Tokenizer> Tokenizer::open(const std::string& path) {
  try {
    Result<Tokenizer> tokenizer = open_path(path);
    if (!tokenizer.ok() && tokenizer.status().message().find(path) == std::string_view::npos)
      return std::move(tokenizer).status().in(path);
    return tokenizer;
  } catch (const std::bad_alloc&) {
    return out_of_memory().in(path);
  }
}

int64_t Tokenizer::n_tokens() const noexcept {
  return data_->n_tokens;
}
int32_t Tokenizer::bos() const noexcept {
  return data_->bos;
}
int32_t Tokenizer::eos() const noexcept {
  return data_->eos;
}
bool Tokenizer::adds_bos() const noexcept {
  return data_->adds_bos;
}
std::string_view Tokenizer::kind() const noexcept {
  return io::split_name(data_->split);
}
ChatFormat Tokenizer::chat_format() const noexcept {
  return data_->chat;
}
int64_t Tokenizer::size_bytes() const noexcept {
  return data_->size_bytes;
}

bool Tokenizer::is_special(int32_t id) const noexcept {
  return data_->has(id) && data_->control[id] != 0;
}

int32_t Tokenizer::find(std::string_view text) const noexcept {
  if (text.empty()) return -1;
  return static_cast<int32_t>(
      data_->index.find(text, [this](uint32_t id) { return data_->token(id); }));
}

std::string_view Tokenizer::token_bytes(int32_t id) const noexcept {
  return data_->has(id) ? data_->token(static_cast<uint32_t>(id)) : std::string_view();
}

Status Tokenizer::encode(std::string_view text, const EncodeOptions& options,
                         std::vector<int32_t>& ids) const {
  if (text.size() > kMaxTextBytes)
    return Status(Code::kInvalidArgument, fmt::format("the text has {} bytes, at most {} are taken",
                                                      text.size(), kMaxTextBytes))
        .about("text");
  const size_t before = ids.size();
  try {
    std::string valid;
    if (io::utf8_valid_prefix(text) != text.size()) {
      io::append_utf8_replacing(text, valid);  // up to three times as long
      if (valid.size() > kMaxTextBytes)
        return Status(Code::kInvalidArgument,
                      fmt::format("the text has {} bytes once its invalid UTF-8 is replaced, at "
                                  "most {} are taken",
                                  valid.size(), kMaxTextBytes))
            .about("text");
      text = valid;
    }
    const bool has_bos = options.parse_special && text.starts_with(token_bytes(data_->bos));
    if (options.add_bos && data_->bos >= 0 && !has_bos) ids.push_back(data_->bos);
    Encoder encoder(*data_, ids);
    if (options.parse_special)
      encoder.with_added(text);
    else
      encoder.plain(text);
    return {};
  } catch (const std::bad_alloc&) {
    ids.resize(before);
    return out_of_memory();
  }
}

Status Tokenizer::decode(std::span<const int32_t> ids, bool skip_special, std::string& text) const {
  for (const int32_t id : ids) FATHOM_TRY(check_id(*data_, id));
  const size_t before = text.size();
  try {
    std::string bytes;
    for (const int32_t id : ids)
      if (!skip_special || !is_special(id)) bytes.append(token_bytes(id));
    io::append_utf8_replacing(bytes, text);
    return {};
  } catch (const std::bad_alloc&) {
    text.resize(before);
    return out_of_memory();
  }
}

Result<std::string> Tokenizer::render_chat(std::span<const ChatMessage> messages,
                                           bool add_generation_prompt, ChatFormat format) const {
  if (format == ChatFormat::kNone) format = data_->chat;
  try {
    return io::render_chat(format, token_bytes(data_->bos), token_bytes(data_->eos), messages,
                           add_generation_prompt);
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
}

StreamDecoder::StreamDecoder(Tokenizer tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

Status StreamDecoder::push(int32_t id, std::string& text) {
  if (id < 0 || id >= tokenizer_.n_tokens())
    return Status(Code::kInvalidArgument,
                  fmt::format("token id is {}, must be in [0, {})", id, tokenizer_.n_tokens()))
        .about("token id");
  if (skip_special_ && tokenizer_.is_special(id)) return {};
  const size_t before = text.size();
  try {
    std::string bytes = pending_;
    bytes.append(tokenizer_.token_bytes(id));
    const size_t left = io::append_utf8_complete(bytes, text);
    pending_.assign(bytes, bytes.size() - left);
    return {};
  } catch (const std::bad_alloc&) {
    text.resize(before);
    return out_of_memory();
  }
}

void StreamDecoder::finish(std::string& text) {
  if (!pending_.empty()) text.append(io::kReplacement);
  pending_.clear();
}

}  // namespace fathom
