"""The third training: owners named before the thing, on the CPU.

usage: owner_train.py DATA OUT INIT PHASE...           INIT: HF folder or a checkpoint of this script (.pt)
PHASE = minutes:lr_begin:lr_end:aux:owners:answer:mix    mix = T*share,T*share...  (T: row length; share of the tokens)
owners: share of the rows that owner_corpus.py made, and of the loss; the others are those of the earlier
trainings.  TEACHER: HF folder of a model whose probabilities are half of the target of those others, and to
whose weights every step returns by the share PULL of its learning rate.
answer: weight of an owner's name in an answer, where other text has 1 (and `hi` words 3).
Learning rates are factors of 0.02 (Muon) and 3e-3 (AdamW).
Minutes are those in which steps are made: a step that took longer than a minute was paused.

`who` answers need steps that no other question needs, and the loss alone did not find them in 2 M tokens: the
end of "Anna has the red key" must hold "Anna", the end of the question the key's words, and from there the
fact's end must be looked up.  With aux > 0 each is rewarded where it happens: the name and the words are read
from the residual stream after the second layer through a small matrix and the model's own lm_head (so that what
one name teaches serves every name), a head of that layer should look from the fact's end to the name and from
the question's end to the key, and a head of the last two layers from the question's end to the fact's; what
that head writes of a fact's end should be the name.  The readers are thrown away.
"""

import json
import os
import random
import sys
import time
import numpy as np
import torch
import torch.nn.functional as F
import continue_train
import corpus as C
import model as M

SECOND, LOOKING = 1, (2, 3)  # layers
NO_NOTES = np.zeros((0, 5), np.int64), np.zeros((0, 6), np.int64)


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
        f, q = f[f[:, 4] >= j], q[(q[:, 1] >= j) & (q[:, 5] >= j)]
        return (
            s.ids[j : j + T + 1],
            s.weights[j : j + T + 1],
            f - np.array([[j, 0, 0, 0, j]]),
            q - np.array([[j, j, 0, 0, 0, j]]),
        )


class Pools:
    def __init__(s, d, rng):
        s.d, s.rng, s.open = d, rng, {}

    def get(s, key, make):
        if key not in s.open:
            s.open[key] = make()
        return s.open[key]

    def row(s, T, owner):
        if owner:
            name = str(T) if T > 512 else s.rng.choice(("alike", "tight") if T < 256 else ("alike", "dense", "text"))
            return s.get(name, lambda: Owners(s.d, name, s.rng)).row(T)
        make = lambda: (
            continue_train.Rows(s.d, T)
            if T > 512
            else continue_train.Flat(s.d, os.environ.get("SHORT", "101+102+103").split("+"), s.rng)
        )
        return *s.get(("general", T > 512 and T), make).row(T), *NO_NOTES


