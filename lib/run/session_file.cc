// Saving and restoring sessions: header, tokens, logits, and the rows of the pages as they are.
#include "session_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "../io/tensor_file.h"
#include "session_file_format.h"
#include "session_file_stream.h"

namespace fathom {
namespace run {
namespace {

// The page of a device's table that holds a row.
const KvPage& page_of(const SessionState& s, int stage, int64_t row) noexcept {
  return s.cache.rows(stage, 0, 0, 0).pages[row / s.cache.page_tokens()];
}

// Calls visit(device, page, offset in the page, bytes) for all stored bytes of rows [first_row,
// first_row + n_rows), whose pages all have `type`: layer by layer, latent plane then rope plane,
// in pieces that do not cross a page.
template <class Visit>
Status each_piece(const SessionState& s, KvType type, int64_t first_row, int64_t n_rows,
                  Visit&& visit) {
  for (const LayerPlacement& layer : s.model.plan().placement.layers)
    for (const bool rope : {false, true}) {
      const KvLayout& layout = s.cache.pages().options().layout;
      const int64_t row_bytes = rope ? layout.rope_row_bytes(type) : layout.latent_row_bytes(type);
      const int64_t plane =
          layer.slot * layout.layer_bytes(type) + (rope ? layout.rope_plane_offset(type) : 0);
      for (int64_t row = first_row; row < first_row + n_rows;) {
        const int64_t in_page = row % layout.page_tokens;
        const int64_t n = std::min(first_row + n_rows - row, layout.page_tokens - in_page);
        FATHOM_TRY(visit(layer.device, row / layout.page_tokens, plane + in_page * row_bytes,
                         n * row_bytes));
        row += n;
      }
    }
  return {};
}

SessionFileHeader header_of(const SessionState& s) noexcept {
  const Plan& plan = s.model.plan();
  SessionFileHeader header{.has_logits = s.has_logits,
                           .file_bytes = 0,
                           .fingerprint_lo = plan.fingerprint_lo,
                           .fingerprint_hi = plan.fingerprint_hi,
                           .n_layers = plan.model.num_hidden_layers,
                           .kv_lora_rank = plan.model.kv_lora_rank,
                           .qk_rope_head_dim = plan.model.qk_rope_head_dim,
                           .vocab_size = plan.model.vocab_size,
                           .page_tokens = s.cache.page_tokens(),
                           .n_tokens = s.n_tokens};
  header.file_bytes = fixed_file_bytes(header);
  for (int64_t page = 0; page < header.n_pages(); ++page)
    header.file_bytes += page_file_bytes(header, page_of(s, 0, page * header.page_tokens).type,
                                         header.rows_of_page(page));
  return header;
}

// Rows of a new session become those of the file, in pages of the type they were saved in.
Status read_rows(SessionState& s, SessionSource& source, int64_t page, int64_t first_row,
                 int64_t n_tokens, const PageHeader& header) {
  while (s.cache.capacity_tokens() < first_row + header.n_rows)
    FATHOM_TRY(s.restore_page(header.type, n_tokens));
  // With another page size the first row may share a page with rows of another type.
  if (const KvType here = page_of(s, 0, first_row).type; here != header.type)
    return Status(Code::kMismatch,
                  fmt::format("page {} was saved as {} and would share one of {} tokens with rows "
                              "kept as {}: restore with kv.page_tokens as it was",
                              page, kv_type_name(header.type), s.cache.page_tokens(),
                              kv_type_name(here)))
        .at(static_cast<uint64_t>(source.position()))
        .about("kv.page_tokens");
  FATHOM_TRY(each_piece(s, header.type, first_row, header.n_rows,
                        [&](int d, int64_t to, int64_t offset, int64_t bytes) {
                          auto* data =
                              static_cast<std::byte*>(s.cache.rows(d, 0, 0, 0).pages[to].data);
                          const int holder = s.cache.pages().holder(d, to);
                          return source.take(*s.stages[static_cast<size_t>(holder)].device,
                                             data + offset, bytes, "page");
                        }));
  s.cache.commit_rows(first_row + header.n_rows);  // whole pages may be moved now
  return {};
}

Status read_pages(SessionState& s, SessionSource& source, const SessionFileHeader& header) {
  for (int64_t page = 0; page < header.n_pages(); ++page) {
    const int64_t offset = source.position();
    PageHeaderBytes bytes;
    FATHOM_TRY(source.take(bytes, "page header"));
    FATHOM_TRY(source.end_section("page header"));
    FATHOM_TRY_ASSIGN(const PageHeader in_use,
                      decode_page(bytes, page, header.rows_of_page(page), offset));
    FATHOM_TRY(read_rows(s, source, page, page * header.page_tokens, header.n_tokens, in_use));
    FATHOM_TRY(source.end_section("page"));
  }
  return {};
}

Status read_tokens(SessionState& s, SessionSource& source, int64_t n_tokens) {
  const int64_t offset = source.position();
  const std::span<int32_t> ids(s.tokens, static_cast<size_t>(n_tokens));
  FATHOM_TRY(source.take(std::as_writable_bytes(ids), "tokens"));
  FATHOM_TRY(source.end_section("tokens"));
  const int64_t vocab = s.model.config().vocab_size;
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= vocab)
      return Status(Code::kFormat,
                    fmt::format("token {} has id {}, which is not in [0, {})", i, ids[i], vocab))
          .at(static_cast<uint64_t>(offset) + 4 * i)
          .about("tokens");
  return {};
}

}  // namespace

Status write_session(const SessionState& s, const WriteFunction& write, const RunOptions& options) {
  const SessionFileHeader header = header_of(s);
  s.timeline().mark("save", "", s.n_tokens, header.file_bytes);
  const RunControl control(options);
  SessionSink sink(write, control, header.file_bytes);
  FATHOM_TRY(sink.put(encode(header)));
  FATHOM_TRY(sink.end_section());
  FATHOM_TRY(sink.put(std::as_bytes(std::span(s.tokens, static_cast<size_t>(s.n_tokens)))));
  FATHOM_TRY(sink.end_section());
  if (s.has_logits) {
    const std::span<const float> logits(s.logits, static_cast<size_t>(header.vocab_size));
    FATHOM_TRY(sink.put(std::as_bytes(logits)));
    FATHOM_TRY(sink.end_section());
  }
  for (int64_t page = 0; page < header.n_pages(); ++page) {
    const int64_t first_row = page * header.page_tokens;
    const PageHeader in_use{page_of(s, 0, first_row).type, header.rows_of_page(page)};
    FATHOM_TRY(sink.put(encode(in_use)));
    FATHOM_TRY(sink.end_section());
    FATHOM_TRY(each_piece(s, in_use.type, first_row, in_use.n_rows,
                          [&](int d, int64_t from, int64_t offset, int64_t bytes) {
                            return sink.put(bytes, [&](std::byte* out, int64_t at, int64_t n) {
                              return s.cache.pages().read(d, from, offset + at, out, n);
                            });
                          }));
    FATHOM_TRY(sink.end_section());
  }
  FATHOM_TRY(sink.finish());
  if (sink.position() != header.file_bytes)
    return Status(Code::kInternal, fmt::format("the session took {} bytes, not {} as computed",
                                               sink.position(), header.file_bytes));
  return {};
}

Status save_session(const SessionState& s, const std::string& path, const RunOptions& options,
                    io::FileCalls& calls) {
  FATHOM_TRY_ASSIGN(io::ReplaceFile file, io::ReplaceFile::create(path, calls));
  FATHOM_TRY(write_session(
      s, [&](std::span<const std::byte> bytes) { return file.write(bytes); }, options));
  return file.commit();
}

Result<Session> read_session(const Model& model, const ReadFunction& read, int64_t size_bytes,
                             const SessionOptions& options, const RunOptions& run,
                             Checksums checksums) {
  if (size_bytes < 0)
    return Status(Code::kInvalidArgument, fmt::format("a size of {} bytes", size_bytes));
  const RunControl control(run);
  SessionSource source(read, size_bytes, control, checksums == Checksums::kVerified);
  SessionHeaderBytes bytes;
  FATHOM_TRY(source.take(bytes, "header"));
  FATHOM_TRY(check_magic(bytes));
  FATHOM_TRY(source.end_section("header"));
  FATHOM_TRY_ASSIGN(const SessionFileHeader header, decode(bytes, size_bytes));
  const Plan& plan = model.plan();
  FATHOM_TRY(check_model(header, plan.model, plan.fingerprint_lo, plan.fingerprint_hi));
  const int64_t max_tokens = options.max_tokens == 0 ? plan.max_context : options.max_tokens;
  if (header.n_tokens > max_tokens)
    return Status(Code::kContextFull,
                  fmt::format("the saved session has {} tokens, the new one takes at most {}",
                              header.n_tokens, max_tokens));

  FATHOM_TRY_ASSIGN(Session session, Session::create(model, options));
  const int64_t reserved = session.cache().capacity_tokens();
  SessionState& s = session.state();
  s.cache.truncate(0);  // pages come in the types that the file says
  FATHOM_TRY(read_tokens(s, source, header.n_tokens));
  if (header.has_logits) {
    const std::span<float> logits(s.logits, static_cast<size_t>(header.vocab_size));
    FATHOM_TRY(source.take(std::as_writable_bytes(logits), "logits"));
    FATHOM_TRY(source.end_section("logits"));
  }
  FATHOM_TRY(read_pages(s, source, header));
  FATHOM_TRY(source.finish());
  s.n_tokens = header.n_tokens;
  s.timeline().tokens(s.n_tokens);
  s.timeline().mark("restore", "", s.n_tokens, 0);
  s.has_logits = header.has_logits;
  // Room to come is no reason to rewrite pages now.
  FATHOM_TRY(s.restore_room(std::max(reserved, header.n_tokens), header.n_tokens));
  return session;
}

}  // namespace run

