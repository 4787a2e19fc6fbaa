"""The prompts of `fathom retrieval`, and what the PyTorch reference answers.

usage: needles.py make DATA OUT.jsonl [SEED] | ask MODEL PROMPTS.jsonl OUT.json [LENGTHS]     MODEL: HF folder or GGUF
Prompts end in a question about a planted fact; the four other facts of each text are of the same kind.
"""

import json
import math
import os
import random
import sys

os.environ.setdefault("COMPILE", "0")
import numpy as np
import corpus as C

KINDS = ("code", "who", "pet", "where", "home")
LENGTHS = ((512, 40), (2048, 40), (8192, 20), (16384, 20), (32768, 5))


def make(data, out, seed=2026):
    enc = C.Enc(data)
    with open(out, "w") as f:
        for L, n in LENGTHS:
            r = random.Random(int(seed) + L)
            for i in range(n):
                ids, val, *_ = C.needle(
                    r, enc, L, ((i // len(KINDS)) + 0.5) / (n // len(KINDS)), KINDS[i % len(KINDS)]
                )
                f.write(
                    json.dumps(
                        {"kind": KINDS[i % len(KINDS)], "tokens": ids, "answer": val}, separators=(",", ":")
                    )
                    + "\n"
                )


def ask(folder, prompts, out, lengths="512,2048,8192,16384,32768"):
    import torch
    import model as M
    import continue_train

    torch.set_num_threads(int(os.environ.get("NT", 1)))
    m = continue_train.load_hf(folder)
    lengths = [int(x) for x in lengths.split(",")]
    score = {}
    rows = []
    with torch.no_grad():
        for line in open(prompts):
            p = json.loads(line)
            L = len(p["tokens"])
            if L not in lengths:
                continue
            ids, a = p["tokens"], p["answer"]
            lg = m(torch.tensor([ids + a[:-1]]), dtype=torch.float32, last=len(a))[0].double()
            ok = lg.argmax(-1).tolist() == a
            nll = float(-lg.log_softmax(-1)[torch.arange(len(a)), torch.tensor(a)].mean())
            s = score.setdefault(p["kind"], {}).setdefault(L, [0, 0, 0.0])
            s[0] += ok
            s[1] += 1
            s[2] += nll
            rows.append({"kind": p["kind"], "length": L, "found": ok, "nll": nll})
    total = {L: [sum(s[L][k] for s in score.values() if L in s) for k in range(3)] for L in lengths}
    json.dump(
        {
            "by_kind": {k: {L: f"{a}/{b}" for L, (a, b, _) in s.items()} for k, s in score.items()},
            "all": {L: f"{a}/{b}" for L, (a, b, _) in total.items()},
            "nll": {L: c / b for L, (a, b, c) in total.items() if b},
            "prompts": rows,
        },
        open(out, "w"),
    )
    print({L: f"{a}/{b}, loss {c / b:.4f}" for L, (a, b, c) in total.items() if b})
    [print(k, {L: f"{a}/{b}" for L, (a, b, _) in s.items()}) for k, s in score.items()]


if __name__ == "__main__":
    {"make": make, "ask": ask}[sys.argv[1]](*sys.argv[2:])
