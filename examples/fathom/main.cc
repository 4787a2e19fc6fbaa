// fathom: the command line, an example program on the public headers of the library alone.  One
// file per sub-command; what they share is in options (flags), loading (plan and load with
// progress), terminal (what goes to stderr) and exit (codes).
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "commands.h"
#include "exit.h"
#include "fathom/version.hpp"
#include "signals.h"

namespace {

// CLI11 knows one-letter short flags only; -ngl is what users of llama.cpp type.
std::vector<std::string> arguments(int argc, char** argv) {
  std::vector<std::string> reversed;  // the order in which CLI11 wants them
  for (int i = argc - 1; i > 0; --i) {
    std::string text = argv[i];
    if (text == "-ngl") text = "--ngl";
    reversed.push_back(std::move(text));
  }
  return reversed;
}

int run(int argc, char** argv) {
  CLI::App app("DeepSeek models with every byte planned.", "fathom");
  app.set_version_flag("--version", std::string("fathom ") + std::string(fathom::version()));
  app.require_subcommand(1);
  app.footer(std::string("fathom COMMAND --help tells the flags of each; every flag can be set as "
                         "FATHOM_ARG_<NAME>.\n") +
             cli::kExitCodeHelp);
  cli::Action action;
  cli::add_run(app, action);
  cli::add_plan(app, action);
  cli::add_simulate(app, action);
  cli::add_inspect(app, action);
  cli::add_eval(app, action);
  cli::add_tokenize(app, action);
  cli::add_detokenize(app, action);
  cli::add_perplexity(app, action);
  cli::add_retrieval(app, action);
  cli::add_bench(app, action);
  cli::add_tune(app, action);
  cli::add_config(app, action);
  cli::add_devices(app, action);
  cli::add_demo(app, action);
  cli::add_version(app, action);
  for (CLI::App* command : app.get_subcommands({})) {
    cli::name_environment(*command);
    command->footer(cli::kExitCodeHelp);
  }
  try {
    app.parse(arguments(argc, argv));
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? cli::kExitOk : cli::kExitUsage;
  }
  return action();
}

}  // namespace

int main(int argc, char** argv) {
  cli::install_signal_handlers();
  try {
    return run(argc, argv);
  } catch (const cli::Exit& exit) {
    return exit.code;
  } catch (const std::bad_alloc&) {
    std::fputs("fathom: out of memory\n", stderr);
    return cli::kExitMemory;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fathom: %s\n", error.what());
    return cli::kExitInternal;
  }
}
