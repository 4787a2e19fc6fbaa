"""The third training: owners named before the thing, on the CPU.

usage: owner_train.py DATA OUT INIT PHASE...           INIT: HF folder or a checkpoint of this script (.pt)
PHASE = what:minutes:lr_begin:lr_end:aux:owners:mix    mix = T*share,T*share...  (T: row length; share of the tokens)
what: attention (everything else is frozen) or all.  owners: share of the rows that owner_corpus.py made; the
others are those of the earlier trainings.  Learning rates are factors of 0.02 (Muon) and 3e-3 (AdamW).
Minutes are those in which steps are made: a step that took longer than a minute was paused.
RANK=0 and RANK=1: two processes of one thread each, which sum their gradients; N: tokens per step of each.

`who` answers need steps that no other question needs, and the loss alone did not find them in 2 M tokens: the
end of "Anna has the red key" must hold "Anna", the end of the question the key's words, and from there the
fact's end must be looked up.  With aux > 0 each is rewarded where it happens: a linear probe after the second
layer reads the name and the words, a head of that layer should look from the fact's end to the name and from
the question's end to the key, and a head of the last two layers from the question's end to the fact's.  The
probes are thrown away.
"""

import json
import os
import random
import sys
import time
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import continue_train
import corpus as C
import model as M

SECOND, LOOKING = 1, (2, 3)  # layers


class Owners:
    """rows with the notes of owner_corpus.annotate"""

    def __init__(s, d, name, rng):
        z = np.load(f"{d}/owner_{name}.npz")
        s.ids, s.weights, s.facts, s.questions = (z[k] for k in ("ids", "weights", "facts", "questions"))
        s.begins, s.rng, s.rows, s.k = np.flatnonzero(s.ids == 0), rng, name.isdigit(), rng.randrange(1000)

    def row(s, T):
        if s.rows:
            s.k += 1
            j = s.k * (T + 1) % len(s.ids)
        else:
            j = min(int(s.begins[s.rng.randrange(len(s.begins))]), len(s.ids) - T - 1)
        cut = lambda x, col: x[slice(*np.searchsorted(x[:, col], (j, j + T - 1)))]
        f, q = cut(s.facts, 0), cut(s.questions, 0)
        q = q[q[:, 1] >= j]
        return (
            s.ids[j : j + T + 1],
            s.weights[j : j + T + 1],
            f - np.array([[j, 0, 0, 0, j]]),
            q - np.array([[j, j, 0, 0, 0, j]]),
        )


NO_NOTES = np.zeros((0, 5), np.int64), np.zeros((0, 6), np.int64)


class Pools:
    def __init__(s, d, rng):
        s.d, s.rng, s.open = d, rng, {}

    def get(s, key, make):
        if key not in s.open:
            s.open[key] = make()
        return s.open[key]

    def row(s, T, owners):
        if s.rng.random() < owners:
            name = str(T) if T > 512 else "dense" if T <= 256 or s.rng.random() < 0.3 else "text"
            return s.get(name, lambda: Owners(s.d, name, s.rng)).row(T)
        make = lambda: (
            continue_train.Rows(s.d, T)
            if T > 512
            else continue_train.Flat(s.d, os.environ.get("SHORT", "101+102+103").split("+"), s.rng)
        )
        return *s.get(("general", T > 512 and T), make).row(T), *NO_NOTES


class Probes(torch.nn.Module):
    def __init__(s, c):
        super().__init__()
        s.name, s.adj, s.obj = (torch.nn.Linear(c["dim"], c["vocab"]) for _ in range(3))
        for p in s.parameters():
            torch.nn.init.zeros_(p)

    def forward(s, x, at, words):
        """x: residual stream; words: dict of probe name -> ids"""
        h = F.rms_norm(x[at].float(), x.shape[-1:])
        return sum(F.cross_entropy(getattr(s, k)(h), t) for k, t in words.items())


