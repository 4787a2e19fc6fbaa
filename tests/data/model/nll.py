"""held-out loss of a model in fp32, windows of 512.  usage: nll.py MODEL|CK DATA"""

import os
import sys

os.environ.setdefault("COMPILE", "0")
import numpy as np
import torch
import model as M
import continue_train

torch.set_num_threads(1)
if sys.argv[1].endswith(".pt"):
    m = M.Model()
    m.load_state_dict(torch.load(sys.argv[1])["m"])
else:
    m = continue_train.load_hf(sys.argv[1])
with torch.no_grad():
    for nm in ("heldout.syn", "natural.syn", "heldout.real"):
        x = np.fromfile(f"{sys.argv[2]}/{nm}", np.uint16).astype(np.int64)
        n = len(x) // 512
        x = torch.from_numpy(x[: n * 512].reshape(n, 512))
        l = []
        for i in range(0, n, 4):
            l.append(
                torch.nn.functional.cross_entropy(
                    m(x[i : i + 4], dtype=torch.float32)[:, :-1].flatten(0, 1),
                    x[i : i + 4, 1:].flatten(),
                    reduction="none",
                )
            )
        print(nm, round(float(torch.cat(l).mean()), 4), flush=True)
