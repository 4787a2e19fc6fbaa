#!/usr/bin/env python3
"""What the CUDA backend must show on a machine with a GPU: every claim a step of its own with its
own time, all together in under ten minutes.  A step that fails does not end the run; the last thing
printed is a table with a line for each step and each figure.  `cmake/dev test cuda` runs it.

    gpu_checks.py --build build                   on a GPU, through build/lib/libfathom_cuda.so
    gpu_checks.py --build build --emulated        the same steps, tiny, over the emulated plug-in:
                                                  proves the script and the programs, not a speed
    gpu_checks.py --build build --only racecheck  some steps; --list names them

Standard library alone.  Exit codes: 0 all passed, 1 some did not, 2 usage.
"""
import argparse
import datetime
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

TOTAL_S = 580  # of the ten minutes, what steps may take together
CONTEXT, NEW = 163_840, 16_384

PASS, FAIL, SKIPPED = "PASS", "FAIL", "NOT RUN"


@dataclass
class Step:
    name: str
    seconds: int                  # at most
    command: list                 # argv; "{seconds}" is what the step may take
    env: dict = field(default_factory=dict)
    grows: bool = False           # may also take what the steps before it left over
    background: bool = False      # starts with the run; its turn only waits for it
    needs: str = ""               # a step that must have passed


@dataclass
class Outcome:
    result: str
    seconds: float
    figure: str
    records: list                 # (name, figure, verdict) of the lines that begin with "@"


def records_of(text):
    """The lines "@ name | figure | verdict" (tests/bench/cuda/report.h)."""
    found = []
    for line in text.splitlines():
        if line.startswith("@ "):
            parts = [part.strip() for part in line[2:].split(" | ")]
            if len(parts) == 3:
                found.append(tuple(parts))
    return found


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip(" =-~.")]
    return lines[-1] if lines else "no output"


class Running:
    """A started step: its output goes to a file, its whole process group can be ended."""

    def __init__(self, step, seconds, folder):
        self.log = pathlib.Path(folder) / (step.name.replace(" ", "-").replace("/", "-") + ".log")
        self.start = time.monotonic()
        self.seconds = seconds
        self.error = ""
        self.process = None
        command = [str(part).replace("{seconds}", str(max(1, int(seconds) - 5)))
                   for part in step.command]
        try:
            with open(self.log, "wb") as out:
                self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT,
                                                stdin=subprocess.DEVNULL, start_new_session=True,
                                                env={**os.environ, **step.env})
        except OSError as error:
            self.error = f"{command[0]}: {error.strerror}"

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def finish(self, seconds):
        """Waits for at most so long."""
        if self.process is None:
            return Outcome(FAIL, 0, self.error, [])
        timed_out = False
        try:
            code = self.process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            timed_out = True
            self.kill()
            code = -1
        text = self.log.read_text("utf-8", "replace")
        records = records_of(text)
        failed = [name for name, _, verdict in records if verdict == FAIL]
        if timed_out:
            figure = f"not finished in {seconds:.0f} s"
        elif code != 0 and not failed:
            figure = f"exit code {code}: {last_line(text)}"
        elif failed:
            figure = f"{len(failed)} of {len(records)} figures missed: {', '.join(failed[:3])}"
            figure += ", ..." if len(failed) > 3 else ""
        elif records:
            figure = f"{len(records)} figures"
        else:
            figure = last_line(text)
        result = PASS if code == 0 and not failed else FAIL
        return Outcome(result, time.monotonic() - self.start, figure, records)