Status Session::save(const std::string& path, const RunOptions& options) const {
  return run::guarded([&]() -> Status {
    if (state_->lost) return state_->lost_error();
    FATHOM_TRY(state_->bring_logits());
    io::FileCalls calls;
    return run::save_session(*state_, path, options, calls);
  });
}

Status Session::save_to(const WriteFunction& write, const RunOptions& options) const {
  if (state_->lost) return state_->lost_error();
  return run::guarded([&]() -> Status {
    FATHOM_TRY(state_->bring_logits());
    return run::write_session(*state_, write, options);
  });
}

Result<Session> Session::restore(const Model& model, const std::string& path,
                                 const SessionOptions& options, const RunOptions& run) {
  return run::guarded([&]() -> Result<Session> {
    FATHOM_TRY_ASSIGN(const auto file, io::open_file(path));
    const ReadFunction read = [&](int64_t offset, std::span<std::byte> out) {
      return file->read(offset, out);
    };
    Result<Session> session =
        run::read_session(model, read, file->size(), options, run, run::Checksums::kVerified);
    if (!session.ok()) return std::move(session).status().in(path);
    return session;
  });
}

Result<Session> Session::restore_from(const Model& model, const ReadFunction& read,
                                      int64_t size_bytes, const SessionOptions& options,
                                      const RunOptions& run) {
  return run::guarded([&] {
    return run::read_session(model, read, size_bytes, options, run, run::Checksums::kVerified);
  });
}

}  // namespace fathom
