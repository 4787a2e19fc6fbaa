"""fathom devices: memory nodes, the devices made of them, and their links."""
import os
import unittest

from cli import MODEL, Case


class Devices(Case):
    def test_json(self):
        r = self.run_ok("devices", "--json").json()
        cpus = [cpu for node in r["nodes"] for cpu in node["cpus"]]
        self.assertEqual(sorted(cpus), sorted(os.sched_getaffinity(0)))
        for node in r["nodes"]:
            self.assertEqual(len(node["distances"]), len(r["nodes"]))
        self.assertEqual([d["name"] for d in r["devices"]], ["cpu"])
        self.assertIn("memory nodes", r["devices"][0]["text"])
        self.assertEqual(r["links"], [])

    def test_one_device_per_node(self):
        nodes = [n for n in self.run_ok("devices", "--json").json()["nodes"] if n["cpus"]]
        r = self.run_ok("devices", "--set", "devices=numa", "--json").json()
        self.assertEqual([d["name"] for d in r["devices"]], [f"cpu:{n['id']}" for n in nodes])
        self.assertEqual([d["threads"] for d in r["devices"]], [len(n["cpus"]) for n in nodes])
        self.assertEqual(len(r["links"]), len(nodes) * (len(nodes) - 1) // 2)

    def test_text(self):
        out = self.run_ok("devices", "--set", "devices=cpu:0,cpu:1", "-t", 1).out
        self.assertRegex(out, r"(?m)^  node \d+: processors [\d,-]+; .* free; distances 10")
        self.assertRegex(out, r"(?m)^  cpu:1: .* GB/s \(documented\)$")
        self.assertRegex(out, r"(?m)^  cpu:0 - cpu:1: 40\.0 GB/s, 1\.0 us \(documented\)$")

    def test_a_model_runs_on_nodes(self):
        one = self.run_ok("run", "-m", MODEL, "-p", "Once upon", "-n", 8, "--temp", 0).out
        for key in ("devices=numa", "numa=rows", "numa=off"):
            self.assertEqual(self.run_ok("run", "-m", MODEL, "-p", "Once upon", "-n", 8, "--temp", 0,
                                         "--set", key).out, one, key)

    def test_refusals(self):
        for key, text in (("numa=columns", "auto, off, rows"), ("devices=numa,cpu:0", "named beside"),
                          ("budget.numa=1G", "budget.numa")):
            r = self.run_code(2, "devices", "--set", key)
            self.assertIn(text, r.err)
        r = self.run_code(2, "devices", "--set", "devices=numa", "--set", "budget.cpu:99=1G")
        self.assertIn("no node of this number", r.err)
        r = self.run_code(2, "devices", "--set", "devices=numa", "--set", "numa=rows")
        self.assertIn("numa = rows", r.err)


if __name__ == "__main__":
    unittest.main()
