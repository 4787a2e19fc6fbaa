// fathom simulate: the whole of a generation on a described machine - every page, every byte and
// every second of it - without the machine, the weights or the arithmetic.
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "loading.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

struct SimulateArgs {
  std::string model, machine, timeline;
  int64_t n_prompt = 512, n_predict = 16384;
  ConfigFlags config;
  OutputFlags output;
};

struct Measured {
  fathom::MemorySnapshot loaded, prefilled, decoded;  // peaks of each phase
  fathom::SessionTimes times;
  fathom::ExpertCacheStats copies;
  double first_step_s = 0, last_step_s = 0;
  int64_t n_tokens = 0;
  std::string stopped;  // empty: all tokens were generated
  double wall_s = 0;
};

Measured simulate(fathom::Engine& engine, const fathom::Model& model, const SimulateArgs& args) {
  Measured m;
  const double start = now_seconds();
  m.loaded = engine.memory();
  engine.reset_peaks();
  fathom::Session session = must(fathom::Session::create(model));
  const std::vector<int32_t> prompt(static_cast<size_t>(args.n_prompt), 0);
  must(prefill(session, prompt, 0, /*bar_from=*/SIZE_MAX));
  m.prefilled = engine.memory();
  engine.reset_peaks();

  Progress bar("simulate", Progress::Unit::kTokens);
  for (int64_t i = 0; i < args.n_predict; ++i) {
    const double before = engine.seconds();
    if (cancel_token().requested()) fail(kExitInterrupted, "interrupted");
    if (const fathom::Status status = session.step(0); !status.ok()) {
      m.stopped = fmt::format("stopped at {} tokens: {}", with_commas(session.n_tokens()),
                              status.message());
      break;
    }
    m.last_step_s = engine.seconds() - before;
    if (i == 0) m.first_step_s = m.last_step_s;
    bar.update(i + 1, args.n_predict);
  }
  end_progress_line();
  m.decoded = engine.memory();
  m.times = session.times();
  m.copies = model.expert_cache();
  m.n_tokens = session.n_tokens();
  m.wall_s = now_seconds() - start;
  return m;
}

const fathom::MemorySnapshot& phase_of(const Measured& m, fathom::Phase phase) {
  return phase == fathom::Phase::kLoad      ? m.loaded
         : phase == fathom::Phase::kPrefill ? m.prefilled
                                            : m.decoded;
}

Json report_json(const fathom::Engine& engine, const fathom::Plan& plan, const Measured& m) {
  Json devices = Json::array();
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    const fathom::PlanDevice& planned = plan.devices[d];
    Json phases = Json::object();
    int64_t peak = 0;
    for (int p = 0; p < fathom::kPhaseCount; ++p) {
      const auto phase = static_cast<fathom::Phase>(p);
      const fathom::DeviceMemory& used = phase_of(m, phase).devices[d];
      peak = std::max(peak, used.bytes_peak);
      Json purposes = Json::object();
      for (int q = 0; q < fathom::kPurposeCount; ++q) {
        const auto purpose = static_cast<fathom::Purpose>(q);
        purposes[std::string(fathom::purpose_name(purpose))] =
            phase_of(m, phase).item(static_cast<int>(d), purpose).bytes_peak;
      }
      phases[std::string(fathom::phase_name(phase))] = {{"planned_bytes", planned.total(phase)},
                                                        {"peak_bytes", used.bytes_peak},
                                                        {"purposes", purposes}};
    }
    devices.push_back({{"name", planned.name},
                       {"budget_bytes", planned.budget_bytes},
                       {"planned_peak_bytes", planned.peak_bytes()},
                       {"peak_bytes", peak},
                       {"busy_seconds", engine.busy_seconds(static_cast<int>(d))},
                       {"phases", phases}});
  }
  return {{"tokens", m.n_tokens},
          {"prompt_tokens", m.times.prefill_tokens},
          {"new_tokens", m.times.decode_tokens},
          {"stopped", m.stopped},
          {"rates", std::string(fathom::rate_source_name(plan.speed.source))},
          {"prefill_seconds", m.times.prefill_seconds},
          {"decode_seconds", m.times.decode_seconds},
          {"prefill_tokens_per_s", rate(m.times.prefill_tokens, m.times.prefill_seconds)},
          {"decode_tokens_per_s", rate(m.times.decode_tokens, m.times.decode_seconds)},
          {"decode_first_tokens_per_s", rate(1, m.first_step_s)},
          {"decode_last_tokens_per_s", rate(1, m.last_step_s)},
          {"expert_cache",
           {{"experts", m.copies.n_experts},
            {"choices", m.copies.choices},
            {"hits", m.copies.hits},
            {"copied", m.copies.copied},
            {"dropped", m.copies.dropped}}},
          {"wall_seconds", m.wall_s},
          {"devices", devices}};
}

