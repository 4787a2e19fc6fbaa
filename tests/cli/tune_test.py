"""fathom tune, and `fathom run` with what it measured."""
import json
import unittest

from cli import MODEL, Case

STORY = "User: Tell me a story about a fox.\n\nAssistant:"


class Tune(Case):
    def setUp(self):
        super().setUp()
        self.env = {"XDG_CACHE_HOME": str(self.folder)}

    def tune(self, *flags):
        return self.run_ok("tune", "-m", MODEL, "--seconds", 0.3, "-c", 500, *flags, env=self.env)

    def run_model(self, *flags, env=None):
        return self.run_ok("run", "-m", MODEL, "-p", STORY, "-n", 2, *flags, env=env or self.env)

    def profile(self):
        files = list((self.folder / "fathom/profiles").iterdir())
        self.assertEqual(len(files), 1)
        return files[0]

    def test_a_profile_is_measured_kept_and_used(self):
        r = self.tune()
        self.assertIn("<- best", r.out)
        self.assertIn("prefill/s", r.out)
        profile = json.loads(self.profile().read_text())
        self.assertGreater(profile["decode_tps"], 0)
        used = self.run_model()
        self.assertIn("profile: ", used.err)
        for key, value in profile["settings"].items():
            self.assertIn(f"{key}={value}", used.err)
        self.assertNotIn("profile", self.run_model("--no-profile").err)
        self.assertNotIn("profile", self.run_model(env={"XDG_CACHE_HOME": str(self.folder / "no")}).err)

    def test_json(self):
        r = self.tune("--json", "--goal", "context=400").json()
        best = r["trials"][r["best"]]
        self.assertGreater(best["decode_tps"], 0)
        self.assertGreaterEqual(best["max_context"], 400)
        self.assertEqual(best["settings"], r["profile"]["settings"])
        self.assertEqual(r["profile"]["goal"], "context")

    def test_what_the_user_says_wins(self):
        self.tune("-t", 1)
        profile = json.loads(self.profile().read_text())
        self.assertNotIn("threads", profile["settings"])
        profile["settings"] = {"kv.type": "q8_0", "prefill.chunk": "64"}
        self.profile().write_text(json.dumps(profile))
        self.assertIn("kv.type=q8_0 prefill.chunk=64", self.run_model().err)
        self.assertIn("kv.type=f16 prefill.chunk=32", self.run_model("--kv-type", "f16", "-b", 32).err)

    def test_stale_and_broken_profiles_are_ignored_with_a_message(self):
        self.tune()
        path, text = self.profile(), self.profile().read_text()
        profile = json.loads(text)
        for change in ({"machine": "0" * 32}, {"model": "0" * 32}, {"fathom_profile": 99},
                       {"settings": {"no.such.key": "1"}}, {"settings": 3}):
            path.write_text(json.dumps({**profile, **change}))
            self.assertIn("profile ignored: ", self.run_model().err, change)
        path.write_text(text[:40])
        self.assertIn("profile ignored: ", self.run_model().err)
        # One that does not fit now: the plan without it does.
        path.write_text(json.dumps({**profile, "settings": {"prefill.chunk": "8192"}}))
        r = self.run_model("--mem-budget", "cpu=12M", "-c", 500)
        self.assertIn("profile ignored: it does not fit", r.err)

    def test_output_file_and_bad_goals(self):
        path = self.folder / "here.json"
        self.tune("-o", path)
        self.assertEqual(json.loads(path.read_text())["goal"], "decode")
        for goal in ("speed", "context=", "context=-3", "context"):
            self.run_code(2, "tune", "-m", MODEL, "--goal", goal, env=self.env)
        self.run_code(6, "tune", "-m", MODEL, "--mem-budget", "cpu=1M", "-c", 100, env=self.env)
        self.run_code(5, "tune", "-m", MODEL, "--seconds", 0, "-o", self.file("plain", "x") / "y",
                      env=self.env)


if __name__ == "__main__":
    unittest.main()
