"""Are a device's kernels right? Each against plain torch, on random chunks."""

import itertools
from typing import Any

import torch
from torch import Tensor

from .kernels import Layer, PooledGradient, backend, gpu, reference
from .kernels.layout import to_layout, to_matrix
from .surrogate import SURROGATES

FORMS = ("plain", "bias", "constant", "bfloat16", "pooled", "masked")


def check_kernels(device: torch.device | str = "cuda", shapes: int = 12) -> dict[str, Any]:
    """Compare a device's kernels with plain torch on a CPU: every surrogate, in every form.

    Spikes and their times have to be equal, gradients to rounding: 10⁻⁴ of the largest, or 10⁻² in
    bfloat16. Forms are a current for every step or one for all, float32 or bfloat16, with biases;
    gradients as they are, below an average pooling, below a dropout.

    Args:
        device: such as ``cuda:1``, or ``cpu``.
        shapes: how many shapes of chunks, drawn with a fixed seed.

    Returns:
        The number of shapes, the forms, and the largest difference.

    Raises:
        RuntimeError: something differs, or the kernels do not run on this GPU.
    """
    device = torch.device(device)
    if device.type == "cuda" and not gpu.available(device):
        raise RuntimeError("the kernels do not run here; the warning above says why")
    generator = torch.Generator().manual_seed(0)
    surrogates = [
        kind(over_threshold=over) for kind in SURROGATES.values() for over in (False, True)
    ]
    worst = 0.0
    for k in range(shapes):
        for surrogate, form in itertools.product(surrogates, FORMS):
            shape = (1 + k % 9, 1 + k % 4, (3, 8, 64)[k % 3], 2 * (1 + k % 5), 2 * (1 + k % 5))
            case = random_case(shape, form, generator)
            ours, theirs = (
                one_layer(kind, surrogate, form, case, on)
                for kind, on in ((backend(device), device), (reference, torch.device("cpu")))
            )
            for name, value in theirs.items():
                if value.dtype in (torch.uint8, torch.int16) and not torch.equal(ours[name], value):
                    raise RuntimeError(f"{name} of {surrogate}, {form}, at {shape} differ")
                scale = max(1.0, float(value.abs().max()))
                off = float((ours[name].float() - value.float()).abs().max()) / scale
                if off > (1e-2 if form == "bfloat16" else 1e-4):
                    raise RuntimeError(f"{name} of {surrogate}, {form}, at {shape}: {off:g} off")
                worst = max(worst, off)
    return {"shapes": shapes, "forms": [*FORMS], "largest difference": worst}


def random_case(shape: tuple[int, ...], form: str, generator: torch.Generator) -> dict[str, Any]:
    """Current, membranes, bias, gradient and mask of a chunk (T, B, C, H, W), as they lie there.

    Multiples of 1/8, so that sums are exact, ties with V included.
    """

    def grid(*size: int) -> Tensor:
        return torch.randint(-16, 17, size, generator=generator) / 8

    steps, batch, channels, height, width = shape
    current = grid(*shape) if form != "constant" else grid(1, *shape[1:])
    above = (
        grid(steps, batch, channels, height // 2, width // 2) if form == "pooled" else grid(*shape)
    )
    mask = (grid(*shape[1:]) > 0).float() * 2
    return {
        "shape": shape,
        "current": to_matrix(to_layout(current)),
        # one of each neuron, or one of all
        "before": grid(1) if form == "constant" else grid(current[0].numel()),
        "bias": grid(channels) if form in ("constant", "bias", "bfloat16") else None,
        "above": to_layout(above),
        "mask": to_layout(mask[None])[0],
    }


def one_layer(
    kind: Any, surrogate: Any, form: str, case: dict[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """A chunk forward and backward by one backend; what came of it, on the CPU."""
    case = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.items()}
    steps, half = case["shape"][0], torch.bfloat16 if form == "bfloat16" else None
    current = case["current"] if half is None else case["current"].to(half)
    before = case["before"].expand(current.shape[1])
    u = torch.empty_like(current[0], dtype=before.dtype)
    times = torch.zeros_like(u, dtype=torch.int16)
    noted = times.clone()
    packed = kind.fire(
        current, u, 0.5, 0.5, last_spike=noted, bias=case["bias"], steps=steps, before=before
    )
    above: Any = case["above"].clone() if half is None else case["above"].to(half)
    if form in ("pooled", "masked"):
        above = PooledGradient(above, 2 if form == "pooled" else 1, case["mask"])
    layer = Layer(
        packed, surrogate, 0.5, torch.float32, 0.5, last_spike=times, current=current,
        bias=case["bias"], before=before, learns_threshold=True, learns_leak=True,
        channels=case["shape"][2], carries=True, lowered=half,
    )  # fmt: skip
    found = kind.backpropagate(above, layer)
    values = {
        "spikes": packed, "membranes": u, "spike times": noted, "gradients": found.current,
        "carry": found.carry, "of V": found.threshold, "of leak": found.leak,
        "of biases": found.channels,
    }  # fmt: skip
    return {name: torch.as_tensor(value).cpu() for name, value in values.items()}
