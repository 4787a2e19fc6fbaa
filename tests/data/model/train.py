"""Train on CPU.  usage: train.py DATADIR OUTDIR INIT|- SPEC...   SPEC = T:minutes:tokens_per_step:pool[+pool..]
LR: env LR0 (fraction at start), LR1 (fraction at end; linear over the whole run), WARM steps."""

import json
import os
import random
import sys
import time
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import model as M
import corpus as C


class Flat:  # packed short documents
    def __init__(s, d, n, rng):
        s.i = np.fromfile(f"{d}/{n}.ids", np.uint16)
        s.w = np.fromfile(f"{d}/{n}.w", np.uint8)
        s.st = np.flatnonzero(s.i == 0)
        s.rng = rng

    def row(s, T):
        j = int(s.st[s.rng.randrange(len(s.st))]) if s.rng.random() < 0.7 else s.rng.randrange(len(s.i))
        j = min(j, len(s.i) - T - 1)
        return s.i[j : j + T + 1], s.w[j : j + T + 1]


class Rows:  # rows of T+1
    def __init__(s, d, T):
        s.i = np.fromfile(f"{d}/long{T}.ids", np.uint16).reshape(-1, T + 1)
        s.w = np.fromfile(f"{d}/long{T}.w", np.uint8).reshape(-1, T + 1)
        s.k = 0

    def row(s, T):
        s.k += 1
        return s.i[s.k % len(s.i)], s.w[s.k % len(s.w)]


def evaluate(m, data, enc, T):
    M.FAST[0] = False
    r = random.Random(5)
    out = {}
    with torch.no_grad():
        for nm in ("syn", "real"):
            x = torch.from_numpy(
                np.fromfile(f"{data}/heldout.{nm}", np.uint16)[: 8 * 513].astype(np.int64).reshape(8, 513)
            )
            out["nll_" + nm] = round(m(x[:, :-1], x[:, 1:], torch.ones(8, 512))[2].mean().item(), 3)
        for L in sorted({256, T}):
            hit = full = n = 0
            ns = 20 if L <= 512 else 8
            for i in range(ns):
                ids, val, *_ = C.needle(
                    r, enc, L, (i + 0.5) / ns, ("code", "who", "pet", "where")[i % 4], held=True
                )
                x = torch.tensor([ids + val[:-1]])
                p = m(x, last=len(val)).argmax(-1)[0].tolist()
                hit += p[0] == val[0]
                full += p == val
                n += 1
            out[f"needle{L}"] = f"{hit}/{full}/{n}"
    M.FAST[0] = M.COMPILE
    return out


def main(data, out, init, *specs):
    os.makedirs(out, exist_ok=True)
    torch.manual_seed(0)
    rng = random.Random(int(os.environ.get("SEED", 7)))
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    enc = C.Enc(data)
    m = M.Model()
    o1, o2, rest = M.optimizers(m, float(os.environ.get("MLR", 0.02)), float(os.environ.get("ALR", 3e-3)))
    if init != "-":
        ck = torch.load(init)
        m.load_state_dict(ck["m"])
        if "o2" in ck:
            o1.load_state_dict(ck["o1"])
            o2.load_state_dict(ck["o2"])
        for o, b in ((o1, float(os.environ.get("MLR", 0.02))), (o2, float(os.environ.get("ALR", 3e-3)))):
            for g in o.param_groups:
                g["initial_lr"] = b
    print("params", sum(p.numel() for p in m.parameters()), flush=True)
    specs = [x.split(":") for x in specs]
    total = sum(float(x[1]) for x in specs) * 60
    l0, l1, warm = (
        float(os.environ.get("LR0", 1)),
        float(os.environ.get("LR1", 1)),
        int(os.environ.get("WARM", 60)),
    )
    t00 = time.time()
    step = tokens = 0
    log = open(out + "/log.jsonl", "a")
    for sp in specs:
        T, dur, N = int(sp[0]), float(sp[1]) * 60, int(sp[2])
        B = N // T
        names = sp[3].split("+")
        sh = [Flat(data, n, rng) for n in names if not n.startswith("long")]
        lg = Rows(data, T) if any(n.startswith("long") for n in names) else None
        t0 = time.time()
        last = t0
        acc = []
        rep = t0
        while time.time() - t0 < dur:
            rows = [
                (lg if lg and (not sh or rng.random() < 0.65) else rng.choice(sh)).row(T) for _ in range(B)
            ]
            x = torch.from_numpy(np.stack([a for a, _ in rows]).astype(np.int64))
            w = torch.from_numpy(np.stack([b for _, b in rows]).astype(np.float32) / 50)
            fr = min(1, (time.time() - t00) / total)
            sc = min(1, (step + 1) / warm) * (l0 + (l1 - l0) * fr)
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
            acc.append(loss.item())
            if time.time() - rep > 20:
                rep = time.time()
                print(
                    f"{step} {rep-t00:.0f}s T{T} loss {np.mean(acc[-30:]):.3f} aux {float(aux):.2f} lr {sc:.2f} tok/s {tokens/(time.time()-t00):.0f}",
                    flush=True,
                )
            if time.time() - last > 90:
                last = time.time()
                rec = dict(
                    step=step,
                    sec=round(last - t00),
                    tokens=tokens,
                    T=T,
                    loss=round(float(np.mean(acc[-50:])), 3),
                    **evaluate(m, data, enc, T),
                )
                print(rec, flush=True)
                log.write(json.dumps(rec) + "\n")
                log.flush()
                torch.save({"m": m.state_dict()}, out + "/ck.pt")
        rec = dict(
            phase_end=True,
            step=step,
            sec=round(time.time() - t00),
            tokens=tokens,
            T=T,
            loss=round(float(np.mean(acc[-50:])), 3),
            **evaluate(m, data, enc, T),
        )
        print(rec, flush=True)
        log.write(json.dumps(rec) + "\n")
        log.flush()
        torch.save(
            {"m": m.state_dict(), "o1": o1.state_dict(), "o2": o2.state_dict()}, f"{out}/phase_T{T}.pt"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
