"""Events or dense: the density of spikes below which a product of events is the faster one.

It depends on the CPU's instructions, the precision of dense products, the kind of layer and its
size. ``python -m stdb.tune`` measures it, and densities.json beside this file keeps what was found;
nothing is timed in passing, so that a computation is the same every time.
"""

import functools
import json
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("densities.json")
SIZES = {"small": 1 << 15, "medium": 1 << 19, "large": 1 << 62}  # weights of a layer, below
# what a CPU has, the best first, and how LLVM calls it
INSTRUCTIONS = {
    "amx": "amx-bf16",
    "avx512_bf16": "avx512bf16",
    "avx512": "avx512f",
    "avx2": "avx2",
    "other": "",
}
BFLOAT16 = ("amx", "avx512_bf16")  # those that multiply it in hardware
FORCED = {"always": 2.0, "never": 0.0}
EVENTS = (*INSTRUCTIONS, *FORCED)  # what a network's ``events`` may be, beside None


@functools.cache
def instruction_set() -> str:
    """The best of ``INSTRUCTIONS`` that this CPU has, such as ``avx512_bf16``."""
    from llvmlite import binding

    has = binding.get_host_cpu_features()
    return next(name for name, feature in INSTRUCTIONS.items() if not feature or has.get(feature))


def multiplies_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether a device has products of bfloat16 in hardware, which are faster there."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return instruction_set() in BFLOAT16


def density_limit(
    kind: str, weights: int, precision: torch.dtype | None = None, events: str | None = None
) -> float:
    """Below this share of values that are not zero, events are the faster form of a product.

    Args:
        kind: ``convolution`` or ``linear``; empty: no product, and so 0.
        weights: how many the layer has.
        precision: of dense products; None: the type of the weights.
        events: whose densities are taken, of ``INSTRUCTIONS``; one that nobody has measured has
            those of the next lower one. ``always`` or ``never``: at any density. None: this CPU's.

    Raises:
        ValueError: ``events`` is none of them.
    """
    events = events or instruction_set()
    if events not in EVENTS:
        raise ValueError(
            f"events is {events}; allowed: {', '.join(EVENTS)}, or None for this CPU's"
        )
    if not kind:
        return 0.0
    if events in FORCED:
        return FORCED[events]
    lowered = "bfloat16" if precision == torch.bfloat16 else "float32"
    size = next(name for name, below in SIZES.items() if weights < below)
    return _measured(events)[lowered][kind][size]


@functools.cache
def _measured(instructions: str) -> dict[str, dict[str, dict[str, float]]]:
    """Precision → kind → size → density; of the next lower instructions that were measured."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    names = list(INSTRUCTIONS)
    place = names.index(instructions)
    name = next(n for n in names[place:] + names[place::-1] if n in table)
    densities: dict[str, dict[str, dict[str, float]]] = table[name]["densities"]
    return densities
