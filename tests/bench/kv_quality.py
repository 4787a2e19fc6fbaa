#!/usr/bin/env python3
"""What the types of the cache cost in quality: perplexity, KL divergence, retrieval.

Prints the table of tests/bench/RESULTS.md: one row for each type and policy, everything measured
by `fathom perplexity` (with the logits of the f32 cache as --kl-base) and `fathom retrieval`.
TESTDATA is the unpacked golden tree (build/testdata).
"""
import argparse
import json
import pathlib
import struct
import subprocess
import tempfile

WINDOW = 2048


def policy(kv_type, recent=0, first=0, numerics="exact"):
    """Exact arithmetic shows the cache alone: int8 activations would add a noise of their own."""
    settings = {"numerics": numerics, "kv.type": kv_type}
    if recent:
        settings |= {"kv.recent_16bit": recent, "prefill.chunk": recent}
    if first:
        settings["kv.first_16bit"] = first
    return settings


# The first is what the others are compared with.
SETTINGS = {
    "f32": policy("f32"),
    "f16": policy("f16"),
    "bf16": policy("bf16"),
    "fp8": policy("fp8"),
    "q8_0": policy("q8_0"),
    "q4_0": policy("q4_0"),
    "fp8, last 512 in 16 bits": policy("fp8", 512),
    "q8_0, last 512 in 16 bits": policy("q8_0", 512),
    "q4_0, last 512 in 16 bits": policy("q4_0", 512),
    "q4_0, last 512 and first 64 in 16 bits": policy("q4_0", 512, 64),
    "f16 with fast numerics (the default)": policy("f16", numerics="fast"),
}


def heldout_tokens(testdata):
    """The held-out text of the golden, as token ids."""
    data = (pathlib.Path(testdata) / "trained/golden.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    begin, end = json.loads(data[8:8 + length])["ppl.tokens"]["data_offsets"]
    return list(struct.unpack_from(f"<{(end - begin) // 4}i", data, 8 + length + begin))


def first_of_each(path, lengths, per_kind):
    """The first prompts of every kind at each length, as lines."""
    seen, lines = {}, []
    for line in pathlib.Path(path).read_text().splitlines():
        prompt = json.loads(line)
        key = prompt["kind"], len(prompt["tokens"])
        seen[key] = seen.get(key, 0) + 1
        if key[1] in lengths and seen[key] <= per_kind:
            lines.append(line)
    return lines


class Measurement:
    """Runs of one program on one model; files go to `folder`."""

    def __init__(self, program, model, folder, tokens, needles, threads=0):
        self.program, self.model, self.threads = str(program), str(model), threads
        self.folder = pathlib.Path(folder)
        (self.folder / "tokens.json").write_text(json.dumps(tokens))
        (self.folder / "needles.jsonl").write_text("\n".join(needles) + "\n")
        self.has_base = False

    def _run(self, command, settings, *flags):
        flags = [*map(str, flags), "-t", str(self.threads)] if self.threads else [*map(str, flags)]
        for key, value in settings.items():
            flags += ["--set", f"{key}={value}"]
        done = subprocess.run([self.program, command, "-m", self.model, "--json", "-q", *flags],
                              stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    def perplexity(self, settings):
        """The first call keeps its logits; later ones have their divergence from them."""
        base = self.folder / "base.f32"
        extra = ["--kl-base" if self.has_base else "--save-logits", base]
        self.has_base = True
        return self._run("perplexity", settings, "--tokens", self.folder / "tokens.json", "-c", WINDOW,
                         *extra)

    def retrieval(self, settings):
        return self._run("retrieval", settings, "-f", self.folder / "needles.jsonl")


def rows(measurement, names=tuple(SETTINGS)):
    """(name, perplexity result, retrieval result) of each setting, as they are done."""
    for name in names:
        yield name, measurement.perplexity(SETTINGS[name]), measurement.retrieval(SETTINGS[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("testdata")
    parser.add_argument("--lengths", default="8192,16384")
    parser.add_argument("--per-kind", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="I/N: the first setting and every Nth other, from the Ith")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    first, *others = SETTINGS
    names = [first, *others[part - 1::parts]]
    lengths = [int(n) for n in args.lengths.split(",")]
    needles = first_of_each(pathlib.Path(args.testdata) / "trained/needles.jsonl", lengths, args.per_kind)

    titles = [f"{n:,} tokens: found, loss" for n in lengths]
    print("| cache | KV bytes | perplexity | growth | KL against f32, mean (99 %) | same first token | "
          + " | ".join(titles) + " |")
    print("|---|---|---|---|---|---|" + "---|" * len(lengths))
    with tempfile.TemporaryDirectory() as folder:
        measurement = Measurement(args.program, args.model, folder, heldout_tokens(args.testdata), needles,
                                  args.threads)
        base = None
        for name, text, found in rows(measurement, names):
            base = base or text["perplexity"]
            kl = text.get("kl")
            cells = [name, f"{text['memory']['purposes']['kv']['peak_bytes']:,}", f"{text['perplexity']:.4f}",
                     f"{(text['perplexity'] / base - 1) * 100:+.3f} %" if kl else "",
                     f"{kl['mean']:.2e} ({kl['p99']:.2e})" if kl else "",
                     f"{kl['same_first'] * 100:.2f} %" if kl else ""]
            for n in lengths:
                score = found["by_length"][str(n)]
                cells.append(f"{score['found']}/{score['asked']}, {score['nll']:.4f}")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
