"""fathom inspect, eval, tokenize, detokenize: what they write, against the goldens."""
import json
import math
import unittest

from cli import DATA, MODEL, Case, fathom, read_f32, read_safetensors

TINY = DATA / "models/tiny-v3"


class Inspect(Case):
    def test_json(self):
        r = self.run_ok("inspect", "-m", MODEL, "--json").json()
        self.assertEqual(r["format"], "gguf")
        self.assertEqual((r["config"]["kv_lora_rank"], r["config"]["qk_rope_head_dim"]), (96, 32))
        self.assertEqual((r["config"]["n_routed_experts"], r["config"]["num_experts_per_tok"]), (8, 2))
        self.assertEqual((r["tokenizer"]["n_tokens"], r["tokenizer"]["chat_format"]), (2048, "deepseek-v2"))
        self.assertEqual(r["metadata"]["general.architecture"], "deepseek2")
        embedding = next(t for t in r["tensors"] if t["name"] == "token_embd.weight")
        self.assertEqual((embedding["dtype"], embedding["shape"]), ("Q8_0", [2048, 256]))
        self.assertEqual(embedding["bytes"], 2048 * 256 // 32 * 34)
        self.assertEqual(sum(t["bytes"] for t in r["tensors"]), sum(t["bytes"] for t in r["types"].values()))

    def test_table(self):
        out = self.run_ok("inspect", "-m", TINY).out
        for word in ("safetensors", "kv_lora_rank", "noaux_tc", "model.embed_tokens.weight", "BF16", "tokenizer"):
            self.assertIn(word, out)

    def test_dequantised_values(self):
        golden = read_safetensors(DATA / "quant/blocks.golden.safetensors")
        types = sorted(n.split(".", 1)[1] for n in golden if n.startswith("rows."))
        self.assertGreater(len(types), 20)
        for name in types:
            out = self.folder / "out.f32"
            self.run_ok("inspect", "-m", DATA / "quant/blocks.gguf", "--tensor", f"rows.{name}", "--out", out)
            want = golden[f"rows.{name}"][1]
            self.assertEqual(len(read_f32(out)), len(want), name)
            for i, (got, expected) in enumerate(zip(read_f32(out), want)):
                if got != expected and abs(got - expected) > 1.2e-7 * abs(expected):
                    self.fail(f"rows.{name}[{i}]: {got}, expected {expected}")

    def test_fp8_with_its_scales(self):
        """Values of an FP8 tensor times its block scales, computed here once more."""
        folder = DATA / "models/tiny-v3-fp8"
        listing = self.run_ok("inspect", "-m", folder, "--json").json()["tensors"]
        name, shape = next((t["name"], t["shape"]) for t in listing
                           if t["dtype"] == "F8_E4M3" and max(t["shape"]) > 128)
        out = self.folder / "w.f32"
        self.run_ok("inspect", "-m", folder, "--tensor", name, "--out", out)
        self.run_ok("inspect", "-m", folder, "--tensor", name + "_scale_inv", "--out", self.folder / "s.f32")
        scales, values = read_f32(self.folder / "s.f32"), read_f32(out)
        self.assertEqual(len(values), shape[0] * shape[1])
        scale_cols = -(-shape[1] // 128)
        for i, value in enumerate(values):
            row, col = divmod(i, shape[1])
            code = abs(value / scales[row // 128 * scale_cols + col // 128])
            # E4M3: four significant bits, in steps of 2^-9 below 2^-6; at most 448.
            step = max(math.ldexp(1, math.frexp(code)[1] - 4), 2**-9)
            if code > 448.001 or abs(code / step - round(code / step)) > 1e-4:
                self.fail(f"{name}[{row}, {col}] = {value}: {code} is no E4M3 value")

    def test_one_tensor_in_json(self):
        out = self.folder / "out.f32"
        r = self.run_ok("inspect", "-m", MODEL, "--tensor", "output_norm.weight", "--out", out, "--json").json()
        self.assertEqual((r["tensor"], r["values"]), ("output_norm.weight", 256))
        self.assertEqual(len(read_f32(out)), 256)


class Eval(Case):
    def compare(self, length, all_rows, *flags, tolerance):
        golden = read_safetensors(TINY / "golden.safetensors")
        tokens = self.file("t.json", json.dumps(list(golden[f"p{length}.tokens"][1])))
        out = self.folder / "logits.f32"
        r = self.run_ok("eval", "-m", TINY, "--tokens", tokens, "--logits", out, "--json", "--set", "numerics=exact",
                        *(["--all"] if all_rows else []), *flags).json()
        shape, want = golden[f"p{length}.logits"]
        self.assertEqual((r["rows"], r["vocab_size"]), (length if all_rows else 1, shape[1]))
        got = read_f32(out)
        if not all_rows:
            want = want[-shape[1]:]
        self.assertEqual(len(got), len(want))
        worst = max(range(len(got)), key=lambda i: abs(got[i] - want[i]))
        self.assertLessEqual(abs(got[worst] - want[worst]), tolerance,
                             f"p{length} {flags}: at {worst} {got[worst]}, expected {want[worst]}")

    def test_all_rows(self):
        self.compare(7, True, tolerance=2e-4)
        self.compare(64, True, "--chunk", 7, tolerance=2e-4)

    def test_last_row(self):
        self.compare(1, False, tolerance=2e-4)
        self.compare(64, False, "--chunk", 1, tolerance=2e-4)
        self.compare(300, False, "--chunk", 300, tolerance=2e-4)
        self.compare(1000, False, tolerance=1e-3)

    def test_a_failure_leaves_an_older_file_alone(self):
        out = self.file("logits.f32", b"older")
        tokens = self.file("t.json", "[1, 99999]")
        self.run_code(2, "eval", "-m", TINY, "--tokens", tokens, "--logits", out, "--all")
        self.assertEqual(out.read_bytes(), b"older")
        self.assertEqual({p.name for p in self.folder.iterdir()}, {"logits.f32", "t.json"})


class Tokenize(Case):
    V3 = DATA / "tokenizers/deepseek-v3"
    LLM = DATA / "tokenizers/ggml-vocab-deepseek-llm.gguf"

    def test_golden_lines(self):
        for vocab, golden in ((self.V3, "deepseek-v3"), (self.LLM, "deepseek-llm")):
            lines = [json.loads(l) for l in (DATA / f"tokenizers/{golden}.golden.jsonl").read_text().splitlines()]
            for line in lines[1::60]:
                file = self.file("text", line["text"])
                r = self.run_ok("tokenize", "--vocab", vocab, "-f", file, "--json").json()
                self.assertEqual(r["tokens"], line["ids"], f"{golden} {line['i']}")
                if line["decode_exact"]:
                    back = self.run_ok("detokenize", "--vocab", vocab, "--tokens", self.file("ids", json.dumps(r)))
                    self.assertEqual(back.out, line["text"], f"{golden} {line['i']}")

    def test_bos_and_plain_output(self):
        plain = self.run_ok("tokenize", "-m", MODEL, "-p", "Once upon").out
        with_bos = self.run_ok("tokenize", "-m", MODEL, "-p", "Once upon", "--bos").out
        self.assertEqual(json.loads(with_bos), [0] + json.loads(plain))
        text = self.run_ok("detokenize", "-m", MODEL, "-f", "-", "--skip-special", stdin=with_bos)
        self.assertEqual(text.out, "Once upon")
        self.assertEqual(self.run_ok("detokenize", "-m", MODEL, "--json", stdin=plain).json(), {"text": "Once upon"})

    def test_special_tokens_may_be_text(self):
        special = "<｜end▁of▁sentence｜>"
        as_token = self.run_ok("tokenize", "-m", MODEL, "-p", special, "--json").json()["tokens"]
        as_text = self.run_ok("tokenize", "-m", MODEL, "-p", special, "--no-special", "--json").json()["tokens"]
        self.assertEqual(as_token, [1])
        self.assertGreater(len(as_text), 3)

    def test_chat_templates(self):
        golden = json.loads((DATA / "tokenizers/chat_templates.golden.json").read_text())
        cases = golden["cases"][::5]
        self.assertGreater(len(cases), 10)
        for i, case in enumerate(cases):
            file = self.file("messages.json", json.dumps(case["messages"]))
            flags = [] if case["add_generation_prompt"] else ["--no-generation-prompt"]
            vocab = self.LLM if case["template"] == "deepseek-v2" else self.V3
            r = fathom("tokenize", "--vocab", vocab, "-f", file, "--chat", "--chat-format", case["template"], *flags, "--json")
            self.assertEqual(r.code, 0, r.err)
            self.assertEqual(r.json()["prompt"], case["rendered"], f"case {i}: {case['template']}")

    def test_one_message_is_what_a_user_says(self):
        r = self.run_ok("tokenize", "-m", MODEL, "-p", "Hello!", "--chat", "--json").json()
        self.assertEqual(r["prompt"], "<｜begin▁of▁sentence｜>User: Hello!\n\nAssistant:")
        self.assertEqual(r["tokens"][0], 0)


if __name__ == "__main__":
    unittest.main()
