"""HF-layout folder -> GGUF (arch deepseek2) with the `gguf` package.

usage: python to_gguf.py HF_DIR OUT.gguf [layout=new|old|mid] [type=F32|F16|BF16|Q8_0|Q4_K|...|Q4_K_M] [split=N]
layouts: new  attn_k_b [H, kv_lora, nope] (transposed per head) + attn_v_b [H, v, kv_lora]; head_count_kv=1,
              key_length=kv_lora+rope, value_length=kv_lora, key_length_mla=nope+rope, value_length_mla=v,
              expert_group_count / expert_group_used_count / expert_gating_func present
         old  attn_kv_b [H*(nope+v), kv_lora]; head_count_kv=H, key_length=nope+rope, value_length=v; no group keys,
              no expert_gating_func for softmax models (what V2-era files look like)
         mid  old's keys + attn_kv_b AND 2-D attn_k_b [H*kv_lora, nope] AND attn_v_b [H*v, kv_lora]  (ik_llama.cpp files)
K-quants and IQ types need a ggml shared library: set GGML_BASE=/path/to/libggml-base.so (ggml_quantize_chunk).
"""

import ctypes
import glob
import json
import os
import sys
import numpy as np
import gguf

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import stio
import dsref

QT = gguf.GGMLQuantizationType


def load_hf(d):
    """-> config, name -> fp32 array (FP8 dequantised, MTP layer dropped)"""
    c = json.load(open(d + "/config.json"))
    raw = {}
    for f in sorted(glob.glob(d + "/model*.safetensors")):
        raw.update(stio.read(f, raw=True))
    t = {}
    for n, (dt, a) in raw.items():
        if n.endswith("_scale_inv") or n.startswith(f"model.layers.{c['num_hidden_layers']}."):
            continue
        t[n] = (
            dsref.fp8_dequant(a, raw[n + "_scale_inv"][1]) if dt == "F8_E4M3" else np.asarray(a, np.float32)
        )
    return c, t


_lib = None