def look_loss(tap, row, begin, to, width=1):
    """- log of the share of attention that goes from `begin` to `to` (and width - 1 after it), in the head
    that does it best; and that share"""
    queries, keys = tap
    shares = []
    for b in row.unique().tolist():
        mine = row == b
        i, j = begin[mine], to[mine]
        s = torch.einsum("hqd,hkd->qhk", queries[b][:, i].float(), keys[b].float()) * queries.shape[-1] ** -0.5
        s = s.masked_fill(torch.arange(s.shape[-1]) > i[:, None, None], -torch.inf).softmax(-1)
        shares.append(
            sum(s.gather(2, (j + k)[:, None, None].expand(-1, s.shape[1], 1)) for k in range(width))[..., 0]
        )
    shares = torch.cat(shares)
    loss = -torch.log(shares + 1e-5).mean(0)
    best = loss.argmin()
    return loss[best], shares[:, best].mean().item()


def aux_loss(m, probes, notes, T):
    """notes: of each row, (facts, questions)"""
    put = lambda k: (
        torch.from_numpy(np.concatenate([n[k] for n in notes])),
        torch.from_numpy(np.repeat(np.arange(len(notes)), [len(n[k]) for n in notes])),
    )
    (f, f_row), (q, q_row) = put(0), put(1)
    if not len(f) or not len(q):
        return 0.0, {}
    x, at, asked = m.tap[SECOND], f_row * T + f[:, 0], q_row * T + q[:, 0]
    tap = lambda i: m.layers[i].self_attn.tap
    name = (probes(x, at, {"name": f[:, 1], "adj": f[:, 2]}) + probes(x, at + 1, {"name": f[:, 1]})) / 2
    key = probes(x, asked, {"adj": q[:, 3], "obj": q[:, 4]})
    carry, carried = look_loss(tap(SECOND), f_row, f[:, 0], f[:, 4])
    fetch, fetched = look_loss(tap(SECOND), q_row, q[:, 0], q[:, 5])
    looks = [look_loss(tap(i), q_row, q[:, 0], q[:, 1], 2) for i in LOOKING]
    look, seen = min(looks, key=lambda x: x[0].item())
    parts = {"name": name.item(), "key": key.item(), "carried": carried, "fetched": fetched, "look": seen}
    return name + 0.5 * key + carry + fetch + look, parts


