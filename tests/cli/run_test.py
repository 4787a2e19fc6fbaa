"""fathom run: one prompt, a file, token ids, standard input, a chat; streams, signals, terminals."""
import array
import fcntl
import json
import os
import pty
import signal
import subprocess
import termios
import time
import unittest

from cli import DATA, MODEL, PROGRAM, TIMEOUT_S, Case, environment, fathom, read_safetensors

STORY = "User: Tell me a story about a fox.\n\nAssistant:"
# The code is in the prompt; the model answers such questions rightly.
CODE = ("Fiona wrote in the book: the greenhouse code is 8158. Hilda took the thin bell. Oscar went "
        "to the bedroom to rest. The polished sack is at the lake.\n\nWhat is the greenhouse code?")


class OneShot(Case):
    def test_answer_on_stdout_all_else_on_stderr(self):
        r = self.run_ok("run", "-m", MODEL, "-p", CODE, "--chat", "-n", 24)
        self.assertEqual(r.out.strip(), "The greenhouse code is 8158.")
        self.assertIn("prefill", r.err)
        self.assertIn("decode", r.err)
        self.assertIn("planned peak", r.err)

    def test_json_keys(self):
        r = self.run_ok("run", "-m", MODEL, "-p", CODE, "--chat", "-n", 24, "--json").json()
        self.assertIn("8158", r["text"])
        self.assertEqual(r["stop_reason"], "eos")
        self.assertGreater(r["prompt_tokens"], 40)
        self.assertTrue(all(isinstance(t, int) for t in r["tokens"]))
        self.assertEqual(set(r["timings"]) & {"prefill_tps", "decode_tps", "load_s"},
                         {"prefill_tps", "decode_tps", "load_s"})
        self.assertGreater(r["timings"]["prefill_tps"], 0)
        self.assertGreater(r["timings"]["decode_tps"], 0)
        self.assertEqual(r["events"], [])
        memory = r["memory"]
        self.assertGreater(memory["rss_peak_bytes"], 1 << 20)
        self.assertGreater(memory["ledger_peak_bytes"], 4 << 20)
        self.assertLessEqual(memory["ledger_peak_bytes"], memory["planned_peak_bytes"])
        self.assertEqual(set(memory["purposes"]),
                         {"weights", "experts", "kv", "activations", "workspace", "staging",
                          "tokenizer", "runtime", "expert_cache"})
        for name, purpose in memory["purposes"].items():
            self.assertLessEqual(purpose["peak_bytes"], purpose["planned_bytes"], name)
        self.assertEqual(memory["purposes"]["weights"]["peak_bytes"],
                         memory["purposes"]["weights"]["planned_bytes"])

    def test_greedy_tokens_equal_the_reference(self):
        golden = read_safetensors(DATA / "trained/golden.safetensors")
        for i in range(4):
            prompt, tokens = golden[f"gen.{i}.prompt"][1], golden[f"gen.{i}.tokens"][1]
            margins = golden[f"gen.{i}.margin"][1]
            sure = next((k for k, m in enumerate(margins) if m < 0.02), len(tokens))
            file = self.file("prompt.json", json.dumps(list(prompt)))
            r = self.run_ok("run", "-m", MODEL, "--tokens", file, "-n", len(tokens), "--ignore-eos",
                            "--json", "--set", "numerics=exact").json()
            self.assertEqual(r["tokens"][:sure], list(tokens)[:sure], f"gen.{i}")
            self.assertEqual(r["prompt_tokens"], len(prompt))

    def test_length_and_stop_string(self):
        r = self.run_ok("run", "-m", MODEL, "-p", STORY, "-n", 10, "--json").json()
        self.assertEqual((len(r["tokens"]), r["stop_reason"]), (10, "length"))
        r = self.run_ok("run", "-m", MODEL, "-p", STORY, "-n", 200, "--stop", ".", "--json").json()
        self.assertEqual(r["stop_reason"], "stop")
        self.assertNotIn(".", r["text"])

    def test_no_new_tokens(self):
        r = self.run_ok("run", "-m", MODEL, "-p", STORY, "-n", 0, "--json").json()
        self.assertEqual((r["tokens"], r["text"]), ([], ""))

    def test_prompt_from_file_and_from_stdin_are_the_same(self):
        file = self.file("prompt.txt", STORY)
        from_file = self.run_ok("run", "-m", MODEL, "-f", file, "-n", 12)
        from_stdin = self.run_ok("run", "-m", MODEL, "-f", "-", "-n", 12, stdin=STORY)
        self.assertEqual(from_file.out, from_stdin.out)
        self.assertGreater(len(from_file.out), 10)

    def test_seed_decides(self):
        flags = ("run", "-m", MODEL, "-p", STORY, "-n", 24, "--temp", 1.5, "--top-k", 50,
                 "--top-p", 0.99, "--min-p", 0.001, "--repeat-penalty", 1.05)
        texts = [self.run_ok(*flags, "-s", seed).out for seed in (1, 1, 2)]
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])

    def test_context_full_is_a_reason(self):
        r = self.run_ok("run", "-m", MODEL, "-p", STORY, "-c", 40, "--ignore-eos", "--json").json()
        self.assertEqual(r["stop_reason"], "context_full")
        self.assertEqual(r["prompt_tokens"] + len(r["tokens"]), 40)

    def test_chunk_and_threads_do_not_change_the_text(self):
        texts = {self.run_ok("run", "-m", MODEL, "-p", CODE, "--chat", "-n", 16, "-t", t, "-b", b,
                             "--set", "numerics=exact").out
                 for t, b in ((1, 64), (2, 64), (2, 7), (1, 1))}
        self.assertEqual(len(texts), 1)

    def test_environment_gives_flags(self):
        r = self.run_ok("run", "-p", STORY, "--json",
                        env={"FATHOM_ARG_MODEL": MODEL, "FATHOM_ARG_PREDICT": "3"}).json()
        self.assertEqual(len(r["tokens"]), 3)

    def test_gpu_layers_are_a_hint(self):
        r = self.run_ok("run", "-m", MODEL, "-p", STORY, "-n", 2, "-ngl", 99)
        self.assertIn("-ngl 99 is a hint", r.err)
        self.assertIn("5 on cpu", r.err)


