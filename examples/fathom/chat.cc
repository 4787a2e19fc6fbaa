// The chat of `fathom run` without a prompt.
#include <unistd.h>
#include <cerrno>
#include <cstdio>
#include <optional>

#include <fmt/format.h>

#include "exit.h"
#include "run.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

// Lines of standard input.  Not std::getline: a signal at the prompt must end the wait.
class LineReader {
 public:
  // Nothing at the end of the input or after a signal.
  std::optional<std::string> next() {
    for (;;) {
      if (const size_t newline = buffer_.find('\n'); newline != std::string::npos) {
        std::string line = buffer_.substr(0, newline);
        buffer_.erase(0, newline + 1);
        if (!line.empty() && line.back() == '\r') line.pop_back();
        return line;
      }
      char piece[4096];
      const ssize_t n = ::read(STDIN_FILENO, piece, sizeof piece);
      if (n > 0) {
        buffer_.append(piece, static_cast<size_t>(n));
        continue;
      }
      if (n < 0 && errno == EINTR && signal_exit_code() == 0) continue;
      if (buffer_.empty() || n < 0) return std::nullopt;
      return std::exchange(buffer_, {});
    }
  }

 private:
  std::string buffer_;
};

const char* const kChatHelp =
    "/memory  what is held, per purpose\n"
    "/reset   begin a new conversation\n"
    "/quit    end (also end of input)";

class Chat {
 public:
  Chat(const RunArgs& args, Loaded& loaded)
      : args_(args), loaded_(loaded), session_(must(fathom::Session::create(loaded.model))) {}

  int loop() {
    const bool prompts = isatty(STDIN_FILENO) == 1 && verbosity() != Verbosity::kQuiet;
    if (prompts) note("A chat.  /help tells the commands; ^C stops an answer.");
    for (LineReader lines;;) {
      if (prompts) std::fputs("> ", stderr);
      const std::optional<std::string> line = lines.next();
      if (!line) {
        if (prompts) std::fputc('\n', stderr);
        break;
      }
      if (line->empty()) continue;
      if (line->front() == '/') {
        if (*line == "/quit") break;
        command(*line);
        continue;
      }
      turn(*line);
      if (signal_exit_code() == kExitTerminated) break;
      forget_interrupt();
    }
    save_state(session_, args_.save_state);
    print_statistics(loaded_, session_);
    return signal_exit_code();
  }

 private:
  void command(const std::string& line) {
    if (line == "/memory") {
      note(memory_table(loaded_.engine));
      note(fmt::format("context: {} of {} tokens, {} of cache", with_commas(session_.n_tokens()),
                       with_commas(session_.max_tokens()),
                       human_bytes(session_.cache().size_bytes())));
      for (const fathom::BudgetForecast& budget : session_.forecast().budgets)
        note("budget " + budget.text);
    } else if (line == "/reset") {
      messages_.clear();
      must(session_.truncate(0));
    } else if (line == "/help") {
      note(kChatHelp);
    } else {
      note(fmt::format("{}: no such command\n{}", line, kChatHelp));
    }
  }

  // Brings the session to the tokens of the whole conversation; what it already holds of them is
  // kept.  The last token is always computed anew, since its logits are needed.
  fathom::Status feed() {
    const fathom::Tokenizer& tokenizer = *loaded_.model.tokenizer();
    FATHOM_TRY_ASSIGN(const std::string text,
                      tokenizer.render_chat(messages_, true, chat_format(args_.chat)));
    std::vector<int32_t> ids;
    FATHOM_TRY(tokenizer.encode(text, {}, ids));
    const std::span<const int32_t> held = session_.tokens();
    size_t common = 0;
    while (common < held.size() && common + 1 < ids.size() && held[common] == ids[common]) ++common;
    FATHOM_TRY(session_.truncate(static_cast<int64_t>(common)));
    detail(fmt::format("kept {} tokens, prefilling {}", common, ids.size() - common));
    constexpr size_t kLong = 512;  // turns below it are read at once: a bar would only flicker
    return prefill(session_, std::span(ids).subspan(common), 0, kLong);
  }

  void turn(const std::string& line) {
    messages_.push_back({"user", line});
    if (fathom::Status status = feed(); !status.ok()) {
      note(fmt::format("fathom: {}", status.message()));
      if (status.code() == fathom::Code::kContextFull) note("/reset begins a new conversation");
      messages_.pop_back();
      return;
    }
    bool stdout_failed = false;
    fathom::Result<fathom::GenerateResult> result =
        stream_answer(session_, args_, now_seconds(), stdout_failed);
    if (stdout_failed) fail(kExitIo, "cannot write to standard output");
    put("\n");
    if (!result.ok()) fail(result.status());
    if (!result->status.ok()) note(result->status.message());
    // The template puts a space after "Assistant:", which the model has written itself.
    const size_t text_begin = result->text.find_first_not_of(' ');
    messages_.push_back(
        {"assistant", text_begin == std::string::npos ? "" : result->text.substr(text_begin)});
  }

  const RunArgs& args_;
  Loaded& loaded_;
  fathom::Session session_;
  std::vector<fathom::ChatMessage> messages_;
};

}  // namespace

int run_chat(const RunArgs& args, Loaded& loaded) {
  const fathom::Tokenizer* tokenizer = loaded.model.tokenizer();
  if (tokenizer == nullptr)
    fail(kExitBadModel, "the model has no tokenizer: give the prompt as ids, with --tokens");
  if (tokenizer->chat_format() == fathom::ChatFormat::kNone && args.chat.format.empty())
    fail(kExitUsage, "the model's chat form is not known: give a prompt (-p) or --chat-format");
  return Chat(args, loaded).loop();
}

}  // namespace cli