def together(parameters, seconds, n_ranks):
    """gradients become the mean over the processes; -> so do the seconds"""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([torch.tensor([seconds])] + [g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= n_ranks
    for p, part in zip(parameters, flat[1:].split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
    return float(flat[0])


def evaluate(m, data, enc):
    M.FAST[0] = False
    out = {}
    with torch.no_grad():
        for nm in ("syn", "real"):
            x = np.fromfile(f"{data}/natural.{nm}", np.uint16)[: 8 * 513].astype(np.int64).reshape(8, 513)
            x = torch.from_numpy(x)
            out["nll_" + nm] = round(m(x[:, :-1], x[:, 1:], torch.ones(8, 512))[2].mean().item(), 4)
        out["who512"] = continue_train.retrieval(m, enc, 512, 16, 556, False, ("who",))["who"]
        out["seen512"] = continue_train.retrieval(
            m, enc, 512, 12, 555, False, ("code", "pet", "where", "home")
        )
    M.FAST[0] = M.COMPILE
    return out


def main(data, out, init, *phases):
    os.makedirs(out, exist_ok=True)
    rank, n_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("RANKS", 1))
    if n_ranks > 1:
        dist.init_process_group("gloo", f"file://{os.path.abspath(out)}/meet", rank=rank, world_size=n_ranks)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(rank)
    rng = random.Random(int(os.environ.get("SEED", 31)) + 1000 * rank)
    enc, pools = C.Enc(data), Pools(data, rng)
    m, probes, saved = M.Model(), Probes(M.CFG), None
    if init.endswith(".pt"):
        saved = torch.load(init)
        m.load_state_dict(saved["m"])
    else:
        m = continue_train.load_hf(init)
    o1, o2, rest = M.optimizers(m)
    o2.add_param_group({"params": list(probes.parameters()), "lr": 3e-3, "initial_lr": 3e-3})
    mean = {k: v.clone() for k, v in m.state_dict().items()}
    if saved and "probes" in saved:
        probes.load_state_dict(saved["probes"])
        o1.load_state_dict(saved["o1"])
        o2.load_state_dict(saved["o2"])
        mean = saved["mean"]
    m.tap[SECOND] = None
    for i in (SECOND, *LOOKING):
        m.layers[i].self_attn.tap = []
    log = open(out + "/log.jsonl", "a")

    def report(**what):
        if rank:
            return
        what |= evaluate(m, data, enc)
        print(what, flush=True)
        log.write(json.dumps(what) + "\n")
        log.flush()
        state = {"m": m, "o1": o1, "o2": o2, "probes": probes}
        torch.save({k: v.state_dict() for k, v in state.items()} | {"mean": mean}, out + "/ck.tmp")
        os.replace(out + "/ck.tmp", out + "/ck.pt")

    report(start=init)
    step = tokens = 0
    for spec in phases:
        part, minutes, l0, l1, aux, owners, mix = spec.split(":")
        for k, p in m.named_parameters():
            p.requires_grad_(part == "all" or ".self_attn." in k)
        learning = [p for p in [*m.parameters(), *probes.parameters()] if p.requires_grad]
        minutes, l0, l1, aux, owners = map(float, (minutes, l0, l1, aux, owners))
        mix = [(int(a.split("*")[0]), float(a.split("*")[1])) for a in mix.split(",")]
        done, seen = {T: 0 for T, _ in mix}, {}
        spent = since = 0.0
        while spent < minutes * 60:
            begin = time.time()
            T = min(mix, key=lambda a: done[a[0]] / a[1])[0]  # the length furthest behind its share
            N = max(int(os.environ.get("N", 4096)), T)
            done[T] += N
            rows = [pools.row(T, owners) for _ in range(N // T)]
            x = torch.from_numpy(np.stack([r[0] for r in rows]).astype(np.int64))
            w = torch.from_numpy(np.stack([r[1] for r in rows]).astype(np.float32) / 50)
            rate = min(1, (step + 1) / 30) * (l0 + (l1 - l0) * spent / minutes / 60)
            for g in o1.param_groups + o2.param_groups:
                g["lr"] = g["initial_lr"] * rate
            keep = N // 2 if part == "attention" else None
            loss, balance, _ = m(x[:, :-1], x[:, 1:], w[:, 1:].contiguous(), keep=keep)
            extra, parts = aux_loss(m, probes, [r[2:] for r in rows], T) if aux else (0.0, {})
            (loss + 0.01 * balance + aux * extra).backward()
            took = min(60.0, time.time() - begin)
            if n_ranks > 1:
                took = together(learning, took, n_ranks)
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            o1.step()
            o2.step()
            m.zero_grad(set_to_none=True)
            probes.zero_grad(set_to_none=True)
            for k, v in m.state_dict().items():
                mean[k].lerp_(v, max(1 / 60, 1 / (step + 1)) if v.dtype.is_floating_point else 1)
            step += 1
            tokens += N * n_ranks
            for k, v in {T: loss.item(), **parts}.items():
                seen.setdefault(k, []).append(v)
            spent += took
            since += took
            if step % 10 == 0 and not rank:
                last = {k: round(float(np.mean(v[-10:])), 3) for k, v in seen.items()}
                print(f"{step} {spent:.0f}s", last, f"lr {rate:.3f} tokens {tokens}", flush=True)
            if since > 400 or spent >= minutes * 60:
                since = 0.0
                last = {k: round(float(np.mean(v[-40:])), 3) for k, v in seen.items()}
                report(step=step, sec=round(spent), tokens=tokens, phase=spec, loss=last)


if __name__ == "__main__":
    main(*sys.argv[1:])
