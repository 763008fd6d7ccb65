"""What every test costs: ``pytest --costs FILE`` appends a JSON line per test, this module prints the table of them.

CPU seconds are those of this process and of all processes that a test started and waited for, ranks of mpirun
included; those of module fixtures count for the first test that asks for them.

    python tests/helpers/costs_helper.py FILE [FILE of before]
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks_helper import forks_cpu_seconds


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds of this process, and of the children it has waited for."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, others.ru_utime + others.ru_stime + forks_cpu_seconds()


class Costs:
    """The plugin."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started: Counter[str] = Counter()
        sys.addaudithook(self._count)

    def _count(self, event: str, arguments: tuple) -> None:
        if event == "subprocess.Popen":
            self.started[Path(str(arguments[1][0])).name] += 1

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.started.clear()
        before, began = cpu_seconds(), time.monotonic()
        yield
        own, others = (b - a for a, b in zip(before, cpu_seconds()))
        record = {
            "test": item.nodeid,
            "own_s": round(own, 3),
            "children_s": round(others, 3),
            "wall_s": round(time.monotonic() - began, 3),
            "started": dict(self.started),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read(path: Path) -> dict[str, dict]:
    """Test -> its last record."""
    return {record["test"]: record for record in map(json.loads, path.read_text().splitlines())}


def per_folder(records: dict[str, dict]) -> dict[str, float]:
    """Folder of tests/ -> CPU seconds."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for name, record in records.items():
        seconds[name.split("/")[1]] += record["own_s"] + record["children_s"]
    return dict(seconds)


def main(paths: list[str]) -> None:
    records = read(Path(paths[0]))
    before = per_folder(read(Path(paths[1]))) if len(paths) > 1 else {}
    folders = per_folder(records)
    for folder in sorted({*folders, *before}):
        earlier = f"{before.get(folder, 0):8.0f} ->" if before else ""
        print(f"{folder:12s}{earlier}{folders.get(folder, 0):8.0f} CPU s")
    print(f"{'all':12s}{f'{sum(before.values()):8.0f} ->' if before else ''}{sum(folders.values()):8.0f} CPU s\n")
    files: defaultdict[str, float] = defaultdict(float)
    for name, record in records.items():
        files[name.split("::")[0]] += record["own_s"] + record["children_s"]
    for kind, costs in (("files", files), ("tests", {n: r["own_s"] + r["children_s"] for n, r in records.items()})):
        print(f"the dearest {kind}")
        for name, seconds in sorted(costs.items(), key=lambda pair: -pair[1])[:40]:
            started = dict(records[name]["started"]) if name in records else ""
            print(f"{seconds:8.1f}  {name}  {started or ''}")


if __name__ == "__main__":
    main(sys.argv[1:])
