"""The fourth training: a layer more.

usage: LAYERS=5 grow_train.py DATA OUT INIT PHASE...      INIT: what to grow (HF folder, or a checkpoint of owner_train.py),
                                                 or a checkpoint of this script
PHASE, and its two learning rates, as in owner_train.py; RANK of RANKS processes, which share their gradients.
OLD: the share of the learning rate with which the other layers learn, with the rewards of owner_train.py; 0: not at
all.  ASKED: weight of the values of facts that are not owners, in answers; above 3 they are not the teacher's to
say.  TEACHER: as in owner_train.py.  LAYERS (model.py): of the grown model.

The new layer begins as a copy of the last whose outputs are zero, so that the model says what it said.  Why one is
needed: in a long text the heads of the last layer that look for the fact's end find it (share of their attention
0.98) and say the owner's name, but less loudly than those that follow a token to where it stood before say another.
A layer that comes after both can weigh them.  Embeddings and lm_head learn nothing here.
"""

import json
import os
import random
import sys
import time
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
import continue_train
import corpus as C
import model as M
import owner_train as O

LAST = M.CFG["layers"] - 1


def grow(m):
    """a model of CFG's layers that says what `m` says, which has one less"""
    if len(m.layers) != LAST:
        sys.exit(f"INIT has {len(m.layers)} layers: LAYERS={LAST + 1} grows one of {LAST}")
    state, new = m.state_dict(), M.Model().state_dict()
    for k in new:
        if k.startswith(f"layers.{LAST}."):
            old = state[k.replace(f".{LAST}.", f".{LAST - 1}.", 1)]
            new[k] = torch.zeros_like(old) if k.endswith(("o_proj.weight", ".dn")) else old.clone()
        else:
            new[k] = state[k]
    out = M.Model()
    out.load_state_dict(new)
    return out


def aux_loss(m, x, notes, lengths, T):
    """heads of the last layer should look for the fact's end, from the question's for the first token of the
    name, from there for the second, and say them"""
    f, f_row, q, q_row = O.gather(notes)
    loss, parts, but = 0.0, {}, None
    taps = [(LAST, m.layers[LAST].self_attn.tap)]
    for k in (0, 1):
        fk, qk = lengths[0] > k, (lengths[1] > k) & (q[:, 0] + k < T)
        if not fk.any() or not qk.any():
            continue
        look, seen, (layer, head) = O.best(taps, q_row[qk], q[qk, 0] + k, q[qk, 1], 2, but)
        said = O.said_loss(m, layer, head, f_row[fk], f[fk, 0], x[f_row[fk], f[fk, 4] + k])
        loss, but = loss + look + said, (layer, head)
        parts |= {f"look{k + 1}": seen, f"said{k + 1}": said.item(), f"head{k + 1}": head}
    return loss, parts


def evaluate(m, data, rows):
    M.FAST[0] = False
    with torch.no_grad():
        out = O.natural_loss(m, data)
        for kind, prompts in rows.items():
            hits = [m(torch.tensor([i + a[:-1]]), last=len(a)).argmax(-1)[0].tolist() == a for i, a in prompts]
            out[kind] = f"{sum(hits)}/{len(hits)}"
    M.FAST[0] = M.COMPILE
    return out