std::string report_text(const fathom::Engine& engine, const fathom::Plan& plan, const Measured& m) {
  std::string text = fmt::format("{:<8} {:<8} {:>20} {:>20} {:>20}  {}\n", "device", "phase",
                                 "planned bytes", "peak bytes", "budget", "used");
  for (size_t d = 0; d < plan.devices.size(); ++d)
    for (int p = 0; p < fathom::kPhaseCount; ++p) {
      const auto phase = static_cast<fathom::Phase>(p);
      const fathom::PlanDevice& planned = plan.devices[d];
      const fathom::DeviceMemory& used = phase_of(m, phase).devices[d];
      text += fmt::format("{:<8} {:<8} {:>20} {:>20} {:>20}  {:.1f} %\n", planned.name,
                          fathom::phase_name(phase), with_commas(planned.total(phase)),
                          with_commas(used.bytes_peak), with_commas(used.budget_bytes),
                          100.0 * static_cast<double>(used.bytes_peak) /
                              static_cast<double>(std::max<int64_t>(used.budget_bytes, 1)));
    }
  const fathom::SessionTimes& t = m.times;
  text += fmt::format(
      "{} tokens in the session; by {} rates: prefill {:.4g} tokens/s, decode {:.4g} tokens/s "
      "({:.4g} "
      "at first, {:.4g} at last), {} in all\n",
      with_commas(m.n_tokens), fathom::rate_source_name(plan.speed.source),
      rate(t.prefill_tokens, t.prefill_seconds), rate(t.decode_tokens, t.decode_seconds),
      rate(1, m.first_step_s), rate(1, m.last_step_s),
      human_seconds(t.prefill_seconds + t.decode_seconds));
  if (const fathom::ExpertCacheStats& c = m.copies; c.choices > 0)
    text += fmt::format(
        "copies of experts: {} made, {} given back, {} at the end; {:.1f} % of the experts chosen "
        "were found among them\n",
        with_commas(c.copied), with_commas(c.dropped), with_commas(c.n_experts),
        100.0 * static_cast<double>(c.hits) / static_cast<double>(c.choices));
  for (size_t d = 0; d < plan.devices.size(); ++d)
    text += fmt::format("{:<8} worked {:.0f} % of the time\n", plan.devices[d].name,
                        100 * engine.busy_seconds(static_cast<int>(d)) / engine.seconds());
  if (!m.stopped.empty()) text += m.stopped + "\n";
  return text + fmt::format("simulated in {:.1f} s\n", m.wall_s);
}

int run(const SimulateArgs& args) {
  apply(args.output);
  TimelineFile timeline(args.timeline);
  fathom::Config config = make_config(args.config);
  // The run is what must fit, unless something else was asked for.
  if (!config.context_max) config.context_max = args.n_prompt + args.n_predict;
  fathom::Engine engine = make_engine(config, args.machine);
  timeline.start(engine);
  const fathom::Plan plan = make_plan(engine, args.model, config, args.config);
  for (const std::string& remark : plan.remarks) detail(remark);
  if (!plan.feasible) {
    if (args.output.json)
      put_json(Json::parse(plan.to_json()));
    else
      put(plan.describe() + "\n");
    return kExitInfeasible;
  }
  detail(plan.describe());
  const fathom::Model model = must(fathom::Model::load(engine, plan));
  const Measured measured = simulate(engine, model, args);
  if (args.output.json)
    put_json(report_json(engine, plan, measured));
  else
    put(report_text(engine, plan, measured));
  timeline.finish();
  return measured.stopped.empty() ? kExitOk : kExitMemory;
}

}  // namespace

void add_simulate(CLI::App& app, Action& action) {
  auto args = std::make_shared<SimulateArgs>();
  CLI::App* command = app.add_subcommand(
      "simulate",
      "Run a generation on a described machine, without it: planned and used memory, predicted "
      "rates");
  add_model_flag(*command, args->model);
  add_machine_flag(*command, args->machine);
  command->get_option("--machine")->required();
  command->add_option("-n,--predict", args->n_predict, "tokens to generate")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30));
  command->add_option("-p,--prompt-tokens", args->n_prompt, "tokens of the prompt")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  add_timeline_flag(*command, args->timeline);
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