def run_steps(steps, total_seconds, folder, say=print):
    """Runs the steps in order; returns {name: Outcome}.  Never raises for what a step does."""
    began = time.monotonic()
    outcomes = {}
    waiting = {step.name: Running(step, step.seconds, folder) for step in steps if step.background}
    for at, step in enumerate(steps):
        left = total_seconds - (time.monotonic() - began)
        if step.needs and outcomes.get(step.needs, Outcome(SKIPPED, 0, "", [])).result != PASS:
            outcomes[step.name] = Outcome(SKIPPED, 0, f"needs \"{step.needs}\"", [])
            if step.name in waiting:
                waiting[step.name].kill()
        elif left < 1:
            outcomes[step.name] = Outcome(SKIPPED, 0, "the time of all steps is used up", [])
            if step.name in waiting and waiting[step.name].process is not None:
                waiting[step.name].kill()
        else:
            spare = left - sum(later.seconds for later in steps[at:])
            seconds = min(left, step.seconds + (max(0, spare) if step.grows else 0))
            say(f"== {step.name} (at most {seconds:.0f} s)")
            running = waiting.get(step.name) or Running(step, seconds, folder)
            outcomes[step.name] = running.finish(seconds)
        outcome = outcomes[step.name]
        say(f"   {outcome.result}  {outcome.seconds:.1f} s  {outcome.figure}")
        for name, figure, verdict in outcome.records:
            say(f"      {verdict:4}  {name}: {figure}")
    return outcomes


def table(steps, outcomes, seconds):
    lines = ["", "| step | result | seconds | figure |", "|---|---|---|---|"]
    for step in steps:
        o = outcomes[step.name]
        lines.append(f"| **{step.name}** | {o.result} | {o.seconds:.1f} | {o.figure} |")
        lines += [f"| {name} | {verdict} | | {figure} |" for name, figure, verdict in o.records]
    failed = [step.name for step in steps if outcomes[step.name].result != PASS]
    lines.append("")
    lines.append(f"{len(steps) - len(failed)} of {len(steps)} steps passed in {seconds:.0f} s"
                 + (f"; not passed: {', '.join(failed)}" if failed else ""))
    return "\n".join(lines)


def find_sanitizer():
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def make_steps(build, plugin, models, emulated, trace):
    """The steps; emulated ones have the same commands with small numbers."""
    tests, tiny = build / "tests", ["--tiny"] if emulated else []
    bench = tests / ("cuda_bench_emulated" if emulated else "cuda_bench")
    real = {} if emulated else {"FATHOM_TEST_CUDA_PLUGIN": str(plugin)}
    # Operands as small as those of the emulation: the sanitizers are slow as well.
    small = {**real, "FATHOM_TEST_CUDA_SMALL": "1"}
    shape = "tiny-v2-lite" if emulated else "v2-lite"
    q8, q4 = models / "v2-lite.Q8_0.gguf", models / "v2-lite.Q4_K_M.gguf"
    context, new = (128, 16) if emulated else (CONTEXT, NEW)
    on_gpu = [f"cuda.plugin={plugin}", "devices=cuda:0,cpu", "placement.layers=cuda:0=*",
              "placement.experts=cuda:0=*"]
    if emulated:
        on_gpu += ["prefill.chunk=32", "kv.page_tokens=64", "budget.cuda:0=1G", "budget.cpu=1G"]

    def sanitizer(tool):
        if emulated:  # the compiler's sanitizers run the same kernels; here only the step is tried
            return [tests / "cuda_device_test", "device memory*"]
        return [find_sanitizer(), "--tool", tool, "--error-exitcode", "9",
                tests / "cuda_device_test"]

    def long_run(model, *settings):
        return [tests / "cuda_long_run", model, context, new, "{seconds}", *on_gpu, *settings]

    def write(kind, path):
        return [build / "bin" / "make_model", "--shape", shape, "--type", kind, "--out", path]

    # What is left of 12 GB beside the weights holds the text in 4 bits.  The emulation's model is
    # small: it gets less than its pages in 16 bits want.
    ladder = ["kv.ladder=chunk,requantise", "kv.ladder_type=q4_0",
              *(["short=200000"] if emulated else ["budget.cuda:0=12G", "short=0"])]
    steps = [
        Step("kernels against scalar", 37, [tests / "cuda_device_test"], real),
        Step("golden models and greedy texts", 43,
             [tests / "cuda_plugin_test", "[golden]"], real),
        Step("copies of experts on the card", 10,
             [tests / "cuda_copies_plugin_test", "~[slow]" if emulated else "*"], real),
        Step("planned bytes equal the ledger", 10,
             [tests / "cuda_plugin_test", "planned bytes*"], real),
        Step("failure at every device allocation", 30,
             [tests / "cuda_plugin_test", "[allocation]"], real),
        Step("memcheck", 45, sanitizer("memcheck"), small),
        Step("racecheck", 45, sanitizer("racecheck"), small),
        # Begun with the first step; done before anything is timed.
        Step("write Q8_0 model", 20, write("Q8_0", q8), background=True),
        Step("write Q4_K model", 20, write("Q4_K_M", q4), background=True),
        Step("GEMV against a copy", 15, [bench, plugin, "gemv", *tiny]),
        Step("GEMM against cuBLASLt", 15, [bench, plugin, "gemm", *tiny]),
        Step("MLA decode attention", 40, [bench, plugin, "attention", *tiny]),
        Step("hybrid, experts on the CPU", 30,
             [tests / "cuda_hybrid", q4, plugin, tests / "plugins" / "traced.so",
              4 if emulated else 32, trace, *(on_gpu[4:])], needs="write Q4_K model"),
        Step("Q8_0 to 163,840 + 16,384 tokens", 110, long_run(q8), grows=True,
             needs="write Q8_0 model"),
        Step("Q4_K under 12 GB by the ladder", 110, long_run(q4, *ladder), grows=True,
             needs="write Q4_K model"),
    ]
    for step in steps:
        step.seconds *= EMULATED_SLOWER if emulated else 1
    return steps


