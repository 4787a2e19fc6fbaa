"""fathom plan: the numbers of published shapes, feasibility, alternatives; all from headers alone."""
import json
import struct
import time
import unittest

from cli import MODEL, Case

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                     "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
    "tie_word_embeddings": False, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 10944, "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "scoring_func": "softmax",
    "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    "hidden_act": "silu", "bos_token_id": 100000, "eos_token_id": 100001, "torch_dtype": "bfloat16",
}


def tensor_shapes(c):
    """name -> shape of every tensor of such a checkpoint."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    head = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    shapes = {"model.embed_tokens.weight": [c["vocab_size"], hidden], "model.norm.weight": [hidden],
              "lm_head.weight": [c["vocab_size"], hidden]}

    def mlp(prefix, width):
        shapes[prefix + "gate_proj.weight"] = shapes[prefix + "up_proj.weight"] = [width, hidden]
        shapes[prefix + "down_proj.weight"] = [hidden, width]

    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes[p + "input_layernorm.weight"] = shapes[p + "post_attention_layernorm.weight"] = [hidden]
        a = p + "self_attn."
        shapes[a + "q_proj.weight"] = [heads * head, hidden]
        shapes[a + "kv_a_proj_with_mqa.weight"] = [c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden]
        shapes[a + "kv_a_layernorm.weight"] = [c["kv_lora_rank"]]
        shapes[a + "kv_b_proj.weight"] = [heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]]
        shapes[a + "o_proj.weight"] = [hidden, heads * c["v_head_dim"]]
        if layer < c["first_k_dense_replace"]:
            mlp(p + "mlp.", c["intermediate_size"])
            continue
        shapes[p + "mlp.gate.weight"] = [c["n_routed_experts"], hidden]
        mlp(p + "mlp.shared_experts.", c["n_shared_experts"] * c["moe_intermediate_size"])
        for expert in range(c["n_routed_experts"]):
            mlp(f"{p}mlp.experts.{expert}.", c["moe_intermediate_size"])
    return shapes


def write_model(folder, config):
    """A checkpoint whose weights are a hole in the file: its header is real, no byte is on disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in sorted(tensor_shapes(config).items()):
        size = 2
        for d in shape:
            size *= d
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


class Plan(Case):
    def test_json_contract(self):
        p = self.run_ok("plan", "-m", MODEL, "-c", 8192, "--json").json()
        self.assertIs(p["feasible"], True)
        self.assertEqual(p["max_context"], 8192)
        self.assertEqual(p["kv_bytes_per_token"], 5 * (96 + 32) * 2)  # 5 layers, 16 bits
        self.assertTrue(1 <= p["prefill_chunk"] <= 8192)
        self.assertEqual(p["alternatives"], [])
        (device,) = p["devices"]
        self.assertEqual(device["name"], "cpu")
        self.assertLessEqual(device["peak_bytes"], device["budget_bytes"])
        self.assertGreaterEqual(device["purposes"]["kv"], 8192 * p["kv_bytes_per_token"])
        self.assertLessEqual(device["peak_bytes"], sum(device["purposes"].values()))

    def test_table(self):
        out = self.run_ok("plan", "-m", MODEL, "-c", 8192).out
        for word in ("device", "bytes", "GiB", "per token", "cpu", "kv", "weights", "FITS", "budget", "1,280 B"):
            self.assertIn(word, out)

    def test_kv_type_decides_the_bytes_of_a_token(self):
        for kv_type, row in (("f32", 128 * 4), ("bf16", 128 * 2), ("f16", 128 * 2), ("fp8", 4 + 96 + 64),
                             ("q8_0", 3 * 34 + 64), ("q4_0", 3 * 18 + 64)):
            p = self.run_ok("plan", "-m", MODEL, "-c", 1024, "--kv-type", kv_type, "--json").json()
            self.assertEqual(p["kv_bytes_per_token"], 5 * row, kv_type)
            self.assertEqual(p["kv_type"], kv_type)

    def test_infeasible_is_3_with_alternatives_that_hold(self):
        flags = ("-m", MODEL, "-c", 32768, "--mem-budget", "cpu=32M")
        r = self.run_code(3, "plan", *flags, "--json")
        p = r.json()
        self.assertIs(p["feasible"], False)
        self.assertGreater(p["binding"]["bytes_short"], 0)
        self.assertGreater(len(p["alternatives"]), 0)
        for alternative in p["alternatives"]:
            changes = [x for key, value in alternative["set"].items() for x in ("--set", f"{key}={value}")]
            kept = ["-m", MODEL]
            if not any(key.startswith("budget") for key in alternative["set"]):
                kept += ["--mem-budget", "cpu=32M"]
            if "context.max" not in alternative["set"]:
                kept += ["-c", 32768]
            fits = self.run_ok("plan", *kept, *changes, "--json").json()
            self.assertIs(fits["feasible"], True, alternative)
        self.assertIn("DOES NOT FIT", self.run_code(3, "plan", *flags).out)

    def test_run_refuses_an_infeasible_plan(self):
        r = self.run_code(3, "run", "-m", MODEL, "-p", "x", "-c", 32768, "--mem-budget", "cpu=32M")
        self.assertEqual(r.out, "")
        self.assertIn("DOES NOT FIT", r.err)

    def test_context_0_is_what_the_model_was_trained_for(self):
        p = self.run_ok("plan", "-m", MODEL, "-c", 0, "--json").json()
        self.assertEqual(p["max_context"], 32768)

    def test_default_context_is_what_fits(self):
        p = self.run_ok("plan", "-m", MODEL, "--mem-budget", "cpu=40M", "--json").json()
        self.assertIs(p["feasible"], True)
        self.assertTrue(0 < p["max_context"] < 32768, p["max_context"])
        self.assertLessEqual(p["devices"][0]["peak_bytes"], 40 << 20)

    def test_planned_bytes_are_the_ledgers_bytes(self):
        p = self.run_ok("plan", "-m", MODEL, "-c", 4096, "--json").json()
        tokens = self.file("t.json", json.dumps([5] * 4000))
        r = self.run_ok("run", "-m", MODEL, "-c", 4096, "--tokens", tokens, "-n", -1, "--ignore-eos", "--json").json()
        self.assertEqual(r["stop_reason"], "context_full")
        self.assertEqual(r["memory"]["ledger_peak_bytes"], p["devices"][0]["peak_bytes"])
        self.assertEqual(r["memory"]["planned_peak_bytes"], p["devices"][0]["peak_bytes"])
        for name, planned in p["devices"][0]["purposes"].items():
            self.assertEqual(r["memory"]["purposes"][name]["peak_bytes"], planned, name)

    def test_v2_lite(self):
        size = write_model(self.folder / "v2-lite", V2_LITE)
        start = time.monotonic()
        p = self.run_ok("plan", "-m", self.folder / "v2-lite", "-c", 163840, "--mem-budget", "cpu=40G", "--json").json()
        elapsed = time.monotonic() - start
        self.assertIs(p["feasible"], True)
        self.assertEqual(p["kv_bytes_per_token"], 31104)
        purposes = p["devices"][0]["purposes"]
        self.assertEqual(purposes["kv"], 163840 * 31104)  # 4.75 GiB
        self.assertLess(abs(purposes["weights"] + purposes["experts"] - size), size * 0.03)
        self.assertLess(elapsed, 10)
        p = self.run_code(3, "plan", "-m", self.folder / "v2-lite", "-c", 163840, "--mem-budget", "cpu=32G", "--json").json()
        self.assertGreater(p["binding"]["bytes_short"], 1 << 30)


if __name__ == "__main__":
    unittest.main()
