"""Compact numpy reference for DeepSeek-V2/V3 (MLA + MoE), written from the papers and DeepSeek's inference code.

Model(config_dict, tensors)   tensors: HF tensor names -> numpy arrays (any float dtype)
  .forward(ids, form="naive"|"absorbed", trace=None) -> logits [T, vocab]
  .stepwise(ids)  : token-by-token decode with a latent KV cache (absorbed form)
config_dict is a Hugging Face config.json of the *released* form (rope_theta + rope_scaling).
Variants (config keys read): q_lora_rank null/int, scoring_func softmax|sigmoid, topk_method
greedy|group_limited_greedy|noaux_tc, norm_topk_prob, routed_scaling_factor, yarn or no rope_scaling.
"""

import math
import numpy as np


def rms(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def yarn_mscale(s, m):
    return 1.0 if s <= 1 else 0.1 * m * math.log(s) + 1.0


def rope_freqs(c):
    """-> (inv_freq[rope_dim/2], cos/sin multiplier)"""
    d, base = c["qk_rope_head_dim"], c.get("rope_theta", 10000.0)
    f = 1.0 / base ** (np.arange(0, d, 2) / d)
    rs = c.get("rope_scaling")
    if not rs:
        return f, 1.0
    assert rs.get("type", rs.get("rope_type")) == "yarn"
    s, orig = rs["factor"], rs["original_max_position_embeddings"]
    cd = lambda rot: d * math.log(orig / (rot * 2 * math.pi)) / (2 * math.log(base))
    lo = max(math.floor(cd(rs.get("beta_fast", 32))), 0)
    hi = min(math.ceil(cd(rs.get("beta_slow", 1))), d - 1)
    if lo == hi:
        hi += 0.001
    ramp = np.clip((np.arange(d // 2) - lo) / (hi - lo), 0, 1)  # 0: keep, 1: interpolate
    m, ma = rs.get("mscale", 1), rs.get("mscale_all_dim", 0)
    return f / s * ramp + f * (1 - ramp), (yarn_mscale(s, m) / yarn_mscale(s, ma))


def softmax_scale(c):
    sc = (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]) ** -0.5
    rs = c.get("rope_scaling")
    if rs and rs.get("mscale_all_dim", 0):
        sc *= yarn_mscale(rs["factor"], rs["mscale_all_dim"]) ** 2
    return sc


def rope(x, pos, f, mul, dt=np.float64):  # x [T, ..., d]; pairs (2i, 2i+1) rotated together
    ang = (pos[:, None].astype(dt) * f[None].astype(dt)).astype(np.float64)
    c, s = np.cos(ang) * mul, np.sin(ang) * mul
    sh = (len(pos),) + (1,) * (x.ndim - 2) + (-1,)
    c, s = c.reshape(sh), s.reshape(sh)
    a, b = x[..., 0::2], x[..., 1::2]
    o = np.empty_like(x)
    o[..., 0::2] = a * c - b * s
    o[..., 1::2] = a * s + b * c
    return o


def topk_ids(s, k):  # descending, ties -> lower index first
    return np.argsort(-s, axis=-1, kind="stable")[..., :k]


def route(c, x, W, bias=None):
    """x [T,dim] -> (weights [T,K], ids [T,K], full scores [T,E], choice scores [T,E])"""
    lg = x @ W.T
    sig = c.get("scoring_func", "softmax") == "sigmoid"
    sc = 1 / (1 + np.exp(-lg)) if sig else softmax(lg)
    ch = sc + bias if bias is not None else sc.copy()
    G = c.get("n_group") or 1
    method = c.get("topk_method", "greedy")
    if G > 1 and method != "greedy":
        g = ch.reshape(len(x), G, -1)
        gs = np.sort(g, -1)[..., -2:].sum(-1) if bias is not None else g.max(-1)
        keep = np.zeros((len(x), G), bool)
        np.put_along_axis(keep, topk_ids(gs, c["topk_group"]), True, 1)
        ch = np.where(np.repeat(keep, g.shape[-1], 1), ch, -np.inf)
    ids = topk_ids(ch, c["num_experts_per_tok"])
    w = np.take_along_axis(sc, ids, 1)
    if sig and c.get("norm_topk_prob"):
        w = w / (w.sum(-1, keepdims=True) + 1e-20)
    return w * c.get("routed_scaling_factor", 1.0), ids, sc, ch


class Model:
    def __init__(s, cfg, tensors, dtype=np.float64):
        s.c = cfg
        s.t = {k: np.asarray(v).astype(dtype) for k, v in tensors.items()}
        s.f, s.mul = rope_freqs(cfg)
        s.scale = softmax_scale(cfg)
        s.eps = cfg.get("rms_norm_eps", 1e-6)
        s.angle = np.float64

    def q(s, p, x, pos):
        c, t = s.c, s.t
        H = c["num_attention_heads"]
        if c.get("q_lora_rank"):
            h = (
                rms(x @ t[p + "q_a_proj.weight"].T, t[p + "q_a_layernorm.weight"], 1e-6)
                @ t[p + "q_b_proj.weight"].T
            )
        else:
            h = x @ t[p + "q_proj.weight"].T
        h = h.reshape(len(x), H, -1)
        n = c["qk_nope_head_dim"]
        return h[..., :n], rope(h[..., n:], pos, s.f, s.mul, s.angle)

    def latent(s, p, x, pos):
        t = s.t
        L = s.c["kv_lora_rank"]
        h = x @ t[p + "kv_a_proj_with_mqa.weight"].T
        return rms(h[:, :L], t[p + "kv_a_layernorm.weight"], 1e-6), rope(h[:, L:], pos, s.f, s.mul, s.angle)

    def wkvb(s, p):
        c = s.c
        w = s.t[p + "kv_b_proj.weight"].reshape(c["num_attention_heads"], -1, c["kv_lora_rank"])
        n = c["qk_nope_head_dim"]
        return w[:, :n], w[:, n:]  # [H,nope,L], [H,v,L]

    def attn(s, p, x, pos, form, cache=None):
        qn, qp = s.q(p, x, pos)
        ckv, kp = s.latent(p, x, pos)
        qpos = pos
        if cache is not None:
            cache[0].append(ckv)
            cache[1].append(kp)
            ckv, kp = np.concatenate(cache[0]), np.concatenate(cache[1])
        kpos = np.arange(len(ckv))
        Wk, Wv = s.wkvb(p)
        if form == "naive":
            kn = np.einsum("tl,hnl->thn", ckv, Wk)
            v = np.einsum("tl,hvl->thv", ckv, Wv)
            sc = np.einsum("shn,thn->hst", qn, kn)
        else:
            qa = np.einsum("shn,hnl->shl", qn, Wk)
            sc = np.einsum("shl,tl->hst", qa, ckv)
        sc = (sc + np.einsum("shr,tr->hst", qp, kp)) * s.scale
        sc = softmax(np.where(kpos[None, None] <= qpos[None, :, None], sc, -np.inf))
        if form == "naive":
            o = np.einsum("hst,thv->shv", sc, v)
        else:
            o = np.einsum("shl,hvl->shv", np.einsum("hst,tl->shl", sc, ckv), Wv)
        return o.reshape(len(x), -1) @ s.t[p + "o_proj.weight"].T

    def mlp(s, p, x):
        t = s.t
        return (silu(x @ t[p + "gate_proj.weight"].T) * (x @ t[p + "up_proj.weight"].T)) @ t[
            p + "down_proj.weight"
        ].T

    def ffn(s, l, x, trace):
        p = f"model.layers.{l}.mlp."
        if l < s.c["first_k_dense_replace"]:
            return s.mlp(p, x)
        w, ids, sc, ch = route(s.c, x, s.t[p + "gate.weight"], s.t.get(p + "gate.e_score_correction_bias"))
        if trace is not None:
            trace.setdefault("route", {})[l] = (w, ids, sc, ch)
        y = np.zeros_like(x)
        for e in np.unique(ids):
            r, k = np.nonzero(ids == e)
            y[r] += s.mlp(f"{p}experts.{e}.", x[r]) * w[r, k, None]
        if s.c.get("n_shared_experts"):
            y = y + s.mlp(p + "shared_experts.", x)
        return y

    def layer(s, l, h, pos, form, trace=None, cache=None):
        t = s.t
        p = f"model.layers.{l}."
        h = h + s.attn(p + "self_attn.", rms(h, t[p + "input_layernorm.weight"], s.eps), pos, form, cache)
        return h + s.ffn(l, rms(h, t[p + "post_attention_layernorm.weight"], s.eps), trace)

    def head(s, h):
        t = s.t
        return (
            rms(h, t["model.norm.weight"], s.eps) @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T
        )

    def forward(s, ids, form="naive", trace=None):
        ids = np.asarray(ids)
        pos = np.arange(len(ids))
        h = s.t["model.embed_tokens.weight"][ids]
        for l in range(s.c["num_hidden_layers"]):
            h = s.layer(l, h, pos, form, trace)
            if trace is not None:
                trace.setdefault("hidden", []).append(h.copy())
        return s.head(h)

    def stepwise(s, ids):
        cache = [([], []) for _ in range(s.c["num_hidden_layers"])]
        out = []
        for i, tkn in enumerate(ids):
            h = s.t["model.embed_tokens.weight"][[tkn]]
            for l in range(s.c["num_hidden_layers"]):
                h = s.layer(l, h, np.array([i]), "absorbed", None, cache[l])
            out.append(s.head(h)[0])
        return np.stack(out)


# ---- FP8 e4m3 (DeepSeek-V3 checkpoint form: 128x128 blocks, weight_scale_inv) -----------------
def e4m3_table():
    v = np.zeros(256)
    for b in range(256):
        s, e, m = b >> 7, (b >> 3) & 15, b & 7
        x = (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        if e == 15 and m == 7:
            x = np.nan
        v[b] = -x if s else x
    return v


def fp8_quant(w, blk=128):
    """-> (codes uint8 [R,C], scale_inv float32 [ceil(R/128), ceil(C/128)]) with w ~ table[codes]*scale_inv"""
    tab = e4m3_table()
    pos = tab[:127]  # 0..448, monotone in the code
    R, C = w.shape
    S = np.zeros((-(-R // blk), -(-C // blk)), np.float32)
    q = np.zeros(w.shape, np.uint8)
    for i in range(S.shape[0]):
        for j in range(S.shape[1]):
            b = w[i * blk : (i + 1) * blk, j * blk : (j + 1) * blk].astype(np.float64)
            S[i, j] = np.float32(max(np.abs(b).max(), 1e-12) / 448)
            a = np.abs(b) / np.float64(S[i, j])
            k = np.clip(np.searchsorted(pos, a), 1, 126)
            lo, hi = pos[k - 1], pos[k]
            up = (a - lo > hi - a) | ((a - lo == hi - a) & (k % 2 == 0))
            code = np.where(up, k, k - 1)
            q[i * blk : (i + 1) * blk, j * blk : (j + 1) * blk] = (code | np.where(b < 0, 128, 0)).astype(
                np.uint8
            )
    return q, S


def fp8_dequant(q, S, blk=128):
    w = e4m3_table()[q].astype(np.float32)
    s = np.repeat(np.repeat(S, blk, 0), blk, 1)[: w.shape[0], : w.shape[1]]
    return w * s
