"""Goes on training from an exported model, on the CPU.

usage: continue_train.py DATA OUT INIT PHASE...      INIT: HF folder or a checkpoint of this script (.pt)
PHASE = minutes:lr_begin:lr_end:mix          mix = T*share,T*share...  (T: row length; share of the tokens)
Learning rates are factors of 0.02 (Muon) and 3e-3 (AdamW).  A checkpoint is written every few minutes.
"""

import json
import os
import random
import sys
import time
import numpy as np
import torch
import corpus as C
import model as M
import stio


def load_hf(path):
    """inverse of model.hf_state.  path: a Hugging Face folder, or a GGUF beside it, dequantised"""
    if path.endswith(".gguf"):
        import to_gguf

        file, path = path, os.path.dirname(path) + "/model"
        t = to_gguf.read_back(file, json.load(open(path + "/config.json")))
    else:
        t = stio.read(path + "/model.safetensors")
    t = {k: torch.from_numpy(np.array(v, np.float32)) for k, v in t.items()}
    m = M.Model(dict(M.CFG, layers=json.load(open(path + "/config.json"))["num_hidden_layers"]))
    sd = {}
    for k, v in m.state_dict().items():
        p = k if k.startswith("lm_head") else "model." + k
        b = p.rsplit(".", 1)[0]
        if k.endswith("mlp.gate"):
            sd[k] = t[p + ".weight"]
        elif k.endswith((".gu", ".dn")):
            one = lambda e: (
                torch.cat([t[f"{b}.{e}gate_proj.weight"], t[f"{b}.{e}up_proj.weight"]])
                if k.endswith("gu")
                else t[f"{b}.{e}down_proj.weight"]
            )
            sd[k] = one("") if v.ndim == 2 else torch.stack([one(f"experts.{e}.") for e in range(len(v))])
        else:
            sd[k] = t[p]
    m.load_state_dict(sd)
    return m


class Flat:  # packed short documents
    def __init__(s, d, seeds, rng):
        s.i = np.concatenate([np.fromfile(f"{d}/short{x}.ids", np.uint16) for x in seeds])
        s.w = np.concatenate([np.fromfile(f"{d}/short{x}.w", np.uint8) for x in seeds])
        s.st = np.flatnonzero(s.i == 0)
        s.rng = rng
        s.T = 0

    def row(s, T):
        j = min(int(s.st[s.rng.randrange(len(s.st))]), len(s.i) - T - 1)
        return s.i[j : j + T + 1], s.w[j : j + T + 1]


class Rows:
    def __init__(s, d, T):
        s.i = np.fromfile(f"{d}/long{T}.ids", np.uint16).reshape(-1, T + 1)
        s.w = np.fromfile(f"{d}/long{T}.w", np.uint8).reshape(-1, T + 1)
        s.k = -1

    def row(s, T):
        s.k += 1
        return s.i[s.k % len(s.i)], s.w[s.k % len(s.w)]


KINDS = ("code", "who", "pet", "where", "home")


def retrieval(m, enc, L, n, seed, held=False, kinds=KINDS):
    r = random.Random(seed + L)
    hit = {k: [0, 0] for k in kinds}
    for i in range(n):
        k = kinds[i % len(kinds)]
        ids, val, *_ = C.needle(r, enc, L, (i + 0.5) / n, k, held)
        x = torch.tensor([ids + val[:-1]])
        hit[k][0] += m(x, last=len(val)).argmax(-1)[0].tolist() == val
        hit[k][1] += 1
    return {k: f"{a}/{b}" for k, (a, b) in hit.items()}


def evaluate(m, data, enc, lens):
    M.FAST[0] = False
    out = {}
    with torch.no_grad():
        for nm in ("syn", "real"):
            x = torch.from_numpy(
                np.fromfile(f"{data}/heldout.{nm}", np.uint16)[: 8 * 513].astype(np.int64).reshape(8, 513)
            )
            out["nll_" + nm] = round(m(x[:, :-1], x[:, 1:], torch.ones(8, 512))[2].mean().item(), 4)
        for L, n, held in lens:
            out[f"{'held' if held else 'seen'}{L}"] = retrieval(m, enc, L, n, 555, held)
    M.FAST[0] = M.COMPILE
    return out


