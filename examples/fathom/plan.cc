// fathom plan: what a model will need, from its header alone, here or on a described machine.
#include <memory>

#include "commands.h"
#include "exit.h"
#include "loading.h"
#include "terminal.h"

namespace cli {
namespace {

struct PlanArgs {
  std::string model, machine;
  bool measure = false;
  ConfigFlags config;
  OutputFlags output;
};

int run(const PlanArgs& args) {
  apply(args.output);
  const fathom::Config config = make_config(args.config);
  const fathom::Engine engine = args.machine.empty() ? make_engine_with_rates(config, args.measure)
                                                     : make_engine(config, args.machine);
  const fathom::Plan plan = make_plan(engine, args.model, config, args.config);
  if (args.output.json)
    put_json(Json::parse(plan.to_json()));
  else
    put(plan.describe() + "\n");
  for (const std::string& remark : plan.remarks) detail(remark);
  return plan.feasible ? kExitOk : kExitInfeasible;
}

}  // namespace

void add_plan(CLI::App& app, Action& action) {
  auto args = std::make_shared<PlanArgs>();
  CLI::App* command = app.add_subcommand(
      "plan", "Say what a model needs, before a weight is read; exit 3 when it does not fit");
  add_model_flag(*command, args->model);
  add_machine_flag(*command, args->machine);
  command
      ->add_flag("--measure", args->measure,
                 "measure this machine first, two seconds per device; the rates are kept for later")
      ->excludes("--machine");
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
