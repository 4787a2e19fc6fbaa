"""Small DeepSeek-V2-Lite-like model (MLA + MoE) in PyTorch, arranged for fast training on CPU (bf16, flattened tokens).
The state dict can be turned into Hugging Face `DeepseekV2ForCausalLM` names with hf_state()."""

import os
import torch
import torch.nn as nn
import torch.nn.functional as F

CFG = dict(
    vocab=2048,
    dim=256,
    layers=int(os.environ.get("LAYERS", 5)),
    heads=4,
    nope=32,
    rope=32,
    v=64,
    kv_lora=96,
    dense_inter=640,
    moe_inter=128,
    experts=8,
    topk=2,
    shared=1,
    first_dense=1,
    theta=500.0,
    eps=1e-6,
)
COMPILE = os.environ.get("COMPILE", "1") == "1"
fast = (lambda f: torch.compile(f, dynamic=False)) if COMPILE else (lambda f: f)


def _rms(x, w):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * w).to(x.dtype)


def _addrms(x, d, w):
    x = x + d
    return x, _rms(x, w)


def _rot(x, c, s):  # interleaved pairs
    x = x.float().unflatten(-1, (-1, 2))
    a, b = x[..., 0], x[..., 1]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)


def _qk(q, kp, kv, c, s, NO, R):  # q [N,H,NO+R], kp [N,R], kv [N,H,NO+V]
    dt = q.dtype
    c, s = c[:, None], s[:, None]
    H = q.shape[1]
    q = torch.cat([q[..., :NO], _rot(q[..., NO:], c, s).to(dt)], -1)
    k = torch.cat([kv[..., :NO], _rot(kp[:, None], c, s).to(dt).expand(-1, H, -1)], -1)
    return q, k, kv[..., NO:].contiguous()


def _swiglu(h):
    g, u = h.chunk(2, -1)
    return F.silu(g) * u


def _comb(y, w):
    return (y.float() * w).to(y.dtype)


FAST = [COMPILE]  # set FAST[0] = False for shapes that must not be compiled (evaluation)


def both(f):
    g = fast(f)
    return lambda *a: (g if FAST[0] else f)(*a)


rms, addrms, qk, swiglu, comb = map(both, (_rms, _addrms, _qk, _swiglu, _comb))


class RMS(nn.Module):
    def __init__(s, n):
        super().__init__()
        s.weight = nn.Parameter(torch.ones(n))


class Lin(nn.Module):
    def __init__(s, i, o, gain=1.0):
        super().__init__()
        s.weight = nn.Parameter(torch.randn(o, i) * gain * i**-0.5)

    def forward(s, x):
        return F.linear(x, s.weight.to(x.dtype))


