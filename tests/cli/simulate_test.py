"""fathom simulate, and fathom plan for a described machine."""
import json
import unittest

from cli import SOURCE, Case

CONFIG = SOURCE / "tests/data/configs/v2-lite.json"
MACHINE = {"devices": [{"name": "cpu", "kind": "cpu", "bytes": "64G"}, {"name": "cuda:0", "kind": "cuda", "bytes": "24G"}]}


class Simulate(Case):
    def setUp(self):
        super().setUp()
        self.machine = self.file("machine.json", json.dumps(MACHINE))
        self.flags = ["-m", CONFIG, "--machine", self.machine, "--set", "weights.type=q8_0"]

    def test_a_plan_for_a_machine_that_is_elsewhere(self):
        plan = self.run_ok("plan", *self.flags, "-c", 4096, "--json").json()
        self.assertEqual([d["name"] for d in plan["devices"]], ["cpu", "cuda:0"])
        self.assertEqual([d["kind"] for d in plan["devices"]], ["cpu", "cuda"])
        self.assertEqual(plan["devices"][1]["budget_bytes"], 24 << 30)
        self.assertEqual(plan["predicted"]["rates"], "documented")
        self.assertGreater(plan["predicted"]["prefill_first_tokens_per_s"],
                           plan["predicted"]["prefill_last_tokens_per_s"])
        text = self.run_ok("plan", *self.flags, "-c", 4096).out
        for word in ("load GiB", "prefill", "decode", "per token", "cuda:0", "predicted (documented rates)", "balance",
                     "FITS: 4,096 tokens"):
            self.assertIn(word, text)

    def test_a_generation(self):
        report = self.run_ok("simulate", *self.flags, "-p", 700, "-n", 300, "--json").json()
        self.assertEqual((report["prompt_tokens"], report["new_tokens"], report["tokens"]), (700, 300, 1000))
        for device in report["devices"]:
            self.assertEqual(device["peak_bytes"], device["planned_peak_bytes"])
            for numbers in device["phases"].values():
                self.assertLessEqual(numbers["peak_bytes"], numbers["planned_bytes"])
        self.assertGreater(report["decode_first_tokens_per_s"], report["decode_last_tokens_per_s"])
        # The last step is what the plan predicts at its end.
        plan = self.run_ok("plan", *self.flags, "-c", 1000, "--json").json()
        self.assertAlmostEqual(report["decode_last_tokens_per_s"] / plan["predicted"]["decode_last_tokens_per_s"], 1, 2)
        text = self.run_ok("simulate", *self.flags, "-p", 700, "-n", 300).out
        for word in ("planned bytes", "cuda:0", "decode", "tokens/s", "worked"):
            self.assertIn(word, text)

    def test_the_timeline_has_the_machines_clock(self):
        path = self.folder / "timeline.json"
        report = self.run_ok("simulate", *self.flags, "-p", 700, "-n", 300, "--timeline", path, "--json").json()
        timeline = json.loads(path.read_text())
        self.assertEqual([d["name"] for d in timeline["devices"]], ["cpu", "cuda:0"])
        seconds = report["prefill_seconds"] + report["decode_seconds"]
        self.assertAlmostEqual(timeline["seconds"] / seconds, 1, 1)
        for device, used in zip(timeline["devices"], report["devices"]):
            self.assertEqual(device["peak_bytes"], used["peak_bytes"])
            self.assertLessEqual(device["peak_bytes"], device["planned_bytes"])
        html = self.folder / "timeline.html"
        self.run_ok("simulate", *self.flags, "-n", 100, "--timeline", html, "-q")
        self.assertIn("cuda:0", html.read_text())

    def test_what_does_not_fit_is_not_run(self):
        small = self.file("small.json", json.dumps({"devices": [{"name": "cpu", "bytes": "8G"}]}))
        flags = ["-m", CONFIG, "--machine", small, "--set", "weights.type=q8_0", "-n", 1000]
        self.assertIn("DOES NOT FIT", self.run_code(3, "simulate", *flags).out)
        self.assertIs(self.run_code(3, "simulate", *flags, "--json").json()["feasible"], False)

    def test_a_wrong_machine_file_is_a_usage_error(self):
        wrong = self.file("wrong.json", '{"devices": [{"name": "cpu", "bites": 1}]}')
        for command in ("plan", "simulate"):
            result = self.run_code(2, command, "-m", CONFIG, "--machine", wrong)
            self.assertIn("nearest is bytes", result.err)
            self.assertEqual(result.out, "")
        self.run_code(2, "simulate", "-m", CONFIG)  # --machine is required
        self.run_code(2, "plan", "-m", CONFIG, "--machine", self.machine, "--measure")


if __name__ == "__main__":
    unittest.main()
