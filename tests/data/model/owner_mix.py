"""Mixes checkpoints of owner_train.py with the model they began from.

usage: owner_mix.py OUT.pt MODEL CHECKPOINT,CHECKPOINT... GROUP=SHARE,... [LAYER.HEAD=FACTOR...]
w = MODEL + share * (mean of the checkpoints - MODEL), the share by group of parameters: emb, head (lm_head and
the last norm), attnN, mlpN of layer N (experts and gate too), attn, mlp, or all that have none of their own.
The state of optimizers and readers is that of the last checkpoint.
A factor multiplies the queries of a head: 1.15 makes its attention sharper, which long texts need.
"""

import sys
import torch
import continue_train
import model as M


def group(name):
    if "embed" in name:
        return "emb"
    if "lm_head" in name or name == "norm.weight":
        return "head"
    layer = name.split(".")[1]
    return ("attn" if "self_attn" in name or "input_layernorm" in name else "mlp") + layer


def main(out, model, checkpoints, shares, *heads):
    saved = [torch.load(c) for c in checkpoints.split(",")]
    shares = {k: float(v) for k, v in (x.split("=") for x in shares.split(","))}
    share = lambda g: shares.get(g, shares.get(g.rstrip("0123"), shares.get("all", 0.0)))
    state = continue_train.load_hf(model).state_dict()
    for k, v in state.items():
        mean = sum(c["m"][k].float() for c in saved) / len(saved)
        state[k] = v + share(group(k)) * (mean - v)
    rows = M.CFG["nope"] + M.CFG["rope"]
    for head in heads:
        where, factor = head.split("=")
        layer, head = map(int, where.split("."))
        state[f"layers.{layer}.self_attn.q_proj.weight"][head * rows : (head + 1) * rows] *= float(factor)
    torch.save(saved[-1] | {"m": state, "mean": dict(state)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