class Chat(Case):
    def test_conversation_keeps_what_is_common(self):
        lines = f"{CODE.splitlines()[0]} What is the greenhouse code?\nHello!\n/memory\n/quit\nnever read\n"
        r = self.run_ok("run", "-m", MODEL, "-n", 32, "-v", stdin=lines)
        self.assertIn("8158", r.out.splitlines()[0])
        self.assertIn("Hello", r.out)
        self.assertEqual(len(r.out.strip().splitlines()), 2)
        self.assertIn("kept 0 tokens", r.err)
        kept = [int(l.split()[1].replace(",", "")) for l in r.err.splitlines() if l.startswith("kept ")]
        self.assertEqual(len(kept), 2)
        self.assertGreater(kept[1], 50)
        self.assertIn("kv", r.err)
        self.assertIn("context:", r.err)

    def test_reset_and_unknown_command_and_end_of_input(self):
        r = self.run_ok("run", "-m", MODEL, "-n", 16, "-v", stdin="Hello!\n/reset\n/nonsense\nHello!\n")
        answers = [line.strip() for line in r.out.splitlines()]
        self.assertEqual(len(answers), 2)
        self.assertEqual(answers[0], answers[1])
        self.assertEqual(r.err.count("kept 0 tokens"), 2)
        self.assertIn("/nonsense: no such command", r.err)

    def test_a_message_that_is_too_long_leaves_the_chat_going(self):
        r = self.run_ok("run", "-m", MODEL, "-c", 64, "-n", 16, stdin="Hello " * 100 + "\nHello!\n")
        self.assertIn("/reset begins a new conversation", r.err)
        self.assertIn("Hello", r.out)


class Streams(Case):
    def test_plain_lines_without_a_terminal(self):
        file = self.file("long.txt", "Anna went to the garden. " * 400)
        r = self.run_ok("run", "-m", MODEL, "-f", file, "-n", 1, "-b", 64)
        self.assertNotIn("\r", r.err)
        self.assertNotIn("\x1b", r.err)
        lines = [l for l in r.err.splitlines() if l.startswith("prefill ")]
        self.assertGreaterEqual(len(lines), 9)
        self.assertLessEqual(len(lines), 12)
        self.assertIn("100%", lines[-1])
        self.assertIn("KV", lines[-1])

    def test_quiet_says_nothing(self):
        r = self.run_ok("run", "-m", MODEL, "-p", STORY, "-n", 4, "-q")
        self.assertEqual(r.err, "")
        self.assertGreater(len(r.out), 4)

    def terminal(self, extra_env):
        """stderr of a run whose stderr is a terminal."""
        file = self.file("long.txt", "Anna went to the garden. " * 400)
        master, slave = pty.openpty()
        process = subprocess.Popen([PROGRAM, "run", "-m", MODEL, "-f", str(file), "-n", "1", "-b", "64"],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave,
                                   env=environment(extra_env))
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

    def test_a_bar_on_a_terminal_but_not_with_no_color(self):
        self.assertRegex(self.terminal({"NO_COLOR": ""}), r"\rprefill  .*\x1b\[K")
        self.assertNotIn("\x1b", self.terminal({"NO_COLOR": "1"}))

    def test_closed_stdout_is_an_io_error(self):
        process = subprocess.Popen([PROGRAM, "run", "-m", MODEL, "-p", STORY, "-n", "2000", "--ignore-eos"],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=environment())
        process.stdout.read(4)
        process.stdout.close()
        err = process.stderr.read().decode()
        process.stderr.close()
        self.assertEqual(process.wait(TIMEOUT_S), 5)
        self.assertIn("standard output", err)

    def test_full_disk_is_an_io_error(self):
        with open("/dev/full", "wb") as full:
            process = subprocess.run([PROGRAM, "run", "-m", MODEL, "-p", STORY, "-n", "4", "--json"],
                                     stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=TIMEOUT_S)
        self.assertEqual(process.returncode, 5)


