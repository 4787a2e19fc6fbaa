// One GGUF header, front to back:  magic, version, n_tensors, n_kv | key, type, value ... |
// name, n_dims, dims, type, offset ... | padding | data.  Every length is checked against what is
// left of the file before memory is taken for it.
#include "gguf_header.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <optional>

#include "buffered_reader.h"
#include "checked.h"
#include "range.h"
#include "tensor_file_builder.h"
#include "text.h"

namespace fathom::io {
namespace {

// The largest released header (a vocabulary of 164 K pieces with merges) has about 10 MB.
constexpr int64_t kMaxHeaderBytes = int64_t{256} << 20;
constexpr int64_t kMaxKeys = 65'536;
constexpr int64_t kMaxKeyBytes = 1023;  // the specification allows 65,535; real ones have 50
constexpr int64_t kMaxTextBytes = int64_t{16} << 20;  // of a string value
constexpr int64_t kMaxPieceBytes = 65'535;            // of a token or a merge
constexpr int64_t kMinKeyValueBytes = 8 + 1 + 4 + 1;  // the shortest that can be
constexpr int64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;
constexpr uint32_t kDefaultAlignment = 32;
constexpr uint32_t kMinAlignment = 8, kMaxAlignment = 1u << 20;

constexpr int kElementBytes[kGgufTypeCount] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

// ggml's type numbers.  The gaps are types that were removed.
std::optional<DType> dtype_of(uint32_t ggml_type) {
  switch (ggml_type) {
    case 0:
      return DType::kF32;
    case 1:
      return DType::kF16;
    case 2:
      return DType::kQ4_0;
    case 3:
      return DType::kQ4_1;
    case 6:
      return DType::kQ5_0;
    case 7:
      return DType::kQ5_1;
    case 8:
      return DType::kQ8_0;
    case 9:
      return DType::kQ8_1;
    case 10:
      return DType::kQ2_K;
    case 11:
      return DType::kQ3_K;
    case 12:
      return DType::kQ4_K;
    case 13:
      return DType::kQ5_K;
    case 14:
      return DType::kQ6_K;
    case 15:
      return DType::kQ8_K;
    case 16:
      return DType::kIQ2_XXS;
    case 17:
      return DType::kIQ2_XS;
    case 18:
      return DType::kIQ3_XXS;
    case 19:
      return DType::kIQ1_S;
    case 20:
      return DType::kIQ4_NL;
    case 21:
      return DType::kIQ3_S;
    case 22:
      return DType::kIQ2_S;
    case 23:
      return DType::kIQ4_XS;
    case 24:
      return DType::kI8;
    case 25:
      return DType::kI16;
    case 26:
      return DType::kI32;
    case 27:
      return DType::kI64;
    case 28:
      return DType::kF64;
    case 29:
      return DType::kIQ1_M;
    case 30:
      return DType::kBF16;
    case 34:
      return DType::kTQ1_0;
    case 35:
      return DType::kTQ2_0;
    case 39:
      return DType::kMXFP4;
    default:
      return std::nullopt;
  }
}

class HeaderReader {
 public:
  HeaderReader(const ByteSource& source, int source_index, Hash128& hash)
      : source_size_(source.size()),
        source_index_(source_index),
        reader_(source, kMaxHeaderBytes, hash) {}

  Status run(GgufHeader* header) {
    FATHOM_TRY(preamble());
    header->metadata.entries.reserve(static_cast<size_t>(n_keys_));
    for (int64_t i = 0; i < n_keys_; ++i) FATHOM_TRY(key_value(header));
    FATHOM_TRY(header->metadata.index());
    FATHOM_TRY(tokenizer_scalars(header));
    FATHOM_TRY(alignment(header->metadata));

    header->tensors.reserve(static_cast<size_t>(n_tensors_));
    for (int64_t i = 0; i < n_tensors_; ++i) FATHOM_TRY(tensor_info(&header->tensors));
    reader_.finish();
    return place_tensors(&header->tensors);
  }

