#!/usr/bin/env python3
"""Packs the golden tree into tests/data/golden/, the form in which the repository holds it.

usage: pack.py GOLDEN_TREE

Most weights are in the tree several times: the same model as F32, BF16 and F16, in GGUF and in
safetensors, whole and in parts.  The packer cuts every container file into header and tensors and
looks each tensor up, by content, among those it has seen, as they are, cast to another type, or
rearranged the way GGUF stores kv_b.  Only what is new goes into a pack.  expand.py, which undoes
this, describes the format; the result is verified by calling it.

Left out: extra/ and trained/model/ (no test uses them), generate/ and README.md.
"""
import array
import hashlib
import json
import lzma
import math
import os
import struct
import subprocess
import sys
import tempfile

import expand

FOLDERS = ("models", "gguf", "quant", "tokenizers", "trained")
# Files others are derived from come first.
FIRST = ("models/tiny-v2/", "models/tiny-v2-lite-sharded/", "models/tiny-v3/", "models/")
LEFT_OUT = ("trained/model/", "trained/train_log.jsonl")
EXAMPLE = "examples/models/trained.Q8_0.gguf"

GGML_TYPES = {  # id: (values per block, bytes per block)
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17),
}  # fmt: skip


class Segment:
    """A run of bytes of a container file: a header, padding or a tensor."""

    def __init__(self, begin, end, name="", dtype="", shape=()):
        self.begin, self.end = begin, end
        self.name, self.dtype, self.shape = name, dtype, shape


def safetensors_segments(data):
    (length,) = struct.unpack_from("<Q", data, 0)
    header = json.loads(data[8 : 8 + length])
    base = 8 + length
    yield Segment(0, base)
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            yield Segment(base + begin, base + end, name, info["dtype"], info["shape"])


def gguf_segments(data):
    at = 0

    def take(form):
        nonlocal at
        value = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value[0]

    def text():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind):
        nonlocal at
        if kind == 8:
            return text()
        if kind == 9:
            of, count = take("I"), take("Q")
            return [value(of) for _ in range(count)]
        return take({10: "Q", 11: "q", 12: "d"}[kind] if kind > 7 else "BbHhIif?"[kind])

    assert data[:4] == b"GGUF"
    at = 8
    n_tensors, n_keys = take("Q"), take("Q")
    keys = {}
    for _ in range(n_keys):
        key = text()
        keys[key] = value(take("I"))
    infos = []
    for _ in range(n_tensors):
        name = text()
        shape = [take("Q") for _ in range(take("I"))]
        infos.append((name, shape[::-1], take("I"), take("Q")))
    align = keys.get("general.alignment", 32)
    base = (at + align - 1) // align * align
    yield Segment(0, base)
    for name, shape, kind, offset in infos:
        values, size = GGML_TYPES[kind]
        n_bytes = math.prod(shape) // values * size
        dtype = {0: "F32", 1: "F16", 30: "BF16"}.get(kind, "")
        yield Segment(base + offset, base + offset + n_bytes, name, dtype, shape)


def segments(name, data):
    """All of the file in order, the gaps between tensors included."""
    known = []
    if name.endswith(".safetensors"):
        known = list(safetensors_segments(data))
    elif name.endswith(".gguf"):
        known = list(gguf_segments(data))
    at = 0
    for segment in sorted(known, key=lambda s: s.begin):
        assert segment.begin >= at, f"{name}: {segment.name} overlaps"
        if segment.begin > at:
            yield Segment(at, segment.begin)
        if segment.end > segment.begin:
            yield segment
        at = segment.end
    if at < len(data):
        yield Segment(at, len(data))


