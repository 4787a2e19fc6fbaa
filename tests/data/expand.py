#!/usr/bin/env python3
"""Unpacks the golden tree: tests/data/golden/ -> OUT/{models,gguf,quant,tokenizers,trained}.

usage: expand.py OUT [--stamp FILE]

golden/manifest.json lists every file with its size, its SHA-256 and the pieces it is made of, in
an order in which a file only refers to earlier ones.  The kinds of pieces:

  ["pack", NAME, OFFSET, LENGTH]   bytes of the unpacked golden/NAME.xz
  ["copy", PATH, OFFSET, LENGTH]   bytes of a file of the tree, or of the repository ("@PATH")
  ["zero", LENGTH]
  ["cast", TO, PATH, OFFSET, COUNT]
                                   COUNT bf16 values of a file, as "f32" or "f16"
  ["head", TO, PATH, OFFSET, [HEADS, ROWS, COLS], FIRST, LAST, TRANSPOSE]
                                   of a bf16 matrix [HEADS, ROWS, COLS] the rows FIRST..LAST-1 of
                                   each head, transposed within the head if TRANSPOSE, as TO

A file that is already there and right is left alone; every file written is verified.  Needs
Python 3.8 and nothing else.  pack.py makes golden/.
"""
import argparse
import array
import hashlib
import json
import lzma
import os
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
SOURCE = os.path.join(HERE, "golden")


def as_f16(values, known={}):
    """bf16 codes -> f16 codes; every value must be exact in both.  Remembers what it has seen."""
    for code in set(values).difference(known):
        number = struct.unpack("<f", struct.pack("<I", code << 16))[0]
        known[code] = struct.unpack("<H", struct.pack("<e", number))[0]
    return array.array("H", map(known.__getitem__, values))


def convert(values, to):
    """An array of bf16 codes -> the bytes of the same numbers as bf16, f16 or f32."""
    if to == "bf16":
        return values.tobytes()
    if to == "f16":
        return as_f16(values).tobytes()
    if to == "f32":
        narrow = values.tobytes()
        wide = bytearray(2 * len(narrow))
        wide[2::4] = narrow[0::2]
        wide[3::4] = narrow[1::2]
        return bytes(wide)
    raise ValueError(f"unknown element type {to!r}")


def head_slice(values, shape, first, last, transpose):
    """Rows first..last-1 of each head of [heads, rows, cols], each head transposed on request."""
    heads, rows, cols = shape
    out = array.array("H")
    for head in range(heads):
        begin = (head * rows + first) * cols
        block = values[begin : begin + (last - first) * cols]
        if transpose:
            for col in range(cols):
                out.extend(block[col::cols])
        else:
            out.extend(block)
    return out


class Tree:
    """The tree being made, and the packed bytes it is made of."""

    def __init__(self, out):
        self.out = out
        self.packs = {}

    def path(self, name):
        base = REPOSITORY if name.startswith("@") else self.out
        return os.path.join(base, *name.lstrip("@").split("/"))

    def read(self, name, offset, length):
        with open(self.path(name), "rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise ValueError(f"{name}: ends before byte {offset + length}")
        return data

    def pack(self, name):
        if name not in self.packs:
            with lzma.open(os.path.join(SOURCE, name + ".xz")) as file:
                self.packs[name] = file.read()
        return self.packs[name]

    def bf16(self, name, offset, count):
        return array.array("H", self.read(name, offset, 2 * count))

    def piece(self, kind, *args):
        if kind == "pack":
            name, offset, length = args
            return self.pack(name)[offset : offset + length]
        if kind == "copy":
            return self.read(*args)
        if kind == "zero":
            return bytes(args[0])
        if kind == "cast":
            to, name, offset, count = args
            return convert(self.bf16(name, offset, count), to)
        if kind == "head":
            to, name, offset, shape, first, last, transpose = args
            values = self.bf16(name, offset, shape[0] * shape[1] * shape[2])
            return convert(head_slice(values, shape, first, last, transpose), to)
        raise ValueError(f"unknown piece {kind!r}")

    def is_there(self, name, entry):
        path = self.path(name)
        if not os.path.isfile(path) or os.path.getsize(path) != entry["size"]:
            return False
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest() == entry["sha256"]

    def make(self, name, entry):
        data = b"".join(self.piece(*piece) for piece in entry["pieces"])
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry["sha256"]:
            raise ValueError(
                f"{name}: got {len(data)} bytes with SHA-256 {digest}, "
                f"expected {entry['size']} with {entry['sha256']}"
            )
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".part", "wb") as file:
            file.write(data)
        os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--stamp", help="file to touch when all is well")
    args = parser.parse_args()

    with open(os.path.join(SOURCE, "manifest.json"), encoding="utf-8") as file:
        manifest = json.load(file)
    tree = Tree(args.out)
    made = 0
    for name, entry in manifest.items():
        if not tree.is_there(name, entry):
            tree.make(name, entry)
            made += 1
    print(f"test data: {made} of {len(manifest)} files unpacked into {args.out}")
    if args.stamp:
        with open(args.stamp, "w", encoding="utf-8") as file:
            file.write("ok\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, lzma.LZMAError) as error:
        sys.exit(f"expand.py: {error}")