class Phase:
    """minutes:lr_begin:lr_end:aux:owners:answer:mix, and how far it has come"""

    def __init__(s, spec):
        *numbers, mix = spec.split(":")
        s.minutes, s.lr_begin, s.lr_end, s.aux, s.owners, s.answer = map(float, numbers)
        s.mix = [(int(a.split("*")[0]), float(a.split("*")[1])) for a in mix.split(",")]
        s.done, s.owed = {T: 0 for T, _ in s.mix}, 0.0

    def rate(s, seconds):
        return s.lr_begin + (s.lr_end - s.lr_begin) * seconds / s.minutes / 60

    def rows(s, pools, n_tokens):
        """the next step's: their length, rows, how many of them, the first, are about owners"""
        T = min(s.mix, key=lambda a: s.done[a[0]] / a[1])[0]  # the length furthest behind its share
        n = max(1, n_tokens // T)
        s.done[T] += max(n_tokens, T)
        s.owed += s.owners * n
        n_owners = int(s.owed + 0.5)
        s.owed -= n_owners
        return T, [pools.row(T, i < n_owners) for i in range(n)], n_owners


def tensors(rows, answer, has, asked=3.0):
    """ids, weights, notes, and the lengths of names.  answer: weight of an owner's name in an answer; asked: of
    the values of other facts, which the texts give 3"""
    notes = [r[2:] for r in rows]
    x = torch.from_numpy(np.stack([r[0] for r in rows]).astype(np.int64))
    w = torch.from_numpy(np.stack([r[1] for r in rows]).astype(np.float32) / 50)
    w[w == 3] = asked
    q, q_row = gather(notes)[2:]
    lengths = name_lengths(x, notes, has) if len(q) else None
    for k in range(int(lengths[1].max()) if len(q) else 0):
        long = (lengths[1] > k) & (q[:, 0] + 1 + k < x.shape[1])
        w[q_row[long], q[long, 0] + 1 + k] = answer
    return x, w, notes, lengths


def token_loss(m, h, x, w, n_owners, owners, known):
    """h: what lm_head reads, [rows, T, dim]; owners: the share that the first n_owners rows have of the loss;
    known: None, or a teacher's logits for the others.  -> loss, and the loss of each token [rows, T]"""
    loss, each = 0.0, []
    first, last = slice(n_owners), slice(n_owners, None)
    for part, share, logits in ((first, owners, None), (last, 1 - owners, known)):
        if len(x[part]):
            at, to, weight = h[part], x[part, 1:], w[part, 1:]
            l, e = M.HeadCE.apply(
                at.flatten(0, 1), m.lm_head.weight, to.flatten(), weight.flatten(), logits
            )
            loss = loss + l * (share if 0 < n_owners < len(x) else 1)
            each.append(e)
    return loss, torch.cat(each).view(h.shape[:2])


class Readers(torch.nn.Module):
    """what the residual stream says of a name, an adjective, an object"""

    def __init__(s, c):
        super().__init__()
        for k in ("name", "adj", "obj", "more"):
            setattr(s, k, torch.nn.Parameter(torch.eye(c["dim"])))

    def forward(s, head, x, words):
        """head: lm_head's weight, which learns nothing here; words: dict of reader -> ids"""
        h = F.rms_norm(x.float(), x.shape[-1:])
        return {k: F.cross_entropy(h @ getattr(s, k) @ head.detach().T, t) for k, t in words.items()}


def looks(tap, row, begin, to, width=1):
    """of each head, the mean of - log of the share of attention that goes from `begin` to `to` (and width - 1
    after it), and the mean of that share"""
    queries, keys, _ = tap
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
    return -torch.log(shares + 1e-5).mean(0), shares.mean(0)


def best(taps, row, begin, to, width=1, but=None):
    """of the heads of several layers the one that looks best: loss, share, (layer, head).  `but` is another's."""
    each = [(i, h, l, s) for i, t in taps for h, (l, s) in enumerate(zip(*looks(t, row, begin, to, width)))]
    i, h, loss, share = min((e for e in each if e[:2] != but), key=lambda e: e[2].item())
    return loss, share.item(), (i, h)


def said_loss(m, layer, head, rows, at, names):
    """what the head writes where it looks at a fact's end should say the name to lm_head"""
    attn, v = m.layers[layer].self_attn, m.c["v"]
    out = F.linear(attn.tap[2][rows, head, at], attn.o_proj.weight[:, head * v : (head + 1) * v].to(torch.bfloat16))
    h = F.rms_norm(out.float(), out.shape[-1:]) * m.norm.weight.detach()
    return F.cross_entropy(h @ m.lm_head.weight.detach().T, names)


def gather(notes):
    """notes: of each row, (facts, questions) -> facts, their rows, questions, their rows"""
    put = lambda k: (
        torch.from_numpy(np.concatenate([n[k] for n in notes])),
        torch.from_numpy(np.repeat(np.arange(len(notes)), [len(n[k]) for n in notes])),
    )
    return *put(0), *put(1)


def name_lengths(x, notes, has):
    """tokens of each fact's name, and of the name that each question asks for"""
    f, f_row, q, q_row = gather(notes)
    words = x[f_row[:, None], (f[:, 4, None] + torch.arange(9)).clamp(max=x.shape[1] - 1)]
    n = (words == has).int().argmax(-1).clamp(min=1)
    of = {(r, e): k for r, e, k in zip(f_row.tolist(), f[:, 0].tolist(), n.tolist())}
    return n, torch.tensor([of.get(k, 1) for k in zip(q_row.tolist(), q[:, 1].tolist())], dtype=torch.long)


def more_loss(m, readers, x, notes, lengths, T, first_carry, first_look):
    """the same for the second token of names that have one: it follows the first wherever that stands in a
    long text, so it too must be looked up by the key"""
    f, f_row, q, q_row = gather(notes)
    f, f_row, q, q_row = (v[n > 1] for n, vs in zip(lengths, ((f, f_row), (q, q_row))) for v in vs)
    if not len(f) or not len(q):
        return 0.0, {}
    tap = lambda i: m.layers[i].self_attn.tap
    begin, second = q[:, 0] + 1, x[f_row, f[:, 4] + 1]
    said_first = m.tap[SECOND][f_row * T + f[:, 0]]
    more = readers(m.lm_head.weight, said_first, {"more": second})["more"]
    carry, carried, _ = best([(SECOND, tap(SECOND))], f_row, f[:, 0], f[:, 4] + 1, but=first_carry)
    fetch, fetched, _ = best([(SECOND, tap(SECOND))], q_row, begin, q[:, 5])
    look, seen, (layer, head) = best([(i, tap(i)) for i in LOOKING], q_row, begin, q[:, 1], 2, first_look)
    said = said_loss(m, layer, head, f_row, f[:, 0], second)
    parts = {"more": more.item(), "carried2": carried, "fetched2": fetched, "look2": seen, "said2": said.item()}
    return more + said + carry + fetch + look, parts


def aux_loss(m, readers, x, notes, lengths, T):
    f, f_row, q, q_row = gather(notes)
    if not len(f) or not len(q):
        return 0.0, {}
    residual = m.tap[SECOND]
    tap = lambda i: m.layers[i].self_attn.tap
    at = lambda row, i: residual[row * T + i]
    name = readers(m.lm_head.weight, at(f_row, f[:, 0]), {"name": f[:, 1]})["name"]
    key = readers(m.lm_head.weight, at(q_row, q[:, 0]), {"adj": q[:, 3], "obj": q[:, 4]})
    carry, carried, carrier = best([(SECOND, tap(SECOND))], f_row, f[:, 0], f[:, 4])
    fetch, fetched, _ = best([(SECOND, tap(SECOND))], q_row, q[:, 0], q[:, 5])
    look, seen, looker = best([(i, tap(i)) for i in LOOKING], q_row, q[:, 0], q[:, 1], 2)
    said = said_loss(m, *looker, f_row, f[:, 0], f[:, 1])
    parts = {"name": name.item(), "adj": key["adj"].item(), "obj": key["obj"].item()}
    parts |= {"carried": carried, "fetched": fetched, "look": seen, "said": said.item()}
    more, of_more = more_loss(m, readers, x, notes, lengths, T, carrier, looker)
    return name + said + 0.5 * (key["adj"] + key["obj"]) + carry + fetch + look + more, parts | of_more


def natural_loss(m, data):
    """mean loss of held-out text, generated and real, in rows of 512"""
    out = {}
    for nm in ("syn", "real"):
        x = np.fromfile(f"{data}/natural.{nm}", np.uint16)[: 15 * 513].astype(np.int64).reshape(15, 513)
        x = torch.from_numpy(x)
        out["nll_" + nm] = round(m(x[:, :-1], x[:, 1:], torch.ones(15, 512))[2].mean().item(), 4)
    return out


def evaluate(m, data, checks, enc):
    """held-out loss; of owners asked for, the share whose first token is right, by the order of the fact"""
    M.FAST[0] = False
    with torch.no_grad():
        out = natural_loss(m, data)
        for name, T, rows in checks:
            x = torch.from_numpy(np.stack([r[0] for r in rows]).astype(np.int64))
            _, _, q, q_row = gather([r[2:] for r in rows])
            right = m(x[:, :-1]).argmax(-1)[q_row, q[:, 0]] == q[:, 2]
            f = {(r, e): b for r, n in enumerate(rows) for e, *_, b in n[2].tolist()}
            before = [int(x[r, f[r, e] - 1]) for r, e in zip(q_row.tolist(), q[:, 1].tolist())]
            so = torch.tensor(before) == enc(" so")[-1]
            for kind, mine in (("has", ~so), ("so", so)):
                out[f"{name}_{kind}"] = f"{int(right[mine].sum())}/{int(mine.sum())}"
        for L, n in ((512, 20), (2048, 5)):
            out[f"who{L}"] = continue_train.retrieval(m, enc, L, n, 556, False, ("who",))["who"]
        out["seen512"] = continue_train.retrieval(
            m, enc, 512, 12, 555, False, ("code", "pet", "where", "home")
        )
    M.FAST[0] = M.COMPILE
    return out


def main(data, out, init, *phases):
    os.makedirs(out, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    seed = int(os.environ.get("SEED", 31))
    rng = random.Random(seed)
    enc, pools = C.Enc(data), Pools(data, rng)
    has = enc("Anna has")[-1]
    m, readers, saved = M.Model(), Readers(M.CFG), None
    if init.endswith(".pt"):
        saved = torch.load(init)
        m.load_state_dict(saved["m"])
    else:
        m = continue_train.load_hf(init)
    o1, o2, rest = M.optimizers(m)
    readers_of = lambda names: {"params": [getattr(readers, k) for k in names], "lr": 3e-3, "initial_lr": 3e-3}
    o2.add_param_group(readers_of(("name", "adj", "obj")))
    mean = {k: v.clone() for k, v in m.state_dict().items()}
    if saved and "readers" in saved:
        readers.load_state_dict(saved["readers"], strict=False)
        if "more" in saved["readers"]:
            o2.add_param_group(readers_of(("more",)))
        o1.load_state_dict(saved["o1"])
        o2.load_state_dict(saved["o2"])
        mean = saved["mean"]
    if "more" not in (saved or {}).get("readers", {}):
        o2.add_param_group(readers_of(("more",)))
    teacher = continue_train.load_hf(os.environ["TEACHER"]) if os.environ.get("TEACHER") else None
    pull = float(os.environ.get("PULL", 0))
    m.tap[SECOND] = None
    for i in (SECOND, *LOOKING):
        m.layers[i].self_attn.tap = []
    check = Owners(data, "check", random.Random(5))
    checks = [("short", 256, [check.row(256) for _ in range(24)])]
    log = open(out + "/log.jsonl", "a")

    def report(**what):
        what |= evaluate(m, data, checks, enc)
        print(what, flush=True)
        log.write(json.dumps(what) + "\n")
        log.flush()
        state = {"m": m, "o1": o1, "o2": o2, "readers": readers}
        torch.save({k: v.state_dict() for k, v in state.items()} | {"mean": mean}, out + "/ck.tmp")
        os.replace(out + "/ck.tmp", out + "/ck.pt")

    if not os.environ.get("BRIEF"):
        report(start=init, seed=seed)
    step = tokens = 0
    for spec in phases:
        phase, seen = Phase(spec), {}
        spent = since = 0.0
        while spent < phase.minutes * 60:
            begin = time.time()
            T, rows, n_owners = phase.rows(pools, int(os.environ.get("N", 4096)))
            x, w, notes, lengths = tensors(rows, phase.answer, has)
            q, q_row = gather(notes)[2:]
            rate = min(1, (step + 1) / 20) * phase.rate(spent)
            for g in o1.param_groups + o2.param_groups:
                g["lr"] = g["initial_lr"] * rate
            known = None
            if teacher and n_owners < len(rows):
                with torch.no_grad():
                    known = teacher(x[n_owners:, :-1]).flatten(0, 1)
            h, balance = m(x[:, :-1], hidden=True)
            loss, each = token_loss(m, h.view(len(x), T, -1), x, w, n_owners, phase.owners, known)
            loss = loss + 0.01 * balance
            extra, parts = aux_loss(m, readers, x, notes, lengths, T) if phase.aux else (0.0, {})
            (loss + phase.aux * extra).backward()
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            o1.step()
            o2.step()
            with torch.no_grad():
                for p, origin in zip(m.parameters(), teacher.parameters() if pull else ()):
                    p.lerp_(origin, pull * rate)
            m.zero_grad(set_to_none=True)
            readers.zero_grad(set_to_none=True)
            for k, v in m.state_dict().items():
                mean[k].lerp_(v, max(1 / 60, 1 / (step + 1)) if v.dtype.is_floating_point else 1)
            step += 1
            tokens += x[:, 1:].numel()
            parts |= {f"owners{T}": each[:n_owners].mean().item(), f"others{T}": each[n_owners:].mean().item()}
            parts["who"] = each[q_row, q[:, 0]].mean().item()
            if len(q) and (lengths[1] > 1).any():
                parts["who2"] = each[q_row, q[:, 0] + 1][lengths[1] > 1].mean().item()
            for k, v in parts.items():
                if v == v:  # no mean of nothing
                    seen.setdefault(k, []).append(v)
            took = min(60.0, time.time() - begin)
            spent += took
            since += took
            if step % 10 == 0:
                last = {k: round(float(np.mean(v[-10:])), 3) for k, v in seen.items()}
                print(f"{step} {spent:.0f}s", last, f"lr {rate:.3f} tokens {tokens}", flush=True)
            if since > 1500 or spent >= phase.minutes * 60:
                since = 0.0
                last = {k: round(float(np.mean(v[-40:])), 3) for k, v in seen.items()}
                report(step=step, sec=round(spent), tokens=tokens, phase=spec, loss=last)


if __name__ == "__main__":
    main(*sys.argv[1:])
