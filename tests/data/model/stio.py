"""Minimal safetensors reader/writer on numpy (F32 F16 BF16 F8_E4M3 I32 I64 U8) + bf16 helpers."""

import json
import struct
import numpy as np

NP = {
    "F32": np.float32,
    "F16": np.float16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "F64": np.float64,
}


def bf16_bits(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(b):
    return (b.astype(np.uint32) << 16).view(np.float32)


def bf16_round(x):
    return from_bf16(bf16_bits(x)).reshape(np.shape(x))


def write(path, tensors, meta=None):
    """tensors: name -> (dtype string, array); BF16 arrays are float32 (rounded here) and F8_E4M3 arrays are uint8 codes."""
    hdr, blobs, off = ({"__metadata__": meta} if meta else {}), [], 0
    for n, (dt, a) in tensors.items():
        a = np.asarray(a)
        sh = list(a.shape)
        b = (
            bf16_bits(a)
            if dt == "BF16"
            else a.astype(np.uint8) if dt == "F8_E4M3" else np.ascontiguousarray(a, NP[dt])
        ).tobytes()
        hdr[n] = {"dtype": dt, "shape": sh, "data_offsets": [off, off + len(b)]}
        blobs.append(b)
        off += len(b)
    h = json.dumps(hdr, separators=(",", ":")).encode()
    h += b" " * (-len(h) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(h)))
        f.write(h)
        for b in blobs:
            f.write(b)


def read(path, raw=False):
    """-> name -> float32/int array (raw: name -> (dtype, array))"""
    d = open(path, "rb").read()
    (n,) = struct.unpack("<Q", d[:8])
    h = json.loads(d[8 : 8 + n])
    out = {}
    for k, v in h.items():
        if k == "__metadata__":
            continue
        b, e = v["data_offsets"]
        s = d[8 + n + b : 8 + n + e]
        dt = v["dtype"]
        a = (
            from_bf16(np.frombuffer(s, np.uint16))
            if dt == "BF16"
            else np.frombuffer(s, np.uint8 if dt == "F8_E4M3" else NP[dt])
        )
        a = a.reshape(v["shape"])
        out[k] = (dt, a) if raw else a
    return out
