"""Exports a checkpoint and computes its goldens with the PyTorch model in fp32.

usage: export.py model CHECKPOINT[*share,CHECKPOINT*share...] DATA OUT     HF folder, GGUF F16 and Q8_0
       export.py golden DATA OUT PROMPTS.jsonl                             golden.safetensors, golden.json
"""

import json
import os
import random
import shutil
import sys

os.environ.setdefault("COMPILE", "0")
import numpy as np
import torch
import corpus as C
import continue_corpus as D
import dsref
import model as M
import stio
import to_gguf
import continue_train

K = M.CFG
TEMPLATE = "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"


def config():
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "moe_layer_freq": 1,
        "num_key_value_heads": K["heads"],
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": K["theta"],
        "seq_aux": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": K["first_dense"],
        "vocab_size": K["vocab"],
        "hidden_size": K["dim"],
        "num_hidden_layers": K["layers"],
        "num_attention_heads": K["heads"],
        "q_lora_rank": None,
        "kv_lora_rank": K["kv_lora"],
        "qk_nope_head_dim": K["nope"],
        "qk_rope_head_dim": K["rope"],
        "v_head_dim": K["v"],
        "intermediate_size": K["dense_inter"],
        "moe_intermediate_size": K["moe_inter"],
        "n_routed_experts": K["experts"],
        "num_experts_per_tok": K["topk"],
        "n_shared_experts": K["shared"],
        "rope_scaling": None,
    }


def states(spec):
    """one checkpoint, or the weighted mean of several"""
    parts = [(p.split("*") + ["1"])[:2] for p in spec.split(",")]
    total = sum(float(w) for _, w in parts)
    out = {}
    for path, w in parts:
        sd = torch.load(path)["m"] if path.endswith(".pt") else continue_train.load_hf(path).state_dict()
        for k, v in sd.items():
            out[k] = out.get(k, 0) + v.float() * (float(w) / total)
    return out


def model(spec, data, out):
    d = out + "/model"
    os.makedirs(d, exist_ok=True)
    m = M.Model()
    m.load_state_dict(states(spec))
    sd = {k: stio.bf16_round(v.numpy()) for k, v in M.hf_state(m).items()}
    for k in sd:
        sd[k] = np.where(np.abs(sd[k]) < 2.0**-14, 0, sd[k]).astype(np.float32)  # exact in f16 too
    stio.write(d + "/model.safetensors", {k: ("BF16", v) for k, v in sd.items()}, {"format": "pt"})
    json.dump(config(), open(d + "/config.json", "w"), indent=2)
    json.dump(
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}, open(d + "/generation_config.json", "w")
    )
    shutil.copy(data + "/tokenizer.json", d)
    os.chmod(d + "/tokenizer.json", 0o644)
    json.dump(
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": C.SPECIAL[0],
            "eos_token": C.SPECIAL[1],
            "pad_token": C.SPECIAL[2],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
            "tokenizer_class": "LlamaTokenizerFast",
            "chat_template": TEMPLATE,
        },
        open(d + "/tokenizer_config.json", "w"),
        ensure_ascii=False,
        indent=1,
    )
    for ty in ("Q8_0", "F16"):
        to_gguf.main(d, f"{out}/trained.{ty}.gguf", type=ty)
    print({ty: os.path.getsize(f"{out}/trained.{ty}.gguf") for ty in ("Q8_0", "F16")}, flush=True)


def logits(m, ids, last=None):
    with torch.no_grad():
        y = m(torch.tensor([list(map(int, ids))]), dtype=torch.float32, last=last)
    return y[0]


def nll_chunks(m, toks, T):  # mean over positions 1..T-1 of each window, nothing prepended
    out = []
    for i in range(0, len(toks) - T + 1, T):
        x = toks[i : i + T]
        lp = torch.log_softmax(logits(m, x).double(), -1)
        out.append(float(-lp[torch.arange(T - 1), torch.from_numpy(x[1:].astype(np.int64))].mean()))
    return out


def golden(data, out, prompts):
    torch.set_num_threads(int(os.environ.get("NT", 1)))
    enc = C.Enc(data)
    m = continue_train.load_hf(out + "/model")
    q8 = continue_train.load_hf(out + "/trained.Q8_0.gguf")
    G = {}
    R = {"params": sum(p.numel() for p in m.parameters())}
    P = np.concatenate([np.fromfile(f"{data}/natural.{nm}", np.uint16) for nm in ("syn", "real")]).astype(
        np.int32
    )
    G["ppl.tokens"] = ("I32", P)
    x = P[100:400]
    R["torch_vs_numpy64_max_abs"] = float(
        np.abs(
            dsref.Model(config(), stio.read(out + "/model/model.safetensors")).forward(x, "absorbed")
            - logits(m, x).numpy()
        ).max()
    )
    print(R, flush=True)
    for key, mm, T in (
        ("ppl.nll_512", m, 512),
        ("ppl.Q8_0.nll_512", q8, 512),
        ("ppl.nll_2048", m, 2048),
        ("ppl.Q8_0.nll_2048", q8, 2048),
    ):
        n = nll_chunks(mm, P, T)
        G[key] = ("F32", np.array(n, np.float32))
        h = 8192 // T
        R[key.replace("nll", "perplexity")] = {
            "all": float(np.exp(np.mean(n))),
            "generated": float(np.exp(np.mean(n[:h]))),
            "real": float(np.exp(np.mean(n[h:]))),
        }
    print(json.dumps(R), flush=True)
    seen = {}
    for line in open(prompts):
        p = json.loads(line)
        L = len(p["tokens"])
        i = seen.get(L, 0)
        seen[L] = i + 1
        if L > 8192 or i >= 5:
            continue
        G[f"needle.{L}.{i}.tokens"] = ("I32", np.array(p["tokens"], np.int32))
        # as below, of the file that tests have
        G[f"needle.{L}.{i}.logits_last"] = ("F32", logits(q8, p["tokens"], last=1)[0].numpy())
        R.setdefault("needle", {})[f"{L}.{i}"] = {"kind": p["kind"], "answer": p["answer"]}
    r = random.Random(77)
    w = C.World(r)
    fs = [C.make_fact(w, k, set()) for k in ("code", "who", "pet", "where")]
    ctx = " ".join(C.strip(x[0]) + " " + C.strip(w.event()) for x in fs)
    R["generate"] = []
    for i, p in enumerate(
        [
            "User: Tell me a story about a fox.\n\nAssistant:",
            "Once upon a time there was",
            f"User: {ctx}\n\n{fs[0][1]}\n\nAssistant:",
            "GNU GENERAL PUBLIC LICENSE\n",
        ]
    ):
        ids = [0] + enc(p)
        G[f"gen.{i}.prompt"] = ("I32", np.array(ids, np.int32))
        g, mg = [], []
        for _ in range(128):
            top = logits(q8, ids + g, last=1)[0].topk(2)
            g.append(int(top.indices[0]))
            mg.append(float(top.values[0] - top.values[1]))
        G[f"gen.{i}.tokens"] = ("I32", np.array(g, np.int32))
        G[f"gen.{i}.margin"] = ("F32", np.array(mg, np.float32))
        R["generate"].append(
            {"prompt": p, "text": enc.tok.decode(g, skip_special_tokens=False), "min_margin": min(mg)}
        )
        print("----", p[-60:], "=>", R["generate"][-1]["text"], flush=True)
    stio.write(out + "/golden.safetensors", G)
    json.dump(R, open(out + "/golden.json", "w"), indent=1, ensure_ascii=False)


if __name__ == "__main__":
    {"model": model, "golden": golden}[sys.argv[1]](*sys.argv[2:])
