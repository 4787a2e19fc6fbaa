"""The case that Fathom was asked for, as a table: Coder-V2 236B and V3 671B, 16,384 and 163,840 tokens, on 24 GB cards.

Plans each, then runs the whole generation on simulated devices and sets what was used beside what was planned:

    python3 tests/cli/users_case.py                 # the Markdown table of the README; about five minutes
    python3 tests/cli/users_case.py --tokens 16384  # the shorter half
"""
import argparse
import dataclasses

from cli import SOURCE, fathom

CONFIGS = SOURCE / "tests/data/configs"
MACHINES = SOURCE / "tests/data/machines"
PROMPT = 512  # tokens; the rest is generated
GIB = float(1 << 30)


@dataclasses.dataclass(frozen=True)
class Row:
    model: str       # a file of tests/data/configs
    name: str
    weights: str     # weights.type
    machine: str     # a file of tests/data/machines
    tokens: int

    def flags(self):
        return ["-m", CONFIGS / f"{self.model}.json", "--machine", MACHINES / f"{self.machine}.json",
                "--set", f"weights.type={self.weights}", "-c", self.tokens]


def rows(lengths=(16384, 163840)):
    for tokens in lengths:
        for weights, host in (("q8_0", 256), ("q4_k", 192)):
            for cards in ("1x24", "2x24", "4x24", "24-12"):
                yield Row("v2", "Coder-V2 236B", weights, f"{cards}-{host}", tokens)
        yield Row("v3", "V3 671B", "q4_k", "1x24-512", tokens)


def plan(row):
    """The plan, feasible or not."""
    return fathom("plan", *row.flags(), "--json").json()


def simulate(row):
    """The run to the last token; fails loudly when it ends early."""
    result = fathom("simulate", *row.flags(), "-p", PROMPT, "-n", row.tokens - PROMPT, "--json", "-q")
    if result.code != 0:
        raise RuntimeError(f"{row}: exit {result.code}\n{result.out}{result.err}")
    return result.json()


def gib(value):
    return f"{value / GIB:.1f}"


def table(lengths):
    lines = ["| model, weights | tokens | cards, host | planned GiB of budget, device by device | used | prefill tok/s | "
             "decode tok/s | whole run |", "|---|---|---|---|---|---|---|---|"]
    for row in rows(lengths):
        planned, used = plan(row), simulate(row)
        devices = " · ".join(f"{gib(d['peak_bytes'])} / {gib(d['budget_bytes'])}" for d in planned["devices"])
        # Copies of experts take only what whole experts fit into.
        same = all(p["peak_bytes"] - p["phases"]["decode"]["expert_cache"] <= u["peak_bytes"] <= p["peak_bytes"]
                   for p, u in zip(planned["devices"], used["devices"]))
        speed = planned["predicted"]
        hours = (used["prefill_seconds"] + used["decode_seconds"]) / 3600
        cards, _, host = row.machine.rpartition("-")
        lines.append(
            f"| {row.name} {row.weights} | {row.tokens:,} | {cards.replace('x', ' x ').replace('-', ' + ')} GB, {host} GB "
            f"| {devices} | {'as planned' if same else 'less'} | {speed['prefill_first_tokens_per_s']:.0f} to "
            f"{speed['prefill_last_tokens_per_s']:.0f} | {speed['decode_first_tokens_per_s']:.1f} to "
            f"{speed['decode_last_tokens_per_s']:.1f} | {hours:.1f} h |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, action="append", help="only rows of this length")
    print(table(parser.parse_args().tokens or (16384, 163840)))
