// fathom tokenize and fathom detokenize: text to token ids and back, without loading a model.
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "fathom/tokenizer.hpp"
#include "input.h"
#include "loading.h"
#include "terminal.h"

namespace cli {
namespace {

struct TokenizeArgs {
  std::string vocab;
  PromptFlags prompt;
  ChatFlags chat;
  OutputFlags output;
  bool bos = false, no_special = false, no_generation_prompt = false;
};

struct DetokenizeArgs {
  std::string vocab, tokens;
  OutputFlags output;
  bool skip_special = false;
};

void add_vocab_flag(CLI::App& app, std::string& vocab) {
  app.add_option("-m,--model,--vocab", vocab,
                 "a .gguf file (vocabulary alone is enough), a tokenizer.json or its folder")
      ->required();
}

int tokenize(const TokenizeArgs& args) {
  apply(args.output);
  const fathom::Tokenizer tokenizer = must(fathom::Tokenizer::open(args.vocab));
  std::string text =
      args.prompt.has_prompt
          ? args.prompt.prompt
          : read_text(args.prompt.file.empty() ? std::string("-") : args.prompt.file);
  if (args.chat.chat)
    text = must(tokenizer.render_chat(parse_conversation(text), !args.no_generation_prompt,
                                      chat_format(args.chat)));
  std::vector<int32_t> tokens;
  must(tokenizer.encode(text, {.add_bos = args.bos, .parse_special = !args.no_special}, tokens));
  if (args.output.json) {
    Json json = {{"tokens", tokens}};
    if (args.chat.chat) json["prompt"] = text;
    put(json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
    return kExitOk;
  }
  // One line that --tokens reads again.
  put(fmt::format("[{}]\n", fmt::join(tokens, ", ")));
  for (int32_t id : tokens)
    detail(fmt::format("{:>7}  {}", id,
                       Json(std::string(tokenizer.token_bytes(id)))
                           .dump(-1, ' ', false, Json::error_handler_t::replace)));
  return kExitOk;
}

int detokenize(const DetokenizeArgs& args) {
  apply(args.output);
  const fathom::Tokenizer tokenizer = must(fathom::Tokenizer::open(args.vocab));
  const std::vector<int32_t> tokens = read_tokens(args.tokens);
  std::string text;
  must(tokenizer.decode(tokens, args.skip_special, text));
  if (args.output.json)
    put_json({{"text", text}});
  else
    put(text);
  return kExitOk;
}

}  // namespace

void add_tokenize(CLI::App& app, Action& action) {
  auto args = std::make_shared<TokenizeArgs>();
  CLI::App* command = app.add_subcommand("tokenize", "Text to token ids");
  add_vocab_flag(*command, args->vocab);
  CLI::Option* prompt = command->add_option_function<std::string>(
      "-p,--prompt",
      [args](const std::string& text) {
        args->prompt.prompt = text;
        args->prompt.has_prompt = true;
      },
      "the text");
  command->add_option("-f,--file", args->prompt.file, "a file with the text; default -: stdin")
      ->excludes(prompt);
  add_chat_flags(*command, args->chat);
  command->add_flag("--no-generation-prompt", args->no_generation_prompt,
                    "with --chat: end after the last message");
  command->add_flag("--bos", args->bos, "begin with the beginning-of-sentence token");
  command->add_flag("--no-special", args->no_special,
                    "special tokens in the text are text, not tokens");
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return tokenize(*args); }; });
}

void add_detokenize(CLI::App& app, Action& action) {
  auto args = std::make_shared<DetokenizeArgs>();
  args->tokens = "-";
  CLI::App* command = app.add_subcommand("detokenize", "Token ids to text");
  add_vocab_flag(*command, args->vocab);
  command->add_option("--tokens,-f,--file", args->tokens,
                      "a file with a JSON array of ids; default -: stdin");
  command->add_flag("--skip-special", args->skip_special, "leave special tokens out");
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return detokenize(*args); }; });
}

}  // namespace cli