 private:
  Status bad(std::string_view message, std::string_view key = {}) const {
    return Status(Code::kFormat, message).about(key).at(static_cast<uint64_t>(reader_.position()));
  }

  Status preamble() {
    const char* magic = nullptr;
    FATHOM_TRY(reader_.view(4, "the magic number", &magic));
    if (std::memcmp(magic, "GGUF", 4) != 0)
      return Status(Code::kFormat, "not a GGUF file: it does not begin with \"GGUF\"").at(0);
    uint32_t version = 0;
    FATHOM_TRY(reader_.scalar("the version", &version));
    if ((version & 0xFFFF) == 0 && version != 0)
      return Status(Code::kUnsupported, "the GGUF file is big-endian; only little-endian is read")
          .at(4);
    if (version == 0) return Status(Code::kFormat, "GGUF version is 0").at(4);
    if (version != 2 && version != 3)
      return Status(Code::kVersion, fmt::format("GGUF version is {}; 2 and 3 are read", version))
          .at(4);
    FATHOM_TRY(count("n_tensors", kMaxTensors, kMinTensorBytes, &n_tensors_));
    return count("n_kv", kMaxKeys, kMinKeyValueBytes, &n_keys_);
  }

  // A number of things of at least `bytes_each`, all still to come.
  Status count(const char* what, int64_t max, int64_t bytes_each, int64_t* out) {
    uint64_t n = 0;
    FATHOM_TRY(reader_.scalar(what, &n));
    if (!(Checked(n) * bytes_each).at_most(reader_.remaining()))
      return bad(fmt::format("{} is {}, too many for the {} bytes that are left", what, n,
                             reader_.remaining()),
                 what);
    if (std::cmp_greater(n, max))
      return bad(fmt::format("{} is {}, at most {} are accepted", what, n, max), what);
    *out = static_cast<int64_t>(n);
    return {};
  }

  Status string_length(const char* what, int64_t max, std::string_view key, int64_t* out) {
    uint64_t n = 0;
    FATHOM_TRY(reader_.scalar(what, &n));
    if (std::cmp_greater(n, reader_.remaining()))
      return bad(fmt::format("{} {}: a length of {} bytes, but only {} are left", what, key, n,
                             reader_.remaining()),
                 key);
    if (std::cmp_greater(n, max))
      return bad(
          fmt::format("{} {}: a length of {} bytes, at most {} are accepted", what, key, n, max),
          key);
    *out = static_cast<int64_t>(n);
    return {};
  }

  // A string value.
  Status text(std::string_view key, std::string* out) {
    int64_t n = 0;
    FATHOM_TRY(string_length("the value of", kMaxTextBytes, key, &n));
    FATHOM_TRY(reader_.append(n, "a string", out));
    if (!is_plain_utf8(*out))
      return bad(fmt::format("the value of {} is not valid UTF-8 text without zero bytes", key),
                 key);
    return {};
  }

  // A key or the name of a tensor.
  Status name(const char* what, int64_t max, std::string* out) {
    int64_t n = 0;
    FATHOM_TRY(string_length(what, max, "", &n));
    if (n == 0) return bad(fmt::format("{} is empty", what));
    FATHOM_TRY(reader_.append(n, what, out));
    if (!is_plain_name(*out))
      return bad(fmt::format("{} is not valid UTF-8 text without control characters: {}", what,
                             printable(*out)));
    return {};
  }

  Status type(std::string_view key, GgufType* out) {
    uint32_t number = 0;
    FATHOM_TRY(reader_.scalar("a value's type", &number));
    if (number >= kGgufTypeCount)
      return bad(
          fmt::format("{}: the value's type is {}, must be below {}", key, number, kGgufTypeCount),
          key);
    *out = static_cast<GgufType>(number);
    return {};
  }

  Status key_value(GgufHeader* header) {
    GgufEntry entry;
    entry.offset = static_cast<uint64_t>(reader_.position());
    FATHOM_TRY(name("a key", kMaxKeyBytes, &entry.key));
    FATHOM_TRY(type(entry.key, &entry.type));
    FATHOM_TRY(entry.type == GgufType::kArray ? array(header, &entry) : scalar(&entry));
    header->metadata.entries.push_back(std::move(entry));
    return {};
  }

