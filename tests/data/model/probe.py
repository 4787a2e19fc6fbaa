"""accuracy of who answers in short documents, by order of the statement.  usage: probe.py CK DATA [N]"""

import os
import random
import sys

os.environ.setdefault("COMPILE", "0")
import torch
import model as M
import corpus as C
import continue_corpus as D
import continue_train

m = M.Model()
m.load_state_dict(torch.load(sys.argv[1])["m"]) if sys.argv[1].endswith(".pt") else None
if not sys.argv[1].endswith(".pt"):
    m = continue_train.load_hf(sys.argv[1])
enc = C.Enc(sys.argv[2])
n = int(sys.argv[3]) if len(sys.argv) > 3 else 40
torch.set_num_threads(1)
with torch.no_grad():
    for nf in (1, 4):
        for fwd in (True, False):
            for ask in ("who", "belong"):
                r = random.Random(9)
                hit = 0
                p = 0.0
                for i in range(n):
                    w = C.World(r)
                    used = set()
                    fs = []
                    while len(fs) < nf:
                        s, q, a = D.who_fact(w, used, fwd)
                        fs.append((C.strip(s), C.strip(q), C.strip(a)))
                    body = [f[0] for f in fs]
                    for _ in range(3):
                        body.insert(r.randint(0, len(body)), C.strip(w.event()))
                    st, q, a = fs[r.randrange(nf)]
                    if q.startswith("Who has"):
                        name, key = a[:-1].split(" has the ")
                    else:
                        key, name = a[4:-1].split(" belongs to ")
                    q = f"Who has the {key}?" if ask == "who" else f"Who does the {key} belong to?"
                    pre = "" if ask == "who" else f" The {key} belongs to"
                    ids = [0] + enc(f"User: {' '.join(body)}\n\n{q}\n\nAssistant:{pre}")
                    v = enc(" " + name)
                    lg = m(torch.tensor([ids + v[:-1]]), last=len(v))[0].float()
                    hit += lg.argmax(-1).tolist() == v
                    p += float(lg.softmax(-1)[0, v[0]])
                print(
                    f"facts {nf} {'forward ' if fwd else 'backward'} ask {ask}: {hit}/{n} p(first) {p / n:.2f}"
                )
