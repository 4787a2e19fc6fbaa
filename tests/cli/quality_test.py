"""What fathom measures of a model's quality equals the reference, and what typed caches may cost."""
import json
import math
import sys
import tempfile
import unittest

from cli import DATA, MODEL, PROGRAM, SOURCE, Case, read_f32, read_safetensors

sys.path.insert(0, str(SOURCE / "tests/bench"))
import kv_quality  # noqa: E402

NEEDLES = DATA / "trained/needles.jsonl"


class Divergence(Case):
    def tokens(self, n):
        tokens = list(read_safetensors(DATA / "trained/golden.safetensors")["ppl.tokens"][1])[:n]
        return self.file("t.json", json.dumps(tokens))

    def perplexity(self, *flags, code=0):
        return self.run_code(code, "perplexity", "-m", MODEL, "-c", 128, "--json", *flags)

    def test_of_a_run_with_itself_and_with_another(self):
        tokens, base = self.tokens(256), self.folder / "base.f32"
        first = self.perplexity("--tokens", tokens, "--save-logits", base).json()
        self.assertNotIn("kl", first)
        self.assertEqual(base.stat().st_size, 256 * 2048 * 4)
        same = self.perplexity("--tokens", tokens, "--kl-base", base).json()
        self.assertEqual((same["kl"]["max"], same["kl"]["same_first"]), (0, 1))
        self.assertEqual(same["perplexity"], first["perplexity"])
        other = self.perplexity("--tokens", tokens, "--kl-base", base, "--kv-type", "q4_0").json()["kl"]
        self.assertGreater(other["mean"], 1e-6)
        self.assertLess(other["mean"], 0.1)
        self.assertGreaterEqual(other["max"], other["p99"])
        self.assertGreater(other["same_first"], 0.9)

    def test_is_that_of_the_logits(self):
        """Computed once more, from the logits that eval writes for a window."""
        tokens, base, got = self.tokens(128), self.folder / "base.f32", self.folder / "got.f32"
        for file, kv in ((base, "f32"), (got, "q4_0")):
            self.run_ok("eval", "-m", MODEL, "--tokens", tokens, "--all", "--logits", file, "--kv-type", kv)
        p, q = (logit_rows(file) for file in (base, got))
        want = sum(kl(a, b) for a, b in zip(p, q)) / len(p)
        kv = self.perplexity("--tokens", tokens, "--kl-base", base, "--kv-type", "q4_0").json()["kl"]
        self.assertAlmostEqual(kv["mean"], want, delta=1e-3 * want)

    def test_a_base_of_another_text_is_refused(self):
        base = self.folder / "base.f32"
        self.perplexity("--tokens", self.tokens(128), "--save-logits", base)
        r = self.perplexity("--tokens", self.tokens(256), "--kl-base", base, code=2)
        self.assertIn(str(128 * 2048 * 4), r.err)
        self.perplexity("--tokens", self.tokens(128), "--kl-base", self.folder / "none", code=5)


class Retrieval(Case):
    def test_equals_the_reference(self):
        """The reference ran the dequantised weights: the same prompts are found, the loss is the same."""
        want = json.loads((DATA / "trained/needles.reference.json").read_text())
        r = self.run_ok("retrieval", "-m", MODEL, "-f", NEEDLES, "--lengths", "512,2048", "--json",
                        "--set", "numerics=exact").json()
        expected = [p for p in want["prompts"] if p["length"] in (512, 2048)]
        self.assertEqual(len(r["prompts"]), len(expected))
        for got, ref in zip(r["prompts"], expected):
            self.assertEqual((got["kind"], got["length"]), (ref["kind"], ref["length"]))
            self.assertEqual(got["found"], ref["found"], ref)
            self.assertAlmostEqual(got["nll"], ref["nll"], delta=0.01 + 0.005 * ref["nll"])
        for length in (512, 2048):
            mean = sum(p["nll"] for p in expected if p["length"] == length) / \
                sum(p["length"] == length for p in expected)
            self.assertAlmostEqual(r["by_length"][str(length)]["nll"], mean, delta=0.005 * mean)

    def test_choice_of_prompts_and_table(self):
        r = self.run_ok("retrieval", "-m", MODEL, "-f", NEEDLES, "--lengths", "512", "--kinds", "code,where")
        rows = {line.split()[0]: line.split()[1:] for line in r.out.splitlines()}
        self.assertEqual(rows["tokens"], ["512"])
        self.assertEqual(set(rows), {"tokens", "code", "where", "all", "loss"})
        self.assertEqual(rows["all"][0].split("/")[1], "16")

    def test_bad_prompts_are_named(self):
        for text in ('{"kind": "x", "tokens": [1, 2]}', '{"kind": "x", "tokens": [1], "answer": []}',
                     '{"kind": "x", "tokens": [1.5], "answer": [1]}', "[]", "x"):
            file = self.file("bad.jsonl", '{"kind": "x", "tokens": [1, 2], "answer": [3]}\n' + text + "\n")
            self.assertIn("line 2", self.run_code(2, "retrieval", "-m", MODEL, "-f", file).err)
        self.run_code(2, "retrieval", "-m", MODEL, "-f", self.file("none.jsonl", "\n"))
        self.run_code(5, "retrieval", "-m", MODEL, "-f", self.folder / "missing")


class TypedCaches(Case):
    def test_cost_in_perplexity_divergence_and_retrieval(self):
        """Over the whole held-out text, and over facts 8 K tokens back."""
        # name: growth of perplexity, mean KL, at most; as tests/bench/RESULTS.md has it, with room.
        bounds = {"f16": (0.0005, 2e-5), "bf16": (0.003, 1e-4), "fp8": (0.005, 3e-3), "q8_0": (0.005, 5e-4),
                  "q4_0, last 512 in 16 bits": (0.03, 3e-3),
                  "q4_0, last 512 and first 64 in 16 bits": (0.03, 3e-3)}
        needles = kv_quality.first_of_each(NEEDLES, [8192], 1)
        with tempfile.TemporaryDirectory() as folder:
            measurement = kv_quality.Measurement(PROGRAM, MODEL, folder, kv_quality.heldout_tokens(DATA), needles)
            base, base_found = None, None
            for name, text, found in kv_quality.rows(measurement, ["f32", *bounds]):
                if base is None:
                    base, base_found = text["perplexity"], found["all"]
                    continue
                growth, divergence = bounds[name]
                self.assertLessEqual(text["perplexity"] / base - 1, growth, name)
                self.assertLessEqual(text["kl"]["mean"], divergence, name)
                self.assertGreaterEqual(found["all"]["found"], base_found["found"], name)


def logit_rows(path, width=2048):
    values = read_f32(path)
    return [values[i:i + width] for i in range(0, len(values), width)]


def log_softmax(row):
    best = max(row)
    total = best + math.log(sum(math.exp(x - best) for x in row))
    return [x - total for x in row]


def kl(p, q):
    return sum(math.exp(a) * (a - b) for a, b in zip(log_softmax(p), log_softmax(q)))


if __name__ == "__main__":
    unittest.main()
