"""The user's case: every row of the README's table is a feasible plan, and the simulated run stays under it."""
import unittest

from cli import Case
from users_case import MACHINES, PROMPT, plan, rows, simulate


class UsersCase(Case):
    def check(self, row):
        planned = plan(row)
        self.assertIs(planned["feasible"], True, row)
        self.assertEqual(planned["max_context"], row.tokens)
        self.assertGreater(planned["predicted"]["decode_last_tokens_per_s"], 0)
        used = simulate(row)
        self.assertEqual(used["tokens"], row.tokens)
        self.assertEqual(used["new_tokens"], row.tokens - PROMPT)
        self.assertEqual(len(used["devices"]), len(planned["devices"]))
        for device, plan_of in zip(used["devices"], planned["devices"]):
            self.assertEqual(device["planned_peak_bytes"], plan_of["peak_bytes"], (row, device["name"]))
            self.assertLessEqual(device["peak_bytes"], plan_of["budget_bytes"], (row, device["name"]))
            for phase, numbers in device["phases"].items():
                self.assertLessEqual(numbers["peak_bytes"], numbers["planned_bytes"], (row, device["name"], phase))
            # The context is full at the end: nothing was planned for nothing, but that copies of experts take only
            # what whole experts fit into.
            decode = device["phases"]["decode"]
            self.assertGreaterEqual(decode["peak_bytes"],
                                    decode["planned_bytes"] - plan_of["phases"]["decode"]["expert_cache"],
                                    (row, device["name"]))
        # What was predicted is what the run took: the first step behind the prompt, and the last.
        self.assertLess(abs(used["decode_last_tokens_per_s"] / planned["predicted"]["decode_last_tokens_per_s"] - 1), 0.01)

    def test_16384_tokens(self):
        for row in rows((16384,)):
            self.check(row)

    def test_163840_tokens(self):
        for row in rows((163840,)):
            self.check(row)

    def test_every_machine_file_is_read(self):
        for path in sorted(MACHINES.glob("*.json")):
            self.run_ok("plan", "-m", MACHINES.parent / "configs/v2-lite.json", "--machine", path, "-c", 2048, "--json",
                        "--set", "weights.type=q4_k")


if __name__ == "__main__":
    unittest.main()