def quantize(a, qt):
    global _lib
    a = np.ascontiguousarray(a, np.float32)
    if qt in (QT.F32,):
        return a
    if qt in (QT.F16,):
        return a.astype(np.float16)
    try:
        return gguf.quants.quantize(a, qt)
    except NotImplementedError:
        pass
    if _lib is None:
        _lib = ctypes.CDLL(os.environ["GGML_BASE"])
        _lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        _lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        _lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    _lib.ggml_quantize_init(int(qt))
    n = a.shape[-1]
    rows = a.size // n
    bs, ts = gguf.GGML_QUANT_SIZES[qt]
    out = np.zeros((rows, n // bs * ts), np.uint8)
    im = np.ones(n, np.float32)
    r = _lib.ggml_quantize_chunk(
        int(qt),
        a.ctypes.data,
        out.ctypes.data,
        0,
        rows,
        n,
        im.ctypes.data if qt.name in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M") else None,
    )
    assert r == out.size, (r, out.size)
    return out.reshape(a.shape[:-1] + (-1,))


MAP = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def gguf_tensors(c, t, layout):
    o = {"token_embd.weight": t["model.embed_tokens.weight"], "output_norm.weight": t["model.norm.weight"]}
    if "lm_head.weight" in t:
        o["output.weight"] = t["lm_head.weight"]
    H, n, v, L = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    for l in range(c["num_hidden_layers"]):
        p, b = f"model.layers.{l}.", f"blk.{l}."
        for k, g in MAP.items():
            if p + k + ".weight" in t:
                o[b + g + ".weight"] = t[p + k + ".weight"]
        w = t[p + "self_attn.kv_b_proj.weight"]
        w3 = w.reshape(H, n + v, L)
        kb = np.ascontiguousarray(w3[:, :n].transpose(0, 2, 1))
        vb = np.ascontiguousarray(w3[:, n:])
        if layout in ("old", "mid"):
            o[b + "attn_kv_b.weight"] = w
        if layout == "new":
            o[b + "attn_k_b.weight"], o[b + "attn_v_b.weight"] = kb, vb
        if layout == "mid":
            o[b + "attn_k_b.weight"], o[b + "attn_v_b.weight"] = kb.reshape(H * L, n), vb.reshape(H * v, L)
        if p + "mlp.gate.weight" in t:
            for k, g in (
                ("gate_proj", "ffn_gate_exps"),
                ("up_proj", "ffn_up_exps"),
                ("down_proj", "ffn_down_exps"),
            ):
                o[b + g + ".weight"] = np.stack(
                    [t[f"{p}mlp.experts.{e}.{k}.weight"] for e in range(c["n_routed_experts"])]
                )
            if p + "mlp.gate.e_score_correction_bias" in t:
                o[b + "exp_probs_b.bias"] = t[p + "mlp.gate.e_score_correction_bias"]
    return o


def pick(name, a, typ):
    if a.ndim == 1 or "ffn_gate_inp" in name:
        return QT.F32
    if typ == "Q4_K_M":
        typ = "Q6_K" if name in ("output.weight",) or "ffn_down" in name or "attn_v_b" in name else "Q4_K"
    qt = QT[typ]
    bs = gguf.GGML_QUANT_SIZES[qt][0]
    return qt if a.shape[-1] % bs == 0 else QT.Q8_0 if a.shape[-1] % 32 == 0 else QT.F16


def main(d, out, layout="new", type="F16", split=0):
    c, t = load_hf(d)
    H = c["num_attention_heads"]
    r = c["qk_rope_head_dim"]
    A = "deepseek2"
    T = gguf_tensors(c, t, layout)
    w = gguf.GGUFWriter(None if split else out, A, split_max_tensors=-(-len(T) // split) if split else 0)
    w.add_name(os.path.basename(d.rstrip("/")))
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(H)
    w.add_head_count_kv(1 if layout == "new" else H)
    w.add_rope_freq_base(float(c["rope_theta"]))
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_expert_used_count(c["num_experts_per_tok"])
    if layout == "new":
        w.add_expert_group_count(c["n_group"])
        w.add_expert_group_used_count(c["topk_group"])
    sig = c["scoring_func"] == "sigmoid"
    if layout == "new" or sig:
        w.add_expert_gating_func(
            gguf.ExpertGatingFuncType.SIGMOID if sig else gguf.ExpertGatingFuncType.SOFTMAX
        )
    ft = {
        "F32": "ALL_F32",
        "F16": "MOSTLY_F16",
        "BF16": "MOSTLY_BF16",
        "Q4_K": "MOSTLY_Q4_K_S",
        "Q5_K": "MOSTLY_Q5_K_S",
        "Q3_K": "MOSTLY_Q3_K_M",
        "Q4_K_M": "MOSTLY_Q4_K_M",
    }.get(type, "MOSTLY_" + type)
    w.add_file_type(gguf.LlamaFileType[ft])
    w.add_quantization_version(2)
    w.add_leading_dense_block_count(c["first_k_dense_replace"])
    w.add_vocab_size(c["vocab_size"])
    if c.get("q_lora_rank"):
        w.add_q_lora_rank(c["q_lora_rank"])
    w.add_kv_lora_rank(c["kv_lora_rank"])
    kl = c["qk_nope_head_dim"] + r
    if layout == "new":
        w.add_key_length(c["kv_lora_rank"] + r)
        w.add_value_length(c["kv_lora_rank"])
        w.add_key_length_mla(kl)
        w.add_value_length_mla(c["v_head_dim"])
    else:
        w.add_key_length(kl)
        w.add_value_length(c["v_head_dim"])
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    w.add_expert_count(c["n_routed_experts"])
    w.add_expert_shared_count(c["n_shared_experts"])
    w.add_expert_weights_scale(float(c["routed_scaling_factor"]))
    if c["norm_topk_prob"]:
        w.add_expert_weights_norm(True)
    w.add_rope_dimension_count(r)
    rs = c.get("rope_scaling")
    if rs:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(float(rs["factor"]))
        w.add_rope_scaling_orig_ctx_len(rs["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_log_mul(0.1 * rs["mscale_all_dim"])
        if layout == "new":
            w.add_rope_scaling_yarn_beta_fast(float(rs["beta_fast"]))
            w.add_rope_scaling_yarn_beta_slow(float(rs["beta_slow"]))
    tk = d + "/tokenizer.json"
    if os.path.exists(tk):
        j = json.load(open(tk))
        tc = json.load(open(d + "/tokenizer_config.json"))
        V = c["vocab_size"]
        toks = [f"[PAD{i}]" for i in range(V)]
        ty = [gguf.TokenType.UNUSED] * V
        for s, i in j["model"]["vocab"].items():
            toks[i] = s
            ty[i] = gguf.TokenType.NORMAL
        for a in j["added_tokens"]:
            sp = a["special"] or a["content"].startswith("<｜")
            toks[a["id"]] = a["content"]
            ty[a["id"]] = gguf.TokenType.CONTROL if sp else gguf.TokenType.USER_DEFINED
        w.add_tokenizer_model("gpt2")
        pt = j["pre_tokenizer"]["pretokenizers"]
        p1 = pt[1]["pattern"]["Regex"]
        w.add_tokenizer_pre(
            "deepseek-v3"
            if "{1,3}" in pt[0]["pattern"]["Regex"]
            else "deepseek-coder" if p1 == r"\s?\p{L}+" else "deepseek-llm"
        )
        w.add_token_list(toks)
        w.add_token_types(ty)
        w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in j["model"]["merges"]])
        w.add_bos_token_id(c["bos_token_id"])
        w.add_eos_token_id(c["eos_token_id"])
        w.add_add_bos_token(True)
        w.add_add_eos_token(False)
        w.add_chat_template(tc["chat_template"])
    for n, a in T.items():
        qt = pick(n, a, type)
        q = quantize(a, qt)
        if qt in (QT.F32, QT.F16):
            w.add_tensor(n, np.ascontiguousarray(q))
        else:
            w.add_tensor(n, q, raw_dtype=qt)
    from pathlib import Path

    w.write_header_to_file(Path(out))
    w.write_kv_data_to_file()
    w.write_tensors_to_file(progress=False)
    w.close()


def read_back(paths, c):
    """GGUF (or list of shards) -> HF-named fp32 tensors, any layout; the dequantised model"""
    T = {}
    for p in ([paths] if isinstance(paths, str) else paths):
        for x in gguf.GGUFReader(p).tensors:
            sh = [int(s) for s in x.shape][::-1]
            T[x.name] = np.asarray(gguf.quants.dequantize(x.data, x.tensor_type), np.float32).reshape(sh)
    inv = {g: k for k, g in MAP.items()}
    o = {
        "model.embed_tokens.weight": T["token_embd.weight"],
        "model.norm.weight": T["output_norm.weight"],
        "lm_head.weight": T["output.weight"],
    }
    H, n, v, L = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    for k, a in T.items():
        if not k.startswith("blk."):
            continue
        _, l, g, suf = k.split(".")
        p = f"model.layers.{l}."
        if g in inv:
            o[p + inv[g] + ".weight"] = a
        elif g == "exp_probs_b":
            o[p + "mlp.gate.e_score_correction_bias"] = a
        elif g.endswith("_exps"):
            for e in range(len(a)):
                o[f"{p}mlp.experts.{e}.{g[4:-5]}_proj.weight"] = a[e]
        elif g == "attn_kv_b":
            o[p + "self_attn.kv_b_proj.weight"] = a
        elif g == "attn_k_b" and f"blk.{l}.attn_kv_b.weight" not in T:
            vb = T[f"blk.{l}.attn_v_b.weight"].reshape(H, v, L)
            o[p + "self_attn.kv_b_proj.weight"] = np.concatenate(
                [a.reshape(H, L, n).transpose(0, 2, 1), vb], 1
            ).reshape(-1, L)
    return o


if __name__ == "__main__":
    kw = dict(a.split("=") for a in sys.argv[3:])
    if "split" in kw:
        kw["split"] = int(kw["split"])
    main(sys.argv[1], sys.argv[2], **kw)
