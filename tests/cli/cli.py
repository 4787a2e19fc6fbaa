"""Running the command line in tests: one call, its streams and exit code, and small file readers.

By hand:  FATHOM_PROGRAM=build/bin/fathom FATHOM_TEST_DATA=build/testdata python3 tests/cli/run_test.py
"""
import array
import json
import os
import pathlib
import struct
import subprocess
import tempfile
import unittest

SOURCE = pathlib.Path(os.environ.get("FATHOM_SOURCE_DIR", pathlib.Path(__file__).parents[2]))
PROGRAM = os.environ.get("FATHOM_PROGRAM", str(SOURCE / "build/bin/fathom"))
DATA = pathlib.Path(os.environ.get("FATHOM_TEST_DATA", SOURCE / "build/testdata"))
MODEL = str(SOURCE / "examples/models/trained.Q8_0.gguf")

# Machines that run tests are often busy; nothing here takes long on an idle one.
TIMEOUT_S = 300


def environment(extra=None):
    """The environment without FATHOM_ARG_* and tuned profiles of whoever runs the tests."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FATHOM_ARG_")}
    env["XDG_CACHE_HOME"] = "/nonexistent"
    env.update(extra or {})
    return env


class Result:
    def __init__(self, process):
        self.code = process.returncode
        self.out = process.stdout.decode("utf-8")
        self.err = process.stderr.decode("utf-8")

    def json(self):
        return json.loads(self.out)


def fathom(*args, stdin=b"", env=None):
    """Runs `fathom args...` to its end."""
    if isinstance(stdin, str):
        stdin = stdin.encode()
    return Result(subprocess.run([PROGRAM, *map(str, args)], input=stdin, capture_output=True,
                                 env=environment(env), timeout=TIMEOUT_S))


class Case(unittest.TestCase):
    """A test case with a folder of its own and checks that show stderr when they fail."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_ok(self, *args, **kwargs):
        return self.run_code(0, *args, **kwargs)

    def run_code(self, code, *args, **kwargs):
        result = fathom(*args, **kwargs)
        self.assertEqual(result.code, code, f"{' '.join(map(str, args))}\n{result.err}")
        return result

    def file(self, name, content):
        path = self.folder / name
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)
        return path


def read_f32(path):
    values = array.array("f")
    values.frombytes(pathlib.Path(path).read_bytes())
    return values


def read_safetensors(path):
    """name -> (shape, array) of a file with F32 and I32 tensors."""
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + length])
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        values = array.array({"F32": "f", "I32": "i"}[info["dtype"]])
        values.frombytes(data[8 + length + begin:8 + length + end])
        tensors[name] = (info["shape"], values)
    return tensors


if __name__ == "__main__":
    unittest.main()