def main(data, out, init, *phases):
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("RANKS", 1))
    os.makedirs(out, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    if ranks > 1:
        torch.distributed.init_process_group("gloo", f"file://{os.path.abspath(out)}/meet", rank=rank, world_size=ranks)
    seed = int(os.environ.get("SEED", 31))
    rng = random.Random(seed * 100 + rank)
    enc, pools = C.Enc(data), O.Pools(data, rng)
    has = enc("Anna has")[-1]
    saved = torch.load(init) if init.endswith(".pt") else None
    if saved and "grown" in saved:
        m = M.Model()
        m.load_state_dict(saved["m"])
    elif saved:
        small = M.Model(dict(M.CFG, layers=LAST))
        small.load_state_dict(saved["m"])
        m = grow(small)
    else:
        m = grow(continue_train.load_hf(init))
    old = float(os.environ.get("OLD", 0))
    readers = O.Readers(M.CFG)
    if saved and "readers" in saved:
        readers.load_state_dict(saved["readers"])
    mine = {p for k, p in m.named_parameters() if k.startswith(f"layers.{LAST}.")}
    for k, p in m.named_parameters():
        p.requires_grad = p in mine or (old > 0 and k.startswith(("layers.", "norm.")))
    o1, o2, _ = M.optimizers(m)
    for o in (o1, o2):
        (group,) = o.param_groups
        theirs = [p for p in group["params"] if p not in mine]
        group["params"] = [p for p in group["params"] if p in mine]
        o.add_param_group({**group, "params": theirs, "initial_lr": group["initial_lr"] * old})
    o2.add_param_group({**o2.param_groups[1], "params": list(readers.parameters())})
    params = [p for p in (*m.parameters(), *readers.parameters()) if p.requires_grad]
    if old:
        m.tap[O.SECOND] = None
        for i in (O.SECOND, *O.LOOKING):
            m.layers[i].self_attn.tap = []
    teacher = continue_train.load_hf(os.environ["TEACHER"]) if os.environ.get("TEACHER") else None
    m.layers[LAST].self_attn.tap = []
    checks = {}
    if rank == 0:
        r = random.Random(4242)
        for kind, L, n in (("who", 8192, 20), ("who", 2048, 20), ("where", 8192, 5), ("code", 8192, 5)):
            checks[f"{kind}{L}"] = [C.needle(r, enc, L, (i + 0.5) / n, kind)[:2] for i in range(n)]
        log = open(out + "/log.jsonl", "a")

    def report(**what):
        if rank:
            return
        what |= evaluate(m, data, checks)
        print(what, flush=True)
        log.write(json.dumps(what) + "\n")
        log.flush()
        state = {"m": m.state_dict(), "readers": readers.state_dict(), "grown": True}
        torch.save(state, out + "/ck.tmp")
        os.replace(out + "/ck.tmp", out + "/ck.pt")

    if not os.environ.get("BRIEF"):
        report(start=init, seed=seed)
    step = tokens = 0
    for spec in phases:
        phase, seen = O.Phase(spec), {}
        spent = since = 0.0
        while spent < phase.minutes * 60:
            begin = time.time()
            T, rows, n_owners = phase.rows(pools, int(os.environ.get("N", 8192)))
            x, w, notes, lengths = O.tensors(rows, phase.answer, has, float(os.environ.get("ASKED", 3)))
            q, q_row = O.gather(notes)[2:]
            rate = min(1, (step + 1) / 20) * phase.rate(spent)
            for g in o1.param_groups + o2.param_groups:
                g["lr"] = g["initial_lr"] * rate
            known = None
            if teacher and n_owners < len(rows):
                with torch.no_grad():
                    known = teacher(x[n_owners:, :-1]).flatten(0, 1)
                    asked = w[n_owners:, 1:].flatten() > 3
                    known[asked] = 40 * F.one_hot(x[n_owners:, 1:].flatten()[asked], known.shape[-1]).to(known.dtype)
            h, balance = m(x[:, :-1], hidden=True)
            loss, each = O.token_loss(m, h.view(len(x), T, -1), x, w, n_owners, phase.owners, known)
            loss = loss + 0.01 * balance
            extra, parts = aux_loss(m, x, notes, lengths, T) if phase.aux and len(q) else (0.0, {})
            if phase.aux and old and len(q):
                below, of_below = O.aux_loss(m, readers, x, notes, lengths, T)
                extra, parts = extra + below, of_below | parts
            (loss + phase.aux * extra).backward()
            if ranks > 1:
                flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params])
                torch.distributed.all_reduce(flat)
                for p, g in zip(params, flat.split([p.numel() for p in params])):
                    p.grad = (g / ranks).view_as(p).clone()
            torch.nn.utils.clip_grad_norm_([p for g in o2.param_groups for p in g["params"]], 1.0)
            o1.step()
            o2.step()
            m.zero_grad(set_to_none=True)
            readers.zero_grad(set_to_none=True)
            step += 1
            tokens += x[:, 1:].numel() * ranks
            parts |= {f"owners{T}": each[:n_owners].mean().item(), f"others{T}": each[n_owners:].mean().item()}
            if len(q):
                parts[f"who{T}"] = each[q_row, q[:, 0]].mean().item()
                if (lengths[1] > 1).any():
                    two = (lengths[1] > 1) & (q[:, 0] + 1 < T)
                    parts[f"second{T}"] = each[q_row[two], q[two, 0] + 1].mean().item()
            for k, v in parts.items():
                if v == v:
                    seen.setdefault(k, []).append(v)
            took = torch.tensor(min(60.0, time.time() - begin))
            if ranks > 1:
                torch.distributed.broadcast(took, 0)
            spent += took.item()
            since += took.item()
            if step % 10 == 0 and rank == 0:
                last = {k: round(float(np.mean(v[-10:])), 3) for k, v in seen.items()}
                print(f"{step} {spent:.0f}s", last, f"lr {rate:.3f} tokens {tokens}", flush=True)
            if since > float(os.environ.get("EVERY", 600)) or spent >= phase.minutes * 60:
                since = 0.0
                last = {k: round(float(np.mean(v[-40:])), 3) for k, v in seen.items()}
                report(step=step, sec=round(spent), tokens=tokens, phase=spec, loss=last)


if __name__ == "__main__":
    main(*sys.argv[1:])