class Attn(nn.Module):
    def __init__(s, c):
        super().__init__()
        s.c = c
        H = c["heads"]
        s.q_proj = Lin(c["dim"], H * (c["nope"] + c["rope"]))
        s.kv_a_proj_with_mqa = Lin(c["dim"], c["kv_lora"] + c["rope"])
        s.kv_a_layernorm = RMS(c["kv_lora"])
        s.kv_b_proj = Lin(c["kv_lora"], H * (c["nope"] + c["v"]))
        s.o_proj = Lin(H * c["v"], c["dim"], 0.2)
        s.tap = None  # a list: queries, keys and values of the next forward pass are put into it

    def forward(s, x, B, cos, sin):
        c = s.c
        N = x.shape[0]
        H = c["heads"]
        q = s.q_proj(x).view(N, H, -1)
        a = s.kv_a_proj_with_mqa(x)
        kv = s.kv_b_proj(rms(a[:, : c["kv_lora"]], s.kv_a_layernorm.weight)).view(N, H, -1)
        q, k, v = qk(q, a[:, c["kv_lora"] :], kv, cos, sin, c["nope"], c["rope"])
        q, k, v = (t.view(B, N // B, H, -1).transpose(1, 2) for t in (q, k, v))
        if s.tap is not None:
            s.tap[:] = q, k, v
        if v.shape[-1] != q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : c["v"]]
        return s.o_proj(o.transpose(1, 2).reshape(N, -1))


class MLP(nn.Module):
    def __init__(s, d, i):
        super().__init__()
        s.gu = nn.Parameter(torch.randn(2 * i, d) * d**-0.5)
        s.dn = nn.Parameter(torch.randn(d, i) * 0.2 * i**-0.5)

    def forward(s, x):
        return F.linear(swiglu(F.linear(x, s.gu.to(x.dtype))), s.dn.to(x.dtype))


class MoE(nn.Module):
    def __init__(s, c):
        super().__init__()
        s.c = c
        E, d, i = c["experts"], c["dim"], c["moe_inter"]
        s.gate = nn.Parameter(torch.randn(E, d) * 0.02)
        s.gu = nn.Parameter(torch.randn(E, 2 * i, d) * d**-0.5)
        s.dn = nn.Parameter(torch.randn(E, d, i) * 0.2 * i**-0.5)
        s.shared_experts = MLP(d, i * c["shared"])

    def forward(s, x):
        c = s.c
        N = len(x)
        E, K = c["experts"], c["topk"]
        p = F.linear(x.float(), s.gate).softmax(-1)
        w, idx = p.topk(K, -1)
        flat = idx.flatten()
        order = flat.argsort()
        cnt = torch.bincount(flat, minlength=E)
        sz = cnt.tolist()
        src = order // K
        xs = x.index_select(0, src)
        gu, dn = s.gu.to(x.dtype).unbind(0), s.dn.to(x.dtype).unbind(0)
        h = swiglu(torch.cat([F.linear(a, g) for a, g in zip(xs.split(sz), gu)]))
        y = comb(torch.cat([F.linear(a, d) for a, d in zip(h.split(sz), dn)]), w.flatten()[order][:, None])
        inv = torch.empty_like(order).scatter_(0, order, torch.arange(N * K))
        y = y.index_select(0, inv).view(N, K, -1).sum(1)
        s.aux = E * (cnt.float() / (N * K) * p.mean(0)).sum()
        s.load = cnt
        return y + s.shared_experts(x)


class Model(nn.Module):
    def __init__(s, c=CFG):
        super().__init__()
        s.c = c
        s.embed_tokens = nn.Embedding(c["vocab"], c["dim"])
        nn.init.normal_(s.embed_tokens.weight, std=0.5)
        s.layers = nn.ModuleList()
        for l in range(c["layers"]):
            m = nn.Module()
            m.self_attn = Attn(c)
            m.mlp = MLP(c["dim"], c["dense_inter"]) if l < c["first_dense"] else MoE(c)
            m.input_layernorm = RMS(c["dim"])
            m.post_attention_layernorm = RMS(c["dim"])
            s.layers.append(m)
        s.tap = {}  # layer: the residual stream after it, for those that are keys already
        s.norm = RMS(c["dim"])
        s.lm_head = Lin(c["dim"], c["vocab"], 0.0)
        s.cs = {}

    def angles(s, B, T):
        if (B, T) not in s.cs:
            inv = 1.0 / s.c["theta"] ** (torch.arange(0, s.c["rope"], 2).float() / s.c["rope"])
            f = torch.outer(torch.arange(T).float(), inv)
            s.cs = {(B, T): (f.cos().repeat(B, 1).contiguous(), f.sin().repeat(B, 1).contiguous())}
        return s.cs[(B, T)]

    def forward(s, ids, tgt=None, wt=None, dtype=torch.bfloat16, last=None, hidden=False):
        """hidden: what lm_head would read, and the balance loss"""
        B, T = ids.shape
        c, sn = s.angles(B, T)
        x = s.embed_tokens(ids.flatten()).to(dtype)
        aux = 0.0
        d = None
        for i, m in enumerate(s.layers):
            h = rms(x, m.input_layernorm.weight)
            x, h = addrms(x, m.self_attn(h, B, c, sn), m.post_attention_layernorm.weight)
            x = x + m.mlp(h)
            if i in s.tap:
                s.tap[i] = x
            if isinstance(m.mlp, MoE):
                aux = aux + m.mlp.aux
        if last is not None:
            x = x.view(B, T, -1)[:, -last:].reshape(B * last, -1)
            return s.lm_head(_rms(x, s.norm.weight)).view(B, last, -1)
        h = rms(x, s.norm.weight)
        if hidden:
            return h, aux
        if tgt is None:
            return s.lm_head(h).view(B, T, -1)
        loss, l = HeadCE.apply(h, s.lm_head.weight, tgt.flatten(), wt.flatten())
        return loss, aux, l


class HeadCE(torch.autograd.Function):
    """lm_head + weighted cross entropy, chunked; gradients are formed in the forward pass.
    teacher: None, or logits whose probabilities are the target by half, tgt by the other half"""

    @staticmethod
    def forward(ctx, x, W, tgt, wt, teacher=None):
        Wb = W.to(x.dtype)
        dW = torch.zeros(W.shape) if ctx.needs_input_grad[1] else None
        dx = torch.empty_like(x)
        ls = torch.empty(len(x))
        n = wt / wt.sum()
        for i in range(0, len(x), 1024):
            sl = slice(i, i + 1024)
            l, dl = (
                ce(F.linear(x[sl], Wb), tgt[sl], n[sl])
                if teacher is None
                else taught(F.linear(x[sl], Wb), tgt[sl], n[sl], teacher[sl])
            )
            ls[sl] = l
            dx[sl] = dl @ Wb
            if dW is not None:
                dW += dl.T @ x[sl]
        ctx.save_for_backward(dx, dW)
        ctx.mark_non_differentiable(ls)
        return (ls * n).sum(), ls

    @staticmethod
    def backward(ctx, g, _):
        dx, dW = ctx.saved_tensors
        return dx * g.to(dx.dtype), None if dW is None else dW * g, None, None, None


def _ce(lg, t, n):
    lg = lg.float()
    lp = lg - lg.logsumexp(-1, keepdim=True)
    V = torch.arange(lg.shape[-1])
    oh = t[:, None] == V[None]
    return -torch.where(oh, lp, 0.0).sum(-1), ((lp.exp() - oh.float()) * n[:, None]).to(torch.bfloat16)


def _taught(lg, t, n, teacher):
    lg = lg.float()
    lp = lg - lg.logsumexp(-1, keepdim=True)
    oh = t[:, None] == torch.arange(lg.shape[-1])[None]
    to = 0.5 * (oh.float() + teacher.float().softmax(-1))
    return -torch.where(oh, lp, 0.0).sum(-1), ((lp.exp() - to) * n[:, None]).to(torch.bfloat16)


ce, taught = both(_ce), both(_taught)


def hf_state(m):
    sd = {}
    for k, v in m.state_dict().items():
        v = v.detach().float()
        p = k if k.startswith("lm_head") else "model." + k
        if k.endswith("mlp.gate"):
            sd[p + ".weight"] = v
        elif k.endswith(".gu") or k.endswith(".dn"):
            b = p.rsplit(".", 1)[0]
            for e, w in ([("", v)] if v.ndim == 2 else [(f"experts.{e}.", v[e]) for e in range(len(v))]):
                if k.endswith("gu"):
                    g, u = w.chunk(2, 0)
                    sd[f"{b}.{e}gate_proj.weight"] = g.contiguous()
                    sd[f"{b}.{e}up_proj.weight"] = u.contiguous()
                else:
                    sd[f"{b}.{e}down_proj.weight"] = w.contiguous()
        else:
            sd[p] = v
    return sd


class Muon(torch.optim.Optimizer):
    """momentum + Newton-Schulz orthogonalisation; gate/up halves and experts are treated as separate matrices"""

    def __init__(s, ps, lr):
        super().__init__(ps, dict(lr=lr, initial_lr=lr, mu=0.95))

    @torch.no_grad()
    def step(s):
        for g in s.param_groups:
            groups = {}
            for p in g["params"]:
                if p.grad is None:
                    continue
                b = s.state[p].setdefault("b", torch.zeros_like(p))
                b.lerp_(p.grad, 1 - g["mu"])
                u = p.grad.lerp_(b, g["mu"])
                q = p
                if getattr(p, "halves", False):
                    u, q = u.unflatten(-2, (2, -1)), p.unflatten(-2, (2, -1))
                u, q = u.reshape(-1, *u.shape[-2:]), q.view(-1, *q.shape[-2:])
                groups.setdefault(u.shape[-2:], []).append((u, q))
            for sh, l in groups.items():
                X = torch.cat([u for u, _ in l]).to(torch.bfloat16)
                tr = sh[0] > sh[1]
                if tr:
                    X = X.mT.contiguous()
                X = X / (X.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(X.dtype)
                for _ in range(5):
                    A = X @ X.mT
                    X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
                if tr:
                    X = X.mT
                X = X.float()
                i = 0
                sc = max(1, sh[0] / sh[1]) ** 0.5
                for u, q in l:
                    q.mul_(1 - g["lr"] * 0.05).add_(X[i : i + len(u)], alpha=-g["lr"] * sc)
                    i += len(u)


def optimizers(m, lr=0.02, alr=3e-3):
    for k, p in m.named_parameters():
        if k.endswith(".gu"):
            p.halves = True
    mats = [
        p
        for k, p in m.named_parameters()
        if p.ndim >= 2 and "embed" not in k and "lm_head" not in k and not k.endswith("mlp.gate")
    ]
    ids = {id(p) for p in mats}
    rest = [p for p in m.parameters() if id(p) not in ids]
    o1 = Muon(mats, lr)
    o2 = torch.optim.AdamW(rest, lr=alr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for g in o2.param_groups:
        g["initial_lr"] = alr
    return o1, o2, rest
