"""Which of torchvision's classification networks have a spiking form: a table of docs/networks.md.

Each is built with random weights and statistics, converted, and checked layer by layer against
itself. ``python -m benchmarks.networks`` takes about ten minutes; names choose some.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch
import torchvision
from torch import nn

import stdb

PAGE = Path(__file__).parent.parent / "docs" / "networks.md"
START, END = "<!-- torchvision: python -m benchmarks.networks -->\n", "<!-- end of torchvision -->"
SIZE = 64  # of the images; the smallest that all take


@torch.no_grad()
def build(name: str) -> nn.Module:
    """A network of torchvision with random weights, its norms with random statistics."""
    options = {"aux_logits": False, "init_weights": False} if name in WITH_HEADS else {}
    net = torchvision.models.get_model(name, weights=None, **options)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


WITH_HEADS = ("googlenet", "inception_v3")  # auxiliary ones, for training


def row(name: str) -> str:
    """A network's line of the table."""
    torch.manual_seed(0)
    net = build(name)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    size = 96 if name == "inception_v3" else 224 if name.startswith(FIXED) else SIZE
    example = torch.rand(1, 3, size, size)
    try:
        snn = stdb.convert(net, stdb.DirectEncoder(), example=example)
    except stdb.ConversionError as error:
        return f"| {name} | {millions:.1f} | refused: {reasons(str(error))} |"
    return f"| {name} | {millions:.1f} | works: {len(snn.thresholds)} spiking layers |"


FIXED = ("vit_", "swin", "maxvit")  # take one size


REASONS = {  # in a message → in the table
    r" makes \(": "dimensions in another order",
    r"\bis a Linear that": "Linear on what is not flat",
    r"\bis an? ([\w.]+)": "",
    r"\bcalls (\w+)": "",
    r"is a parameter used": "parameters outside a layer",
    r"\) ([\w ]+)[;,]": "",
    r"cannot be traced": "cannot be traced",
}


def reasons(message: str) -> str:
    """What stands in the way, the most frequent first."""
    found: Counter[str] = Counter()
    for line in message.splitlines():
        for pattern, words in REASONS.items():
            if match := re.search(pattern, line):
                found[words or match[1].rpartition(".")[2]] += 1
                break
    return ", ".join(f"{kind} ({count})" for kind, count in found.most_common(4))


def main() -> None:
    """Print the table; with no names given, write it into the page as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks; none: all, into docs/networks.md")
    names = parser.parse_args().names
    table = ["| network | million weights | |", "| --- | --- | --- |"]
    every = torchvision.models.list_models(module=torchvision.models)
    for name in names or every:
        table.append(row(name))
        print(table[-1], flush=True)
    if not names:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        _, _, after = rest.partition(END)
        lines = "\n".join(table) + "\n"
        PAGE.write_text(before + START + "\n" + lines + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