  Status scalar(GgufEntry* entry) {
    const char* key = entry->key.c_str();
    switch (entry->type) {
      case GgufType::kU8:
        return integer<uint8_t>(key, entry);
      case GgufType::kI8:
        return integer<int8_t>(key, entry);
      case GgufType::kU16:
        return integer<uint16_t>(key, entry);
      case GgufType::kI16:
        return integer<int16_t>(key, entry);
      case GgufType::kU32:
        return integer<uint32_t>(key, entry);
      case GgufType::kI32:
        return integer<int32_t>(key, entry);
      case GgufType::kU64:
        return integer<uint64_t>(key, entry);
      case GgufType::kI64:
        return integer<int64_t>(key, entry);
      case GgufType::kBool:
        FATHOM_TRY(integer<uint8_t>(key, entry));
        if (entry->bits > 1)
          return bad(fmt::format("{} is {}, must be 0 or 1", key, entry->bits), key);
        return {};
      case GgufType::kF32: {
        float value = 0;
        FATHOM_TRY(reader_.scalar(key, &value));
        entry->real = value;
        return {};
      }
      case GgufType::kF64:
        return reader_.scalar(key, &entry->real);
      case GgufType::kString:
        return text(key, &entry->text);
      case GgufType::kArray:
        break;
    }
    return bad(fmt::format("{}: no scalar", key), key);
  }

  template <class T>
  Status integer(const char* key, GgufEntry* entry) {
    T value{};
    FATHOM_TRY(reader_.scalar(key, &value));
    entry->bits = static_cast<uint64_t>(value);
    return {};
  }

  Status array(GgufHeader* header, GgufEntry* entry) {
    const std::string& key = entry->key;
    FATHOM_TRY(type(key, &entry->element));
    if (entry->element == GgufType::kArray)
      return bad(fmt::format("{}: arrays of arrays are not accepted", key), key);
    FATHOM_TRY(reader_.scalar("an array's length", &entry->bits));
    const int element_bytes = kElementBytes[static_cast<size_t>(entry->element)];
    const Checked least = Checked(entry->bits) * (element_bytes == 0 ? 8 : element_bytes);
    if (!least.at_most(reader_.remaining()))
      return bad(fmt::format("{}: an array of {} elements is longer than the {} bytes left", key,
                             entry->bits, reader_.remaining()),
                 key);
    TokenizerSource& tokenizer = header->tokenizer;
    if (key == "tokenizer.ggml.tokens")
      return pieces(*entry, &tokenizer.pieces, &tokenizer.piece_end);
    if (key == "tokenizer.ggml.merges")
      return pieces(*entry, &tokenizer.merges, &tokenizer.merge_end);
    if (key == "tokenizer.ggml.token_type") return token_types(*entry, &tokenizer.token_type);
    if (element_bytes > 0) return reader_.skip(least.value(), "an array");
    for (uint64_t i = 0; i < entry->bits; ++i) {
      int64_t n = 0;
      FATHOM_TRY(string_length("a string of", kMaxTextBytes, key, &n));
      FATHOM_TRY(reader_.skip(n, "a string"));
    }
    return {};
  }

  // An array of strings into flat storage.
  Status pieces(const GgufEntry& entry, std::string* bytes, std::vector<uint32_t>* ends) {
    if (entry.element != GgufType::kString)
      return bad(fmt::format("{} is an array of {}, must be one of strings", entry.key,
                             gguf_type_name(entry.element)),
                 entry.key);
    if (entry.bits == 0 && ends != nullptr && entry.key == "tokenizer.ggml.tokens")
      return bad("tokenizer.ggml.tokens: the vocabulary is empty", entry.key);
    if (!ends->empty()) return bad(fmt::format("{} appears twice", entry.key), entry.key);
    ends->reserve(entry.bits);
    constexpr uint64_t kTypicalBytes = 8;
    bytes->reserve(
        std::min(entry.bits * kTypicalBytes, static_cast<uint64_t>(reader_.remaining())));
    for (uint64_t i = 0; i < entry.bits; ++i) {
      int64_t n = 0;
      FATHOM_TRY(string_length("a piece of", kMaxPieceBytes, entry.key, &n));
      const char* piece = nullptr;
      FATHOM_TRY(reader_.view(n, "a piece", &piece));
      bytes->append(piece, static_cast<size_t>(n));
      ends->push_back(static_cast<uint32_t>(bytes->size()));  // < kMaxHeaderBytes
    }
    return {};
  }

