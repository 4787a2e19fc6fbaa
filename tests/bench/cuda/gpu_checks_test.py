#!/usr/bin/env python3
"""That gpu_checks.py tells what happened: a step that fails, hangs or cannot start does not end the
run, steps share their time as they say, and the sum stays under ten minutes."""
import pathlib
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import gpu_checks as g  # noqa: E402


def python(code):
    return [sys.executable, "-c", code]


class Steps(unittest.TestCase):
    def run_steps(self, steps, total=60):
        with tempfile.TemporaryDirectory() as folder:
            return g.run_steps(steps, total, folder, say=lambda text: None)

    def test_every_step_runs_whatever_the_one_before_did(self):
        steps = [
            g.Step("crashes", 10, python("import os; os.abort()")),
            g.Step("fails", 10, python("print('@ a | 1 GB/s | PASS'); print('@ b | 2 | FAIL')")),
            g.Step("cannot start", 10, ["/nonexistent/program"]),
            g.Step("hangs", 1, python("import time; print('begun', flush=True); time.sleep(60)")),
            g.Step("passes", 10, python("print('@ c | 3 us | PASS'); print('@ d | seen | INFO')")),
            g.Step("plain", 10, python("print('All tests passed (5 assertions in 2 test cases)')")),
            g.Step("exits", 10, python("print('the reason'); raise SystemExit(4)")),
        ]
        start = time.monotonic()
        outcomes = self.run_steps(steps)
        self.assertLess(time.monotonic() - start, 30)
        self.assertEqual([o.result for o in outcomes.values()],
                         [g.FAIL, g.FAIL, g.FAIL, g.FAIL, g.PASS, g.PASS, g.FAIL])
        self.assertIn("1 of 2 figures missed: b", outcomes["fails"].figure)
        self.assertIn("/nonexistent/program", outcomes["cannot start"].figure)
        self.assertIn("not finished in 1 s", outcomes["hangs"].figure)
        self.assertIn("All tests passed", outcomes["plain"].figure)
        self.assertIn("exit code 4: the reason", outcomes["exits"].figure)
        text = g.table(steps, outcomes, 1)
        for line in ("| **crashes** | FAIL |", "| a | PASS | | 1 GB/s |", "| b | FAIL | | 2 |",
                     "| d | INFO | | seen |", "2 of 7 steps passed"):
            self.assertIn(line, text)

    def test_a_step_that_needs_another_is_not_run_without_it(self):
        steps = [g.Step("model", 10, python("raise SystemExit(1)"), background=True),
                 g.Step("run", 10, python("print('ran')"), needs="model")]
        outcomes = self.run_steps(steps)
        self.assertEqual(outcomes["run"].result, g.SKIPPED)
        self.assertIn("model", outcomes["run"].figure)

    def test_background_steps_run_beside_the_others(self):
        steps = [g.Step("first", 10, python("import time; time.sleep(1)")),
                 g.Step("written", 10, python("import time; time.sleep(1)"), background=True)]
        start = time.monotonic()
        outcomes = self.run_steps(steps)
        self.assertLess(time.monotonic() - start, 1.9)
        self.assertEqual([o.result for o in outcomes.values()], [g.PASS, g.PASS])

    def test_the_time_of_all_steps_ends_the_run(self):
        sleeps = python("import time; time.sleep(30)")
        steps = [g.Step("one", 2, sleeps), g.Step("two", 20, sleeps), g.Step("three", 20, sleeps)]
        start = time.monotonic()
        outcomes = self.run_steps(steps, total=4)
        self.assertLess(time.monotonic() - start, 8)
        self.assertEqual(outcomes["two"].result, g.FAIL)
        self.assertEqual(outcomes["three"].result, g.SKIPPED)
        self.assertIn("used up", outcomes["three"].figure)

    def test_a_growing_step_gets_what_is_left_over(self):
        steps = [g.Step("short", 100, python("pass")),
                 g.Step("grows", 10, python("print('{seconds}')"), grows=True),
                 g.Step("later", 50, python("pass"))]
        outcomes = self.run_steps(steps, total=200)
        # 200 less the moment of the first, less 50 for the last, less 5 to say what came of it.
        self.assertIn(int(outcomes["grows"].figure), range(130, 146))

    def test_the_real_steps_fit_ten_minutes_and_have_names_of_their_own(self):
        for emulated in (False, True):
            steps = g.make_steps(pathlib.Path("/b"), pathlib.Path("/p.so"), pathlib.Path("/m"),
                                 emulated, pathlib.Path("/t.json"))
            self.assertLessEqual(sum(s.seconds for s in steps),
                                 g.TOTAL_S * (g.EMULATED_SLOWER if emulated else 1))
            self.assertLess(g.TOTAL_S, 600)
            self.assertEqual(len({s.name for s in steps}), len(steps))
            for step in steps:
                self.assertTrue(not step.needs or step.needs in {s.name for s in steps})
        real = {s.name: s for s in g.make_steps(pathlib.Path("/b"), pathlib.Path("/p.so"),
                                                pathlib.Path("/m"), False, pathlib.Path("/t"))}
        emulated = {s.name for s in steps}
        self.assertEqual(set(real), emulated)
        text = " ".join(str(part) for s in real.values() for part in s.command)
        for word in ("163840 16384", "12G", "memcheck", "racecheck", "gemv", "gemm", "attention"):
            self.assertIn(word, text)


if __name__ == "__main__":
    unittest.main()
