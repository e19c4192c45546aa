"""The pipeline over several seeds, each a DVC experiment, and the mean of what comes out.

    python -m pipeline.seeds 3     # make seeds N=3: seeds 0, 1, 2 of data, ANN, calibration, STDB

Each runs in a copy of the workspace, which stays as it is; what a seed has in common with an
earlier run comes from DVC's cache. The experiments are seed-0, seed-1, …: see `dvc exp show`.
"""

import subprocess
import sys
from collections.abc import Sequence
from statistics import mean, stdev

from pipeline.command import command, parser
from pipeline.errors import ParamsError

MOST = 1000  # seeds
SECTIONS = ("data", "train_ann", "balance_thresholds", "stdb")  # that have a seed


@command
def main(arguments: Sequence[str]) -> int:
    """Run, print the table; the exit status of dvc where it fails."""
    line = parser(__doc__, "seeds")
    line.add_argument("count", nargs="?", default="3", metavar="N")
    count = count_of(line.parse_args(arguments).count)
    names = []
    for seed in range(count):
        name = f"seed-{seed}"
        changes = [part for s in SECTIONS for part in ("-S", f"{s}.seed={seed}")]
        print(f"[seeds] {name}, {seed + 1} of {count}", flush=True)
        command = ["dvc", "exp", "run", "--temp", "--name", name, *changes]
        subprocess.run(["dvc", "exp", "remove", name], capture_output=True)  # of an earlier time
        status = subprocess.run(command).returncode
        if status != 0:
            print(f"error: {name} failed; `{' '.join(command)}` runs it alone", file=sys.stderr)
            return status
        names.append(name)
    print(table({name: columns(name) for name in names}))
    return 0


def count_of(text: str) -> int:
    """The number of seeds that is asked for."""
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MOST or len(text) > 9:
        raise ParamsError(f"N is {text}; allowed: 1 to {MOST} seeds")
    return int(text)


def columns(experiment: str) -> dict[str, float]:
    """Test accuracies of an experiment, in %: Table 1's columns."""
    import dvc.api

    summary = dvc.api.metrics_show("metrics/summary.json", rev=experiment)
    return {name: 100 * value for name, value in summary["accuracy"].items()}


def table(accuracies: dict[str, dict[str, float]]) -> str:
    """Markdown: a row an experiment, then mean ± standard deviation of every column."""
    head = list(next(iter(accuracies.values())))
    rows = [[name, *(f"{row[key]:.2f}" for key in head)] for name, row in accuracies.items()]
    last = ["mean ± sd"]
    for key in head:
        values = [row[key] for row in accuracies.values()]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        last.append(f"{mean(values):.2f}{spread}")
    lines = [["", *head], ["---", *["---:"] * len(head)], *rows, last]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