  Status token_types(const GgufEntry& entry, std::vector<int32_t>* types) {
    if (entry.element != GgufType::kI32 && entry.element != GgufType::kU32)
      return bad(fmt::format("{} is an array of {}, must be one of 32-bit integers", entry.key,
                             gguf_type_name(entry.element)),
                 entry.key);
    if (!types->empty()) return bad(fmt::format("{} appears twice", entry.key), entry.key);
    types->reserve(entry.bits);
    for (uint64_t i = 0; i < entry.bits; ++i) {
      int32_t value = 0;
      FATHOM_TRY(reader_.scalar("a token type", &value));
      types->push_back(value);
    }
    return {};
  }

  // The tokenizer's scalars, and whether its arrays and ids agree.
  Status tokenizer_scalars(GgufHeader* header) const {
    const GgufMetadata& metadata = header->metadata;
    TokenizerSource& t = header->tokenizer;
    FATHOM_TRY_ASSIGN(t.gguf_model, metadata.string_or("tokenizer.ggml.model", ""));
    FATHOM_TRY_ASSIGN(t.gguf_pre, metadata.string_or("tokenizer.ggml.pre", ""));
    FATHOM_TRY_ASSIGN(t.chat_template, metadata.string_or("tokenizer.chat_template", ""));
    FATHOM_TRY_ASSIGN(t.add_bos_token, metadata.boolean_or("tokenizer.ggml.add_bos_token", false));
    FATHOM_TRY_ASSIGN(t.add_eos_token, metadata.boolean_or("tokenizer.ggml.add_eos_token", false));
    const int64_t n_pieces = static_cast<int64_t>(t.piece_end.size());
    const int64_t last_id = n_pieces > 0 ? n_pieces - 1 : std::numeric_limits<int32_t>::max();
    FATHOM_TRY_ASSIGN(t.bos_token_id,
                      metadata.integer_or("tokenizer.ggml.bos_token_id", -1, 0, last_id));
    FATHOM_TRY_ASSIGN(t.eos_token_id,
                      metadata.integer_or("tokenizer.ggml.eos_token_id", -1, 0, last_id));
    if (n_pieces == 0) return {};
    for (const char* key : {"tokenizer.ggml.token_type", "tokenizer.ggml.scores"}) {
      const GgufEntry* entry = metadata.find(key);
      if (entry != nullptr &&
          (entry->type != GgufType::kArray || std::cmp_not_equal(entry->bits, n_pieces)))
        return Status(Code::kFormat, fmt::format("{} is {}, must have one value for each of the "
                                                 "{} tokens",
                                                 key, entry->to_text(), n_pieces))
            .about(key)
            .at(entry->offset);
    }
    return {};
  }

  Status alignment(const GgufMetadata& metadata) {
    constexpr const char* kKey = "general.alignment";
    const GgufEntry* entry = metadata.find(kKey);
    if (entry == nullptr) return {};
    if (entry->type != GgufType::kU32 || !std::has_single_bit(entry->bits) ||
        entry->bits < kMinAlignment || entry->bits > kMaxAlignment)
      return Status(Code::kFormat, fmt::format("{} is {} of type {}, must be a power of two in "
                                               "[{}, {}] of type u32",
                                               kKey, entry->to_text(), gguf_type_name(entry->type),
                                               kMinAlignment, kMaxAlignment))
          .about(kKey)
          .at(entry->offset);
    alignment_ = static_cast<int64_t>(entry->bits);
    return {};
  }