EMULATED_SLOWER = 4  # CI's machines are slow and busy


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--plugin", type=pathlib.Path)
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--models", type=pathlib.Path, help="where the models are written and kept")
    parser.add_argument("--report", type=pathlib.Path)
    parser.add_argument("--seconds", type=int, help="of all steps together")
    a = parser.parse_args(arguments)
    seconds = a.seconds or TOTAL_S * (EMULATED_SLOWER if a.emulated else 1)
    build = a.build.resolve()
    plugin = (a.plugin or build / ("tests/plugins/emulated.so" if a.emulated else
                                   "lib/libfathom_cuda.so")).resolve()
    report = a.report or build / ("cuda-report-emulated.md" if a.emulated else "cuda-report.md")
    with tempfile.TemporaryDirectory(prefix="fathom-gpu-") as folder:
        models = a.models or pathlib.Path(folder)
        steps = make_steps(build, plugin, models, a.emulated, report.with_suffix(".trace.json"))
        if a.only:
            words = [word.lower() for word in a.only]
            chosen = [s for s in steps if any(word in s.name.lower() for word in words)]
            needed = {s.needs for s in chosen}
            steps = [s for s in steps if s in chosen or s.name in needed]
        if a.list:
            print("\n".join(f"{s.seconds:4} s  {s.name}" for s in steps))
            return 0
        if not steps:
            parser.error("no step has that name")
        began = time.monotonic()
        outcomes = run_steps(steps, seconds, folder)
        text = table(steps, outcomes, time.monotonic() - began)
    head = [f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, {plugin.name}"
            + (", EMULATED: figures say nothing about a GPU" if a.emulated else ""),
            *gpu_lines(a.emulated)]
    report.write_text("\n".join(head) + "\n" + text + "\n")
    print(text)
    print(f"report: {report}")
    return 0 if all(o.result == PASS for o in outcomes.values()) else 1


def gpu_lines(emulated):
    if emulated:
        return []
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total",
                               "--format=csv,noheader"], capture_output=True, text=True,
                              timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return ["nvidia-smi did not answer"]


if __name__ == "__main__":
    sys.exit(main())
