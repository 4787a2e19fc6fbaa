#!/usr/bin/env python3
"""End-to-end cases on generated models: runs `fathom bench` on each and appends one table to
RESULTS.md; ends with 1 when one failed.  Run by `cmake/dev bench`; by hand:

    tests/bench/cases.py --bin build-bench/bin [--only v2-lite] [--models DIR] [--results FILE]

Models are made by make_model with true shapes and fewer layers, in DIR (default: a temporary
folder), and kept there when --models is given, for other programs to read.  A case that does not
fit the machine's free memory is left out, with a line that says so.
"""
import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# name, shape, type, layers, bench arguments
CASES = [
    ("V2-Lite, 6 layers, Q4_K_M", "v2-lite", "Q4_K_M", 6,
     ["-p", "512,1024", "-d", "0,4096,16384", "-n", "16", "--batch", "1,2,4,8", "--set", "prefill.chunk=1024"]),
    ("V2-Lite, 6 layers, Q4_K_M, q8_0 cache", "v2-lite", "Q4_K_M", 6,
     ["-p", "512", "-d", "16384", "-n", "16", "--kv-type", "q8_0"]),
    ("V2-Lite, 6 layers, Q4_K_M, AVX2", "v2-lite", "Q4_K_M", 6,
     ["-p", "512", "-d", "0,4096", "-n", "16", "--isa", "avx2"]),
    ("V2-Lite, 3 layers, Q8_0", "v2-lite", "Q8_0", 3, ["-p", "512", "-d", "0,4096", "-n", "16"]),
    ("V3 slice (128 heads, 256 experts top-8), 4 layers, Q4_K_M", "v3", "Q4_K_M", 4,
     ["-p", "512", "-d", "0,4096", "-n", "8", "--batch", "1,4"]),
]


def free_bytes():
    for line in open("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def model_file(args, folder, shape, dtype, layers):
    path = folder / f"{shape}.{dtype}.{layers}.gguf"
    if not path.exists():
        subprocess.run([args.bin / "make_model", "--shape", shape, "--type", dtype, "--layers", str(layers),
                        "--out", path], check=True, stdout=sys.stderr)
    return path


def row_without_figures(name, why):
    return f"| {name} | {why} |" + " |" * 7 + "\n"


def run_case(args, folder, name, shape, dtype, layers, flags):
    path = model_file(args, folder, shape, dtype, layers)
    if path.stat().st_size * 1.2 > free_bytes():
        return row_without_figures(name, f"left out: {path.stat().st_size / 1e9:.1f} GB do not fit the free memory")
    command = [args.bin / "fathom", "bench", "-m", path, "-r", str(args.repeat), "--json", "-q", *flags]
    print("running", *command, file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode != 0:
        args.failed.append(name)
        return row_without_figures(name, f"failed with code {done.returncode}")
    r = json.loads(done.stdout)
    read, peak = r["read_bandwidth"]["bytes_per_second"] / 1e9, r["f32_peak_gflops"]
    text = ""
    for row in r["results"]:
        what = f"{row['kind']} {row.get('sessions', 1)}x{row['tokens']}" if row["kind"] == "batch" \
            else f"{row['kind']} {row['tokens']}"
        text += (f"| {name} | {what} | {row['depth']:,} | {row['tps']:.1f} | {row['gflops']:.0f} | "
                 f"{100 * (row['f32_peak_share'] or 0):.0f} % of {peak:.0f} | {row['bytes_per_second'] / 1e9:.1f} | "
                 f"{100 * (row['bandwidth_share'] or 0):.0f} % of {read:.1f} | {100 * row['busy']:.0f} % |\n")
        name = ""
    return text


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=here.parent.parent / "build-bench/bin")
    parser.add_argument("--models", type=pathlib.Path)
    parser.add_argument("--results", type=pathlib.Path, default=here / "RESULTS.md")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in case[0]]
    if not cases:
        parser.error(f"no case has {args.only!r} in its name: " + "; ".join(case[0] for case in CASES))
    args.failed = []
    if not args.results.exists():  # before the runs, not after them
        args.results.write_text("# Results\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.models or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = "".join(run_case(args, folder, *case) for case in cases)
    load = os.getloadavg()[0]
    table = (f"\n## {datetime.date.today()}, {processor()}, {os.cpu_count()} processors, load {load:.1f}: cases of "
             f"`tests/bench/cases.py`\n\n"
             f"Best of {args.repeat}; \"busy\" is the processor time had, of all threads: below 90 % others used the\n"
             "machine, and peak and read loop, measured before each case, may be short of what a core has.  GFLOP/s\n"
             "count the products with active weights; the peak is that of f32 multiply-adds.\n\n"
             "| model | what | depth | tok/s | GFLOP/s | share | GB/s | share of the read loop | busy |\n"
             "|---|---|---|---|---|---|---|---|---|\n" + rows)
    print(table)
    old = args.results.read_text()
    first = old.find("\n## ")
    args.results.write_text(old[:first] + table + old[first:] if first >= 0 else old + table)
    if args.failed:
        sys.exit("failed: " + "; ".join(args.failed))


if __name__ == "__main__":
    main()