def main(data, out, init, *phases):
    os.makedirs(out, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("NT", 1)))
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    rng = random.Random(int(os.environ.get("SEED", 21)))
    enc = C.Enc(data)
    opt = None
    if init.endswith(".pt"):
        ck = torch.load(init)
        m = M.Model()
        m.load_state_dict(ck["m"])
        opt = (ck.get("o1"), ck.get("o2"))
    else:
        m = load_hf(init)
    o1, o2, rest = M.optimizers(m)
    if opt and opt[0]:
        o1.load_state_dict(opt[0])
        o2.load_state_dict(opt[1])
    log = open(out + "/log.jsonl", "a")
    EV = [(512, 20, False), (512, 20, True)]
    ev0 = evaluate(m, data, enc, EV)
    print("start", ev0, flush=True)
    log.write(json.dumps({"start": init, **ev0}) + "\n")
    flat = Flat(data, os.environ.get("SHORT", "101").split("+"), rng)
    rows = {}
    step = tokens = 0
    begin = time.time()
    for spec in phases:
        minutes, l0, l1, mix = spec.split(":")
        dur = float(minutes) * 60
        mix = [(int(a.split("*")[0]), float(a.split("*")[1])) for a in mix.split(",")]
        t0 = last = time.time()
        acc = {}
        done = {T: 0 for T, _ in mix}
        while time.time() - t0 < dur:
            T = min(mix, key=lambda a: done[a[0]] / a[1])[0]
            N = max(int(os.environ.get("N", 4096)), T)
            done[T] += N  # the length that is furthest behind its share
            if T > 512 and T not in rows:
                rows[T] = Rows(data, T)
            part = [(flat if T <= 512 else rows[T]).row(T) for _ in range(N // T)]
            x = torch.from_numpy(np.stack([a for a, _ in part]).astype(np.int64))
            w = torch.from_numpy(np.stack([b for _, b in part]).astype(np.float32) / 50)
            sc = min(1, (step + 1) / 40) * (float(l0) + (float(l1) - float(l0)) * (time.time() - t0) / dur)
            for o in (o1, o2):
                for g in o.param_groups:
                    g["lr"] = g["initial_lr"] * sc
            loss, aux, _ = m(x[:, :-1], x[:, 1:], w[:, 1:].contiguous())
            (loss + 0.01 * aux).backward()
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            o1.step()
            o2.step()
            m.zero_grad(set_to_none=True)
            step += 1
            tokens += N
            acc.setdefault(T, []).append(loss.item())
            if step % 20 == 0:
                print(
                    f"{step} {time.time() - begin:.0f}s",
                    {k: round(float(np.mean(v[-20:])), 3) for k, v in acc.items()},
                    f"lr {sc:.3f} tokens {tokens}",
                    flush=True,
                )
            if time.time() - last > 300 or time.time() - t0 >= dur:
                last = time.time()
                rec = dict(
                    step=step,
                    sec=round(last - begin),
                    tokens=tokens,
                    mix=spec,
                    loss={k: round(float(np.mean(v[-50:])), 3) for k, v in acc.items()},
                    **evaluate(m, data, enc, EV if time.time() - t0 < dur else EV + [(2048, 20, False)]),
                )
                print(rec, flush=True)
                log.write(json.dumps(rec) + "\n")
                log.flush()
                torch.save(
                    {"m": m.state_dict(), "o1": o1.state_dict(), "o2": o2.state_dict()}, out + "/ck.tmp"
                )
                os.replace(out + "/ck.tmp", out + "/ck.pt")
    os.replace(out + "/ck.pt", out + "/last.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
