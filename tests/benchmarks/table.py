"""Prints what pytest-benchmark measured as ratios, in Markdown."""

import json
import sys
from collections import defaultdict
from pathlib import Path


def main(path: str) -> None:
    """Prints a table of all groups, the first entry of which is the unit."""
    groups = defaultdict(list)
    for entry in json.loads(Path(path).read_text())["benchmarks"]:
        groups[entry["group"]].append(entry)
    print("| what | ratio | notes |\n|---|---|---|")
    for group, entries in groups.items():
        unit = entries[0]["stats"]["min"]
        print(f"| **{group}** | | |")
        for entry in entries:
            name = entry["param"] or entry["name"].removeprefix("test_").replace("_", " ")
            notes = dict(entry["extra_info"])
            ratio = notes.pop("ratio", entry["stats"]["min"] / unit)
            noted = ", ".join(f"{k} {v:.3g}" for k, v in notes.items())
            print(f"| {name} | {ratio:.2f} | {noted} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
