"""fathom perplexity, bench, config and the demo."""
import json
import os
import re
import subprocess
import unittest

from cli import DATA, MODEL, PROGRAM, SOURCE, TIMEOUT_S, Case, environment, read_safetensors


class Perplexity(Case):
    def golden(self):
        return read_safetensors(DATA / "trained/golden.safetensors")

    def test_windows_equal_the_reference(self):
        golden = self.golden()
        want = golden["ppl.Q8_0.nll_512"][1]
        tokens = self.file("t.json", json.dumps(list(golden["ppl.tokens"][1])[:4 * 512 + 100]))
        r = self.run_ok("perplexity", "-m", MODEL, "--tokens", tokens, "-c", 512, "--json",
                        "--set", "numerics=exact").json()
        self.assertEqual(len(r["windows"]), 4)
        for i, nll in enumerate(r["windows"]):
            self.assertAlmostEqual(nll, want[i], delta=2e-3, msg=f"window {i}")
        self.assertAlmostEqual(r["nll"], sum(want[:4]) / 4, delta=1e-3)

    def test_fast_numerics_within_a_percent(self):
        golden = self.golden()
        tokens = self.file("t.json", json.dumps(list(golden["ppl.tokens"][1])))
        r = self.run_ok("perplexity", "-m", MODEL, "--tokens", tokens, "-c", 512, "--json").json()
        self.assertEqual(len(r["windows"]), 32)
        windows = golden["ppl.Q8_0.nll_512"][1]
        self.assertAlmostEqual(r["nll"], sum(windows) / len(windows), delta=0.01)

    def test_text_shorter_than_a_window(self):
        r = self.run_ok("perplexity", "-m", MODEL, "-p", "Once upon a time there was a kind baker called Anna.")
        self.assertRegex(r.out, r"perplexity \d+\.\d+  nll \d+\.\d+  1 windows of \d+ tokens")
        self.run_code(2, "perplexity", "-m", MODEL, "--tokens", self.file("one.json", "[5]"))


class Bench(Case):
    def test_json(self):
        r = self.run_ok("bench", "-m", MODEL, "-p", "16,64", "-n", 4, "-d", "128,0", "-r", 1, "-t", 1, "--json").json()
        rows = [(row["kind"], row["depth"], row["tokens"]) for row in r["results"]]
        self.assertEqual(rows, [("prefill", 0, 16), ("prefill", 0, 64), ("decode", 0, 4),
                                ("prefill", 128, 16), ("prefill", 128, 64), ("decode", 128, 4)])
        self.assertTrue(all(row["tps"] > 0 for row in r["results"]))
        self.assertGreater(r["read_bandwidth"]["bytes_per_second"], 1e8)
        shallow, deep = (row for row in r["results"] if row["kind"] == "decode")
        self.assertAlmostEqual(deep["bytes_per_token"] - shallow["bytes_per_token"], 128 * r["kv_bytes_per_token"], delta=2)
        self.assertGreater(deep["bandwidth_share"], 0)
        # Active weights: a model of 5.0 M parameters in 8.5 bits, of which some experts and the
        # embedding table are not read.
        self.assertTrue(2e6 < r["active_weight_bytes"] < 5.3e6, r["active_weight_bytes"])

    def test_batches_and_operations(self):
        r = self.run_ok("bench", "-m", MODEL, "-p", 16, "-n", 2, "-r", 1, "--batch", "1,3", "--profile", "--json").json()
        rows = [(row["kind"], row.get("sessions")) for row in r["results"]]
        self.assertEqual(rows, [("prefill", None), ("decode", None), ("batch", 1), ("batch", 3)])
        one, three = r["results"][2:]
        self.assertLess(three["bytes_per_token"], one["bytes_per_token"])  # weights are shared
        for row in r["results"]:
            ops = row["operations"]
            for op in ("matmul", "rms_norm", "attend_absorbed", "experts", "route", "kv_append"):
                self.assertGreater(ops[op]["calls"], 0, op)
            seconds = sum(op["seconds"] for op in ops.values())
            self.assertLess(seconds, row.get("sessions", 1) * row["tokens"] / row["tps"] * 1.01)
            self.assertGreater(row["busy"], 0)
        self.assertGreater(r["f32_peak_gflops"], 0.1)
        text = self.run_ok("bench", "-m", MODEL, "-p", 16, "-n", 2, "-r", 1, "--batch", 2, "--profile").out
        for word in ("batch", "2x2", "experts", "outside", "busy", "MB/s"):
            self.assertIn(word, text)
        self.run_code(2, "bench", "-m", MODEL, "--batch", "0")

    def test_table(self):
        out = self.run_ok("bench", "-m", MODEL, "-p", 16, "-n", 2, "-r", 1).out
        for word in ("GB/s", "prefill", "decode", "share", "tok/s"):
            self.assertIn(word, out)