class Signals(Case):
    ENDLESS = [PROGRAM, "run", "-m", MODEL, "-p", STORY, "-n", "20000", "--ignore-eos", "-t", "1"]

    def start(self):
        process = subprocess.Popen(self.ENDLESS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=environment())
        self.assertTrue(process.stdout.read(8))  # it writes: it is in generate()
        return process

    def finish(self, process):
        out, err = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, err.decode()

    def test_one_interrupt_cancels_cleanly_with_statistics(self):
        process = self.start()
        process.send_signal(signal.SIGINT)
        code, err = self.finish(process)
        self.assertEqual(code, 130, err)
        self.assertIn("stopped: cancelled", err)
        self.assertIn("planned peak", err)

    def test_terminate(self):
        process = self.start()
        process.send_signal(signal.SIGTERM)
        code, err = self.finish(process)
        self.assertEqual(code, 143, err)
        self.assertIn("stopped: cancelled", err)

    def test_two_interrupts_end_at_once(self):
        # Standard output is a full pipe that nobody reads: the first interrupt cannot end the
        # write, the second ends the program.
        read_end, write_end = os.pipe()
        fcntl.fcntl(write_end, 1031, 4096)  # F_SETPIPE_SZ
        process = subprocess.Popen(self.ENDLESS, stdin=subprocess.DEVNULL, stdout=write_end,
                                   stderr=subprocess.DEVNULL, env=environment())
        os.close(write_end)
        # The pipe is full when it is nearly so and nothing has come for two seconds.
        held, before, since = array.array("i", [0]), -1, time.monotonic()
        end = since + TIMEOUT_S
        while process.poll() is None and time.monotonic() < end:
            fcntl.ioctl(read_end, termios.FIONREAD, held)
            if held[0] != before:
                before, since = held[0], time.monotonic()
            if held[0] > 4000 and time.monotonic() - since > 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        self.assertIsNone(process.poll())
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(TIMEOUT_S), 130)
        os.close(read_end)

    def test_interrupt_in_prefill(self):
        file = self.file("long.txt", "Anna went to the garden. " * 4000)
        process = subprocess.Popen([PROGRAM, "run", "-m", MODEL, "-f", str(file), "-n", "1", "-b", "16", "-t", "1"],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=environment())
        err = b""
        while b"prefill " not in err:
            piece = os.read(process.stderr.fileno(), 4096)
            self.assertTrue(piece, err)
            err += piece
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual(process.returncode, 130, (err + rest).decode())
        self.assertIn("prefill", rest.decode())
        self.assertEqual(out, b"")

    def test_interrupt_at_the_chat_prompt(self):
        process = subprocess.Popen([PROGRAM, "run", "-m", MODEL, "-n", "8"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        process.stdin.write(b"Hello!\n")
        process.stdin.flush()
        self.assertTrue(process.stdout.readline())  # it waits for the next line now
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.stdin, keep = None, process.stdin
        code, err = self.finish(process)
        keep.close()
        self.assertEqual(code, 130, err)
        self.assertIn("planned peak", err)

    def test_deadline(self):
        r = fathom("run", "-m", MODEL, "-p", STORY, "-n", 30000, "--ignore-eos", "-t", 1, "--deadline", 1, "--json")
        self.assertEqual(r.code, 8, r.err)
        self.assertEqual(r.json()["stop_reason"], "deadline")


if __name__ == "__main__":
    unittest.main()
