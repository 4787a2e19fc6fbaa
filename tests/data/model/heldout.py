"""The held-out text: generated from names and words that training never saw, and real documents kept apart.

usage: heldout.py DATA GOLDEN.safetensors    -> DATA/natural.syn, natural.real
The generated half is that of the first training (corpus.py, seed 90001) with words tokenised as they stand in
text; the real half is taken from its golden, because other machines have other documents.
"""

import random
import sys
import numpy as np
import corpus as C
import stio

data, golden = sys.argv[1:]
enc = C.Enc(data)
r = random.Random(90001)
docs = []
for i in range(150):
    c = r.random()
    docs.append(
        C.facts_doc(r, True)
        if c < 0.25
        else (
            C.retrieval_doc(r, r.randint(300, 2500), r.randint(1, 6), True)
            if c < 0.5
            else C.story_doc(r, True) if c < 0.85 else C.log_doc(r, True)
        )
    )
syn = np.array([t for ids, _ in enc.weighted(docs) for t in ids], np.uint16)[:8192]
real = stio.read(golden)["ppl.tokens"][-8192:].astype(np.uint16)
syn.tofile(f"{data}/natural.syn")
real.tofile(f"{data}/natural.real")
print(len(syn), len(real))
print(enc.tok.decode(syn[:60].tolist()))