  // offset stays relative to the data until place_tensors().
  Status tensor_info(std::vector<TensorInfo>* tensors) {
    TensorInfo tensor;
    tensor.source = source_index_;
    FATHOM_TRY(name("a tensor's name", kMaxNameBytes, &tensor.name));
    const std::string& id = tensor.name;

    uint32_t n_dims = 0;
    FATHOM_TRY(reader_.scalar("n_dims", &n_dims));
    if (n_dims < 1 || n_dims > 4)
      return bad(fmt::format("tensor {} has {} dimensions, must be 1 to 4", id, n_dims), id);
    tensor.n_dims = static_cast<int>(n_dims);
    Checked elements = 1;
    for (int i = tensor.n_dims - 1; i >= 0; --i) {  // the file begins with the innermost
      uint64_t dim = 0;
      FATHOM_TRY(reader_.scalar("a dimension", &dim));
      elements = elements * dim;
      if (dim == 0 || !elements.ok())
        return bad(fmt::format("tensor {}: dimension {} is {}, with the others no possible shape",
                               id, i, dim),
                   id);
      tensor.shape[i] = static_cast<int64_t>(dim);
    }

    uint32_t ggml_type = 0;
    FATHOM_TRY(reader_.scalar("a tensor's type", &ggml_type));
    const std::optional<DType> dtype = dtype_of(ggml_type);
    if (!dtype)
      return Status(Code::kUnsupported,
                    fmt::format("tensor {} has the type number {}, unknown here", id, ggml_type))
          .about(id)
          .at(static_cast<uint64_t>(reader_.position()));
    tensor.dtype = *dtype;
    const DTypeInfo& info = dtype_info(*dtype);
    if (tensor.cols() % info.block_elements != 0)
      return bad(fmt::format("tensor {}: rows of {} are no multiple of {}'s blocks of {}", id,
                             tensor.cols(), info.name, info.block_elements),
                 id);
    const Checked bytes = exact_quotient(elements, info.block_elements) * info.block_bytes;

    uint64_t offset = 0;
    FATHOM_TRY(reader_.scalar("a tensor's offset", &offset));
    if (!(Checked(offset) + bytes).at_most(source_size_))
      return bad(fmt::format("tensor {}: {} elements of {} at offset {} do not fit into a file of "
                             "{} bytes",
                             id, elements.value(), info.name, offset, source_size_),
                 id);
    if (static_cast<int64_t>(offset) % alignment_ != 0)
      return bad(fmt::format("tensor {}: offset {} is no multiple of the alignment {}", id, offset,
                             alignment_),
                 id);
    tensor.offset = static_cast<int64_t>(offset);
    tensor.bytes = bytes.value();
    tensors->push_back(std::move(tensor));
    return {};
  }

  Status place_tensors(std::vector<TensorInfo>* tensors) const {
    const Checked data = Checked(reader_.position()).aligned(alignment_);
    for (TensorInfo& tensor : *tensors) {
      const Checked start = data + tensor.offset;
      if (!(start + tensor.bytes).at_most(source_size_))
        return bad(fmt::format("tensor {}: its {} bytes at {} end behind the file of {} bytes",
                               tensor.name, tensor.bytes, start.value(), source_size_),
                   tensor.name);
      tensor.offset = start.value();
    }
    return {};
  }

  int64_t source_size_;
  int source_index_;
  BufferedReader reader_;
  int64_t n_tensors_ = 0, n_keys_ = 0;
  int64_t alignment_ = kDefaultAlignment;
};

}  // namespace

const char* gguf_type_name(GgufType type) noexcept {
  static constexpr const char* kNames[kGgufTypeCount] = {
      "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64",
  };
  return kNames[static_cast<size_t>(type)];
}

Result<GgufHeader> read_gguf_header(const ByteSource& source, int source_index, Hash128& hash) {
  GgufHeader header;
  Status status = HeaderReader(source, source_index, hash).run(&header);
  if (status.ok()) return header;
  if (status.message().starts_with(source.name())) return status;  // it names the file already
  return std::move(status).in(source.name());
}

}  // namespace fathom::io
