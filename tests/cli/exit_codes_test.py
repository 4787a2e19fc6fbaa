"""What goes wrong, and the exit code and message of each."""
import json
import unittest

from cli import MODEL, Case, fathom

OK, INTERNAL, USAGE, INFEASIBLE, BAD_MODEL, IO, MEMORY, DEVICE = range(8)


class ExitCodes(Case):
    def refused(self, code, words, *args, **kwargs):
        """Nothing on stdout, and one line that names what was wrong."""
        r = self.run_code(code, *args, **kwargs)
        self.assertEqual(r.out, "", args)
        for word in words:
            self.assertIn(word, r.err, args)
        return r

    def test_help_and_version(self):
        r = self.run_ok("--help")
        for word in ("run", "plan", "inspect", "eval", "tokenize", "detokenize", "perplexity", "bench",
                     "config", "version", "demo", "Exit codes: 0 ok", "FATHOM_ARG_"):
            self.assertIn(word, r.out)
        self.assertIn("Exit codes", self.run_ok("run", "-h").out)
        self.assertRegex(self.run_ok("--version").out, r"^fathom \d+\.\d+\.\d+\n$")
        v = self.run_ok("version", "--json").json()
        self.assertIn({"name": "scalar", "available": True, "reason": ""}, v["isas"])

    def test_usage(self):
        for args in ((), ("nonsense",), ("run",), ("run", "-m", MODEL, "--nonsense"),
                     ("run", "-m", MODEL, "-p", "x", "-n", "many"), ("run", "-m", MODEL, "-p", "x", "-n", "-2"),
                     ("run", "-m", MODEL, "-p", "x", "-f", "y"), ("eval", "-m", MODEL),
                     ("run", "-m", MODEL, "-p", "x", "-q", "-v")):
            r = fathom(*args)
            self.assertEqual((r.code, r.out), (USAGE, ""), (args, r.err))
            self.assertNotEqual(r.err, "", args)

    def test_configuration(self):
        run = ("run", "-m", MODEL, "-p", "x", "-n", 1)
        self.refused(USAGE, ["kv.tipe", "kv.type"], *run, "--set", "kv.tipe=bf16")
        self.refused(USAGE, ["kv.type", "bf17"], *run, "--kv-type", "bf17")
        self.refused(USAGE, ["prefill.chunk", "8192"], *run, "-b", 9000)
        self.refused(USAGE, ["--mem-budget", "24G"], *run, "--mem-budget", "24G")
        self.refused(USAGE, ["--set", "threads"], *run, "--set", "threads")
        self.refused(USAGE, ["-t", "--set", "threads", "1", "2"], *run, "-t", 1, "--set", "threads=2")
        self.refused(USAGE, ["isa", "sse9"], *run, "--isa", "sse9")

    def test_sampling(self):
        for flags, name in ((("--temp", -1), "temperature"), (("--temp", "nan"), "temperature"),
                            (("--temp", 1, "--top-p", 0), "top_p"), (("--temp", 1, "--min-p", 2), "min_p"),
                            (("--repeat-penalty", 0), "repeat_penalty")):
            self.refused(USAGE, [name], "run", "-m", MODEL, "-p", "x", "-n", 1, *flags)

    def test_config_file(self):
        good = self.file("good.json", json.dumps({"kv": {"type": "q8_0"}, "threads": 1}))
        c = self.run_ok("config", "--config", good).json()
        self.assertEqual((c["kv.type"], str(c["threads"])), ("q8_0", "1"))
        self.refused(USAGE, ["bad.json"], "config", "--config", self.file("bad.json", '{"kv": '))
        self.refused(IO, ["none.json"], "config", "--config", self.folder / "none.json")

    def test_missing_files(self):
        none = self.folder / "none.gguf"
        for command in (("run", "-p", "x"), ("plan",), ("inspect",), ("tokenize", "-p", "x"),
                        ("perplexity", "-p", "x y z"), ("bench",), ("demo",)):
            self.refused(IO, ["none.gguf"], command[0], "-m", none, *command[1:])
        self.refused(IO, ["none.txt"], "run", "-m", MODEL, "-f", self.folder / "none.txt")
        self.refused(IO, ["none"], "eval", "-m", MODEL, "-p", "x", "--logits", self.folder / "none/out.f32")

    def test_a_folder_is_no_file(self):
        self.refused(IO, [str(self.folder)], "run", "-m", MODEL, "-f", self.folder)
        self.refused(IO, [str(self.folder)], "inspect", "-m", MODEL, "--tensor", "output_norm.weight",
                     "--out", self.folder)

    def test_bad_models(self):
        with open(MODEL, "rb") as file:
            head = file.read(200_000)
        for name, content in (("empty.gguf", b""), ("text.gguf", b"this is not a model\n" * 100),
                              ("cut.gguf", head), ("newer.gguf", b"GGUF\x63\0\0\0" + head[8:])):
            path = self.file(name, content)
            for command in (("run", "-p", "x"), ("plan",), ("inspect",)):
                self.refused(BAD_MODEL, [name], command[0], "-m", path, *command[1:])
        (self.folder / "hf").mkdir()
        self.file("hf/config.json", "{}")
        self.refused(BAD_MODEL, ["config.json"], "plan", "-m", self.folder / "hf")

    def test_bad_prompts(self):
        run = ("run", "-m", MODEL, "-n", 1)
        self.refused(USAGE, ["JSON array"], *run, "--tokens", self.file("a.json", "hello"))
        self.refused(USAGE, ["element 1"], *run, "--tokens", self.file("b.json", '[1, "two"]'))
        self.refused(USAGE, ["5000", "2048"], *run, "--tokens", self.file("c.json", "[1, 5000]"))
        self.refused(USAGE, ["empty"], *run, "--tokens", self.file("d.json", "[]"))
        self.refused(USAGE, ["--json"], *run, "--json")
        self.refused(USAGE, ["message 1"], *run, "--chat", "-p", '[{"role": "user", "content": "x"}, 5]')
        self.refused(USAGE, ["wizard"], *run, "--chat", "-p", '[{"role": "wizard", "content": "x"}]')

    def test_prompt_longer_than_the_context(self):
        tokens = self.file("t.json", json.dumps([5] * 100))
        self.refused(MEMORY, ["64"], "run", "-m", MODEL, "--tokens", tokens, "-c", 64, "-n", 1)

    def test_no_room_for_anything(self):
        self.refused(INFEASIBLE, ["DOES NOT FIT", "the plan does not fit"],
                     "run", "-m", MODEL, "-p", "x", "-n", 1, "--mem-budget", "cpu=1M")

    def test_isa_that_the_machine_lacks(self):
        isas = self.run_ok("version", "--json").json()["isas"]
        for isa in isas:
            run = ("run", "-m", MODEL, "-p", "Once", "-n", 2, "--isa", isa["name"])
            if isa["available"]:
                self.run_ok(*run)
            else:
                self.refused(DEVICE, [isa["name"]], *run)

    def test_tensor_that_is_not_there(self):
        out = self.folder / "out.f32"
        self.refused(USAGE, ["nonsense"], "inspect", "-m", MODEL, "--tensor", "nonsense", "--out", out)
        self.assertEqual(list(self.folder.iterdir()), [])
        self.refused(USAGE, ["--out"], "inspect", "-m", MODEL, "--tensor", "output.weight")


if __name__ == "__main__":
    unittest.main()
