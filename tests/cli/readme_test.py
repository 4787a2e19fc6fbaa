"""README.md says what is so: programs, keys, numbers, commands, files."""
import pathlib
import re
import unittest

from cli import SOURCE, Case

README = (SOURCE / "README.md").read_text()


class Readme(Case):
    def test_programs_are_the_examples(self):
        for language, name in (("cpp", "hello.cpp"), ("c", "hello.c"), ("python", "hello.py")):
            block = re.search(rf"\(examples/{re.escape(name)}\)\):\n\n```{language}\n(.*?)\n```\n", README, re.S)
            self.assertIsNotNone(block, name)
            self.assertEqual(block.group(1), (SOURCE / "examples" / name).read_text().rstrip("\n"), name)

    def test_links_lead_somewhere(self):
        links = re.findall(r"\]\(([^)#:]+)\)", README)
        self.assertGreater(len(links), 15)
        for link in links:
            self.assertTrue((SOURCE / link).exists(), link)

    def test_every_header_is_mapped(self):
        for header in (SOURCE / "include/fathom").glob("*.hpp"):
            self.assertIn(f"(include/fathom/{header.name})", README)

    def test_every_key_is_in_the_table(self):
        keys = {row["key"] for row in self.run_ok("config", "--schema").json()}
        table = README[README.index("| key | default"):README.index("## Memory in numbers")]
        first_cells = re.findall(r"^\| (`[^|]+) \|", table, re.M)
        listed = [key for cell in first_cells for key in re.findall("`([^`]+)`", cell)]
        self.assertEqual({re.sub("<.*", "", k) for k in listed},
                         {re.sub("<.*", "", k) for k in keys})

    def test_commands_exist(self):
        commands = set(re.findall(r"^    fathom ([a-z]+) ", README, re.M))
        self.assertGreater(len(commands), 7)
        for command in commands:
            self.run_ok(command, "--help")

    def test_cache_numbers(self):
        """512 latent columns in each type and 64 RoPE columns in 16 bits, times the layers."""
        row = {"f32": 576 * 4, "bf16, f16": 576 * 2, "q8_0": 16 * 34 + 128, "fp8": 16 + 512 + 128, "q4_0": 16 * 18 + 128}
        head = re.search(r"^\| model \| layers \| (.*) \|$", README, re.M).group(1).split(" | ")
        self.assertEqual(head, list(row))
        lines = re.findall(r"^\| (V[23][^|]*) \| (\d+) \| (.*) \|$", README, re.M)
        self.assertEqual([layers for _, layers, _ in lines], ["27", "60", "61"])
        for _, layers, numbers in lines:
            self.assertEqual([int(n.replace(",", "")) for n in numbers.split(" | ")],
                             [int(layers) * b for b in row.values()])

    def test_exit_codes_are_those_of_the_help(self):
        def squeezed(text):
            return re.sub(r"\s+", " ", text)
        listed = re.search(r"Exit codes: .*?143 SIGTERM\.", README, re.S).group(0)
        self.assertIn(squeezed(listed), squeezed(self.run_ok("--help").out))


if __name__ == "__main__":
    unittest.main()
