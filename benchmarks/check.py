"""Compare a run of the benchmark with the committed baseline; not part of `make test`.

    python -m benchmarks.bench --output new.json && python -m benchmarks.check new.json

Compared are ratios to padded SimPO, which change little from machine to machine. The exit code is 1 where one of our
steps got slower or larger than the tolerances allow.
"""

import argparse
import json
from pathlib import Path

BASELINE = Path(__file__).parent / "results" / "cpu.json"
BASE = "padded-simpo"
TIME_TOLERANCE = 0.15  # of the median ratio: what a busy machine moves it by
MEMORY_TOLERANCE = 0.02  # of the allocator's peak, which is exact
OURS = ("rmipo", "simpo", "dpo")


def regressions(baseline: dict, new: dict) -> list[str]:
    """One line for each ratio that got worse; ValueError if the runs share no case."""
    shared = baseline["cases"].keys() & new["cases"].keys()
    if not shared:
        raise ValueError(f"no case in common: {sorted(baseline['cases'])} and {sorted(new['cases'])}")
    found = []
    for case in sorted(shared):
        old, current = (run["cases"][case]["contenders"] for run in (baseline, new))
        for name in (name for name in OURS if name in old and name in current):
            before, now = (entries[name]["ratios"][BASE] for entries in (old, current))
            pairs = [("time", before["time"]["median"], now["time"]["median"], TIME_TOLERANCE)]
            if "memory" in before and "memory" in now:
                pairs.append(("memory", before["memory"], now["memory"], MEMORY_TOLERANCE))
            for what, was, is_, tolerance in pairs:
                if is_ > was * (1 + tolerance):
                    found.append(
                        f"{case}: {what} of {name} / {BASE}: {is_:.3f}, was {was:.3f} (+{tolerance:.0%} allowed)"
                    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="JSON of benchmarks/bench.py")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    options = parser.parse_args()
    baseline, new = (json.loads(path.read_text()) for path in (options.baseline, options.run))
    for part in ("cpu", "packages"):
        if baseline["environment"][part] != new["environment"][part]:
            print(f"{part}: {new['environment'][part]}, baseline {baseline['environment'][part]}")
    found = regressions(baseline, new)
    print("\n".join(found) or "no regression")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