class Packer:
    def __init__(self, root):
        self.root = root
        self.known = {}  # SHA-256 of bytes -> the piece that yields them
        self.packs = {}  # name -> bytearray
        self.manifest = {}

    def learn(self, data, piece):
        self.known.setdefault(hashlib.sha256(data).digest(), piece)

    def learn_tensor(self, name, segment, data, heads):
        """Remembers a tensor, and what a converter makes of it if it is of type BF16."""
        at = segment.begin
        self.learn(data, ["copy", name, at, len(data)])
        if segment.dtype != "BF16":
            return
        values = array.array("H", data)
        forms = ["f32"] if len(segment.shape) < 2 else ["f32", "f16"]
        try:
            for to in forms:
                self.learn(expand.convert(values, to), ["cast", to, name, at, len(values)])
            if segment.name.endswith("kv_b_proj.weight"):
                n_heads, nope = heads
                shape = [n_heads, segment.shape[0] // n_heads, segment.shape[1]]
                for first, last, transpose in ((0, nope, True), (nope, shape[1], False)):
                    part = expand.head_slice(values, shape, first, last, transpose)
                    for to in ("bf16", "f16"):
                        piece = ["head", to, name, at, shape, first, last, transpose]
                        self.learn(expand.convert(part, to), piece)
        except OverflowError:
            pass  # a value that f16 cannot hold: then no F16 file was made of it

    def store(self, pack, data):
        store = self.packs.setdefault(pack, bytearray())
        store += data
        return ["pack", pack, len(store) - len(data), len(data)]

    def pieces_of(self, segment, data, pack):
        if not any(data):
            return [["zero", len(data)]]
        piece = self.known.get(hashlib.sha256(data).digest())
        if piece:
            return [piece]
        if len(segment.shape) == 3:  # stacked experts: one piece each
            size = len(data) // segment.shape[0]
            parts = [data[i : i + size] for i in range(0, len(data), size)]
            found = [self.known.get(hashlib.sha256(part).digest()) for part in parts]
            if all(found):
                return found
        return [self.store(pack, data)]

    def add(self, name):
        with open(os.path.join(self.root, name), "rb") as file:
            data = file.read()
        folder = os.path.dirname(os.path.join(self.root, name))
        heads = None
        if os.path.exists(os.path.join(folder, "config.json")):
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            heads = config["num_attention_heads"], config["qk_nope_head_dim"]

        whole = self.known.get(hashlib.sha256(data).digest())
        cut = list(segments(name, data))
        pieces = []
        if whole:
            pieces = [whole]
        else:
            for segment in cut:
                part = data[segment.begin : segment.end]
                pieces += self.pieces_of(segment, part, name.split("/")[0])
        merged = []
        for piece in pieces:
            last = merged[-1] if merged else None
            joins = last and piece[0] == last[0] and piece[0] in ("pack", "copy")
            if joins and piece[1] == last[1] and piece[2] == last[2] + last[3]:
                merged[-1] = last[:3] + [last[3] + piece[3]]
            else:
                merged.append(piece)
        digest = hashlib.sha256(data).hexdigest()
        self.manifest[name] = {"size": len(data), "sha256": digest, "pieces": merged}
        self.learn(data, ["copy", name, 0, len(data)])
        for segment in cut:
            if segment.name:
                part = data[segment.begin : segment.end]
                self.learn_tensor(name, segment, part, heads)

    def write(self, out):
        os.makedirs(out, exist_ok=True)
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME,
                    "dict_size": 64 << 20}]  # fmt: skip
        for name, data in self.packs.items():
            with lzma.open(os.path.join(out, name + ".xz"), "wb", filters=filters) as file:
                file.write(data)
        lines = [f" {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}"
                 for name, entry in self.manifest.items()]  # fmt: skip
        with open(os.path.join(out, "manifest.json"), "w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    root = sys.argv[1]
    names = []
    for folder in FOLDERS:
        for where, _, files in os.walk(os.path.join(root, folder)):
            names += [os.path.relpath(os.path.join(where, file), root) for file in files]
    names = [name for name in names if not name.startswith(LEFT_OUT)]

    def rank(name):
        first = [i for i, prefix in enumerate(FIRST) if name.startswith(prefix)]
        return (first[0] if first else len(FIRST), name)

    packer = Packer(root)
    with open(os.path.join(expand.REPOSITORY, EXAMPLE), "rb") as file:
        data = file.read()
        packer.learn(data, ["copy", "@" + EXAMPLE, 0, len(data)])
    for name in sorted(names, key=rank):
        packer.add(name)
    packer.write(expand.SOURCE)
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, expand.__file__, out], check=True)
        for name in names:
            with open(os.path.join(root, name), "rb") as a, open(os.path.join(out, name), "rb") as b:
                assert a.read() == b.read(), name
    for name in sorted(os.listdir(expand.SOURCE)):
        print(f"{os.path.getsize(os.path.join(expand.SOURCE, name)):>10} {name}")


if __name__ == "__main__":
    main()