class Config(Case):
    def test_schema_lists_every_key(self):
        schema = self.run_ok("config", "--schema").json()
        keys = {row["key"] for row in schema}
        for key in ("devices", "context.max", "kv.type", "prefill.chunk", "threads", "isa", "numerics"):
            self.assertIn(key, keys)
        for row in schema:
            self.assertEqual(set(row) & {"key", "type", "unit", "default", "range", "memory", "text"},
                             {"key", "type", "unit", "default", "range", "memory", "text"}, row)
        table = self.run_ok("config", "--keys").out
        for key in keys:
            self.assertIn(key, table)

    def test_flags_and_keys_are_the_same(self):
        by_flag = self.run_ok("config", "-c", 4096, "-t", 3, "-b", 128, "--kv-type", "q8_0", "--isa", "scalar",
                              "--mem-budget", "cpu=1G").json()
        by_key = self.run_ok("config", "--set", "context.max=4096", "--set", "threads=3", "--set", "prefill.chunk=128",
                             "--set", "kv.type=q8_0", "--set", "isa=scalar", "--set", "budget.cpu=1073741824").json()
        self.assertEqual(by_flag, by_key)


class Demo(Case):
    def test_demo_script_finds_the_code(self):
        p = subprocess.run(["bash", SOURCE / "examples/demo.sh", PROGRAM, MODEL], capture_output=True,
                           env=environment(), timeout=TIMEOUT_S)
        err = p.stderr.decode()
        self.assertEqual(p.returncode, 0, err)
        for word in ("per token", "FITS", "planned in", "before the question", "Right", "story", "planned", "resident"):
            self.assertIn(word, err)
        self.assertRegex(p.stdout.decode(), r"code is \d{4}")
        distance = re.search(r"The code stands ([\d,]+) tokens before the question", err).group(1)
        self.assertGreaterEqual(int(distance.replace(",", "")), 16384)

    def test_other_texts(self):
        for seed in (2, 3):
            r = self.run_ok("demo", "-m", MODEL, "--seed", seed, "--json").json()
            self.assertTrue(r["right"], (seed, r["question"], r["code"], r["text"]))
            self.assertGreaterEqual(r["distance_tokens"], 16384)

    def test_planned_equals_used(self):
        r = self.run_ok("demo", "-m", MODEL, "--length", 4000, "--json").json()
        self.assertTrue(r["right"])
        self.assertGreater(r["prompt_tokens"], 3600)
        self.assertGreater(r["distance_tokens"], 3000)
        for name, purpose in r["memory"]["purposes"].items():
            self.assertEqual(purpose["peak_bytes"], purpose["planned_bytes"], name)

    def test_without_a_program(self):
        p = subprocess.run(["bash", SOURCE / "examples/demo.sh", self.folder / "none", MODEL], capture_output=True)
        self.assertEqual(p.returncode, 2)


if __name__ == "__main__":
    unittest.main()
