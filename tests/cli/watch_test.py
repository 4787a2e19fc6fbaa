"""fathom run: sessions saved and loaded, timelines written, the live line."""
import csv
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import unittest
import xml.etree.ElementTree as xml

from cli import MODEL, PROGRAM, TIMEOUT_S, Case, environment

STORY = "User: Tell me a story about a fox.\n\nAssistant:"
EXACT = ("--set", "numerics=exact")


class States(Case):
    def test_a_saved_run_goes_on_as_if_it_had_not_stopped(self):
        state = self.folder / "fox.session"
        whole = self.run_ok("run", "-m", MODEL, "-p", STORY, "-n", 40, "--ignore-eos", "--json").json()
        first = self.run_ok("run", "-m", MODEL, "-p", STORY, "-n", 15, "--ignore-eos", "--json",
                            "--save-state", state)
        self.assertIn("saved", first.err)
        second = self.run_ok("run", "-m", MODEL, "-n", 25, "--ignore-eos", "--json", "--load-state", state,
                             "--save-state", state).json()
        self.assertEqual(first.json()["tokens"] + second["tokens"], whole["tokens"])
        self.assertEqual(second["prompt_tokens"], 0)
        # The second run saved over it: all 40 tokens are there.
        third = self.run_ok("run", "-m", MODEL, "-n", 0, "--load-state", state)
        self.assertIn(f"{whole['prompt_tokens'] + 40} tokens", third.err)

    def test_a_prompt_is_appended(self):
        state = self.folder / "s"
        text = "Fiona wrote in the book: the greenhouse code is 8158. Hilda took the thin bell."
        self.run_ok("run", "-m", MODEL, "-p", text, "--chat", "-n", 24, "--save-state", state)
        r = self.run_ok("run", "-m", MODEL, "-p", "What is the greenhouse code?", "--chat", "-n", 24,
                        "--load-state", state)
        self.assertIn("8158", r.out)

    def test_an_interrupted_prefill_is_kept(self):
        state = self.folder / "long.session"
        file = self.file("long.txt", "Anna went to the garden. " * 4000)
        process = subprocess.Popen([PROGRAM, "run", "-m", MODEL, "-f", str(file), "-n", "1", "-b", "16", "-t", "1",
                                    "--save-state", str(state)], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
        err = b""
        while b"prefill " not in err:
            piece = os.read(process.stderr.fileno(), 4096)
            self.assertTrue(piece, err)
            err += piece
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual(process.returncode, 130, rest.decode())
        saved = int(re.search(r"saved ([\d,]+) tokens", rest.decode())[1].replace(",", ""))
        self.assertGreater(saved, 0)
        # It has no logits: the last token is read once more.
        r = self.run_ok("run", "-m", MODEL, "-n", 3, "--ignore-eos", "--json", "--load-state", state).json()
        self.assertEqual(r["prompt_tokens"], 1)
        self.assertEqual(len(r["tokens"]), 3)

    def test_a_bad_state_file_is_told(self):
        bad = self.file("bad", "not a session at all, but longer than a magic number")
        self.assertIn("bad", self.run_code(4, "run", "-m", MODEL, "-n", 1, "--load-state", bad).err)
        self.run_code(5, "run", "-m", MODEL, "-n", 1, "--load-state", self.folder / "absent")
        self.run_code(5, "run", "-m", MODEL, "-p", STORY, "-n", 1, "--save-state", self.folder / "no/folder")

    def test_a_chat_is_saved_at_its_end(self):
        state = self.folder / "chat"
        r = self.run_ok("run", "-m", MODEL, "-n", 8, "--save-state", state, stdin="Hello!\n")
        self.assertIn("saved", r.err)
        self.assertTrue(state.exists())


class Timelines(Case):
    def write(self, name, *flags):
        path = self.folder / name
        r = self.run_ok("run", "-m", MODEL, "-p", STORY * 4, "-n", 30, "--ignore-eos", "-c", 300,
                        "--timeline", path, *flags)
        self.assertRegex(r.err, r"planned peak .*, measured peak .*, difference [+-]\d")
        return path.read_text()

    def test_json(self):
        t = json.loads(self.write("t.json"))
        device = t["devices"][0]
        self.assertEqual([m["kind"] for m in t["marks"]][:3], ["load", "prefill", "decode"])
        self.assertEqual(max(sum(p[3:]) for p in device["points"]), device["peak_bytes"])
        self.assertLessEqual(device["peak_bytes"], device["planned_bytes"])
        self.assertLessEqual(len(device["points"]), 2000)
        self.assertLessEqual(device["planned_bytes"], device["budget_bytes"])

    def test_a_full_context_reaches_the_plan_to_the_byte(self):
        path = self.folder / "t.json"
        r = self.run_ok("run", "-m", MODEL, "-p", STORY, "--ignore-eos", "-c", 300, "--timeline", path, "--json")
        t = json.loads(path.read_text())
        self.assertEqual(t["peak_bytes"], t["planned_bytes"])
        self.assertIn("difference +0.0%", t["summary"])
        memory = r.json()["memory"]
        self.assertEqual(memory["planned_peak_bytes"], t["planned_bytes"])
        self.assertEqual(memory["ledger_peak_bytes"], t["peak_bytes"])

    def test_csv(self):
        rows = list(csv.DictReader(io.StringIO(self.write("t.csv"))))
        self.assertGreater(len(rows), 10)
        for row in rows:
            self.assertEqual(int(row["total"]), sum(int(row[p]) for p in (
                "weights", "experts", "kv", "activations", "workspace", "staging", "tokenizer", "runtime",
                "expert_cache")))
        self.assertEqual({row["phase"] for row in rows}, {"start", "load", "prefill", "decode"})
        seconds = [float(row["seconds"]) for row in rows]
        self.assertEqual(seconds, sorted(seconds))

    def test_svg_is_well_formed(self):
        root = xml.fromstring(self.write("t.svg", "--set", "devices=cpu:0,cpu:1"))
        self.assertEqual(root.tag, "{http://www.w3.org/2000/svg}svg")
        # A phase that is too short for its label still has a title.
        names = [e.text for kind in ("text", "title") for e in root.iter("{http://www.w3.org/2000/svg}" + kind)]
        for word in ("Memory over time", "cpu:0", "cpu:1", "kv", "planned peak", "budget", "decode"):
            self.assertIn(word, names)

    def test_html_needs_nothing_else(self):
        page = self.write("t.html")
        self.assertNotRegex(page, r"\b(src|href)=|@import|url\(|fetch\(")
        data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
        self.assertEqual(data["purposes"][2], "kv")

    def test_a_chat_and_a_failed_run_write_it_too(self):
        path = self.folder / "t.json"
        self.run_ok("run", "-m", MODEL, "-n", 4, "--timeline", path, stdin="Hello!\nHello!\n")
        kinds = [m["kind"] for m in json.loads(path.read_text())["marks"]]
        self.assertEqual(kinds[:3], ["load", "prefill", "decode"])
        self.run_code(6, "run", "-m", MODEL, "-p", STORY * 20, "-c", 40, "--timeline", path)
        self.assertEqual([m["kind"] for m in json.loads(path.read_text())["marks"]], ["load"])

    def test_steps_of_the_ladder_are_marked(self):
        flags = ("-m", MODEL, "-c", 2000, "-b", 64, "--set", "kv.page_tokens=64")
        peak = self.run_ok("plan", *flags, "--json").json()["devices"][0]["peak_bytes"]
        path = self.folder / "t.json"
        r = self.run_ok("run", *flags, "-p", STORY, "-n", 1500, "--ignore-eos", "--timeline", path,
                        "--set", "kv.tiers=device,file", "--mem-budget", f"cpu={peak - 200 * 1024}")
        self.assertIn("event: ", r.err)
        t = json.loads(path.read_text())
        spills = [m for m in t["marks"] if m["kind"] == "spilled_to_file"]
        self.assertGreater(sum(m["bytes"] for m in spills), 0, t["marks"])
        self.assertLessEqual(t["peak_bytes"], t["planned_bytes"])
        self.assertLessEqual(t["peak_bytes"], t["devices"][0]["budget_bytes"])
        self.assertIn("spill file", r.err)

    def test_what_cannot_be_written_is_told(self):
        self.assertIn("--timeline", self.run_code(2, "run", "-m", MODEL, "-p", "x", "--timeline", "t.png").err)
        self.run_code(5, "run", "-m", MODEL, "-p", "x", "-n", 1, "--timeline", self.folder / "no/t.html")


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@unittest.skipUnless(BROWSER, "no headless browser (chromium) here")
class Browser(Case):
    # Moves the pointer over the first panel and then the keyboard's cursor to its end.
    SCRIPT = """<script>setTimeout(() => {
      const svg = document.querySelector('figure svg'), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 90}));
      document.body.dataset.tip = document.getElementById('tip').innerText;
      svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'End'}));
      document.body.dataset.live = document.getElementById('live').textContent;
    }, 50)</script></body>"""

    def test_the_page_draws_itself_and_answers_pointer_and_keys(self):
        path = self.folder / "t.html"
        self.run_ok("run", "-m", MODEL, "-p", STORY, "--ignore-eos", "-c", 300, "--timeline", path,
                    "--set", "devices=cpu:0,cpu:1")
        page = path.read_text()
        path.write_text(page.replace("</body>", self.SCRIPT))
        dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
                              f"--user-data-dir={self.folder}/profile", "--dump-dom", f"file://{path}"],
                             capture_output=True, timeout=TIMEOUT_S).stdout.decode()
        self.assertIn('data-drawn="2"', dom)
        self.assertEqual(dom.count('aria-label="Memory of cpu:'), 2)
        self.assertGreater(dom.count('<path class="area"'), 10)
        tip = re.search(r'data-tip="([^"]*)"', dom)[1]
        for word in ("decode", "tokens", "kv", "weights"):
            self.assertIn(word, tip)
        self.assertIn("decode, 300 tokens", re.search(r'data-live="([^"]*)"', dom)[1])


class Live(Case):
    def stderr_on_a_terminal(self, *flags):
        master, slave = pty.openpty()
        process = subprocess.Popen([PROGRAM, "run", "-m", MODEL, "-p", STORY, "-n", "1500", "--ignore-eos", "-t", "1",
                                    *flags], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=slave, env=environment({"NO_COLOR": ""}))
        os.close(slave)
        text = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            text += piece
        os.close(master)
        self.assertEqual(process.wait(TIMEOUT_S), 0)
        return text.decode()

    def test_a_live_line_on_a_terminal_but_not_with_quiet(self):
        text = self.stderr_on_a_terminal()
        self.assertRegex(text, r"\r[\d,]+ tokens, [\d.]+ tok/s, KV [\d.]+ \w+, budget \d+%, room for [\d,]+ tokens")
        self.assertEqual(self.stderr_on_a_terminal("-q"), "")


if __name__ == "__main__":
    unittest.main()
