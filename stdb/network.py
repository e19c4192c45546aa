"""The spiking network: an ANN's module tree with spiking neurons in the place of its ReLUs.

It presents images for T steps (:mod:`stdb.presentation`), and holds thresholds and leaks. All that
crosses time is in a presentation; nothing is left on the modules.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backward import Steps
from .encoding import Encoder, check_images, check_timesteps, limits_of, parameters_of
from .graph import Graph
from .kernels.densities import density_limit
from .neuron import SpikingNeuron, make_room
from .operators import Value
from .operators.shaping import Flatten
from .operators.table import dimensions_of
from .presentation import Presentation, default_chunk
from .randomness import sample_keys
from .rewriting import check_module
from .traced import Rewrite
from .units import change_unit
from .weights import bias_of, inner_copies, scale_bias, scale_weight, weight_count

Observer = Callable[[Presentation, str, Value], None]

REALS = (torch.float32, torch.float64)  # types that the kernels know
PRECISIONS = (None, torch.bfloat16, *REALS)  # of products
SMALLEST_THRESHOLD, SMALLEST_LEAK = 0.01, 0.01  # of what is learned


class SpikingNetwork(nn.Module):
    """An ANN's module tree with spiking neurons in the place of its ReLUs; see ``stdb.convert``.

    Attributes:
        net: the module tree; weights have the names that they had in the ANN.
        graph: the nodes in the order of a step.
        encoder: gives the input of each step.
        chunk: time steps that are computed at once; None chooses by batch size. It changes memory
            and time; of results no more than rounding.
        dropout_seed: chooses the dropout masks of training.
        precision: what dense convolutions and matrix products are made in, ``torch.bfloat16`` say,
            with membranes and sums in the type of the weights; None: in that type as well.
        events: whose measured densities say where a product takes events, such as ``avx2``, or
            ``always``, ``never``; None: this CPU's. See :mod:`stdb.kernels.densities`.
        limits: of the encoder that it was converted with, which the first weights hold.
        has_units: whether weights hold what a spike stands for, as biases need; :mod:`stdb.units`.
        untouched: weights by name before a calibration put units into them: where the next starts.
        output_correction: (classes,) what a calibration has added to the output's bias.
        rewrites: what became of each operation of the ANN; of a network from a file none.
        observers: called with (presentation, layer, its value over the chunk) for every chunk; see
            ``record_spikes``.
    """

    output_correction: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        graph: Graph,
        encoder: Encoder,
        chunk: int | None = None,
        dropout_seed: int = 0,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; allowed: 1 or more time steps, or None")
        self.net = net
        self.graph = graph
        self.encoder = encoder
        self.chunk = chunk
        self.dropout_seed = dropout_seed
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision is {precision}; allowed: {', '.join(map(str, PRECISIONS))}"
            )
        self.precision = precision
        self.events: str | None = None
        self.limits = limits_of(encoder)
        self.observers: list[Observer] = []
        self.rewrites: tuple[Rewrite, ...] = ()
        self.untouched: dict[str, Tensor] = {}
        self.register_buffer("output_correction", None)
        modules = (self.module(i) for i, n in enumerate(graph.nodes) if n.operator.learns)
        self.has_units = any(bias_of(module) is not None for module in modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpikingNetwork":
        """A copy, also where weights are computed, which modules' own deepcopy refuses."""
        memo |= inner_copies(self)
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *more: Any) -> None:
        make_room(self, state, prefix, ("output_correction",))
        super()._load_from_state_dict(state, prefix, *more)

    # -- presenting ----------------------------------------------------------------------------

    def present(
        self,
        images: Tensor,
        *,
        sample_ids: Tensor | None = None,
        epoch: int = 0,
        masks: Sequence[Tensor] | None = None,
        chunk: int | None = None,
    ) -> Presentation:
        """Start a presentation at t = 0, every membrane at 0.

        Args:
            images: (B, C, H, W), (B, C, L) or (B, n); in [−1, 1], or within the limits of the
                encoder, where they are encoded as spikes.
            sample_ids: (B,) int64, which random stream each image draws from; 0 … B−1 by default.
            epoch: another epoch draws other spikes and masks.
            masks: one (B, …) mask for each dropout, in order, already scaled, in the place of
                drawn ones.
            chunk: time steps that are computed at once; the network's by default.

        Raises:
            ValueError: pixels out of range, a threshold that is not a positive number.
        """
        self.check()
        check_images(images, self.encoder, self.dimensions())
        if limits_of(self.encoder) != self.limits:
            raise ValueError(
                f"the encoder has the limits {limits_of(self.encoder)}, and the first weights hold "
                f"{self.limits}; allowed: a network converted with the encoder"
            )
        if sample_ids is None:
            sample_ids = torch.arange(len(images), device=images.device)
        if sample_ids.shape != images.shape[:1]:
            raise ValueError(
                f"sample_ids are {tuple(sample_ids.shape)} for {len(images)} images; "
                "allowed: one for each"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; allowed: 1 or more time steps, or None")
        chunk = chunk or self.chunk or default_chunk(len(images), images.shape[1:], images.device)
        return Presentation(self, images, sample_keys(sample_ids, epoch), chunk, masks)

    def forward(
        self,
        images: Tensor | Presentation,
        timesteps: int,
        *,
        sample_ids: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """Present images, or go on with a presentation, for ``timesteps`` steps.

        Returns:
            U_T of the output layer (Eq. 4), (B, classes), differentiable with respect to the
            weights, and to images that require it, over these steps. Through the input this is
            Σ_t ∂L/∂I_t for a direct input, the same straight through (∂spike/∂pixel = 1, the
            derivative of the spike's expectation) for Poisson spikes, and through an encoder of
            your own by autograd. The steps of earlier calls are constants, so that
            ``for n in windows: loss(snn(presentation, n)).backward()`` is the truncated BPTT of
            §2.2.
        """
        check_timesteps(timesteps)
        if isinstance(images, Presentation):
            if sample_ids is not None or epoch != 0:
                raise ValueError(
                    "a presentation has its sample_ids and epoch: give them to present()"
                )
            presentation = images
        else:
            presentation = self.present(images, sample_ids=sample_ids, epoch=epoch)
        pixels = presentation.images
        parameters = self._learned(presentation) if torch.is_grad_enabled() else []
        if parameters or (torch.is_grad_enabled() and pixels.requires_grad):
            counts = Steps.apply(presentation, timesteps, pixels, *parameters)
        else:
            counts = presentation.advance(timesteps)
        return presentation.integrate(counts, timesteps)

    @torch.no_grad()
    def logits_over_time(
        self, images: Tensor | Presentation, timesteps: int, **options: Any
    ) -> Tensor:
        """U_t of the output layer after every step at once: (T, B, classes).

        The output only accumulates, so one presentation gives the accuracy at every t. In training
        mode dropout is active: call ``eval()`` first.

        Args:
            images: as for :meth:`present`, or a presentation to go on with.
            timesteps: T.
            options: those of :meth:`present`, for images.
        """
        check_timesteps(timesteps)
        if isinstance(images, Presentation):
            if options:
                raise ValueError(f"a presentation has its {', '.join(options)}: see present()")
            presentation = images
        else:
            presentation = self.present(images, **options)
        logits: list[Tensor] = []
        while len(logits) < timesteps:
            steps = min(presentation.chunk, timesteps - len(logits))
            trains: list[list[Tensor]] = [[] for _ in self.graph.entries]
            presentation.advance(steps, trains=trains)
            for t in range(steps):
                inputs = [train[0][t % len(train[0])] for train in trains]
                logits.append(presentation.integrate(inputs, 1))
        return torch.stack(logits)

    @torch.no_grad()
    def shapes(self, image_shape: Sequence[int]) -> list[torch.Size]:
        """(C, H, W), (C, L) or (n,) of every node's value, for images of such a shape."""
        values = [next(self.net.parameters()).new_zeros(1, *image_shape)]
        for i, node in enumerate(self.graph.nodes[1:], start=1):
            below = [values[j] for j in node.inputs]
            values.append(node.operator.plain(self.module(i), *below))
        return [value.shape[1:] for value in values]

    def dimensions(self) -> int | None:
        """How many dimensions a batch has, by the first layers; None where they take any."""
        same = {0}
        for i, node in enumerate(self.graph.nodes):
            if same.intersection(node.inputs):
                wanted = dimensions_of(self.module(i))
                if wanted is not None:
                    return wanted
                if not isinstance(node.operator, Flatten):
                    same.add(i)
        return None

    def module(self, i: int) -> Any:
        """The module at a node; None where its operator has none."""
        path = self.graph.nodes[i].path
        return None if path is None else self.net.get_submodule(path)

    def check(self, *, values: bool = False) -> None:
        """Refuse what became of the layers since the conversion and cannot be computed.

        Args:
            values: look at all weights, whether they are numbers.

        Raises:
            ValueError: names a layer that was replaced by one of another kind, has a bias, pads
                otherwise, or has weights of a type that has no kernels, or NaN.
        """
        dtype = None
        for i, node in enumerate(self.graph.nodes):
            if node.path is None:
                continue
            module = self.module(i)
            if not node.operator.fires:
                check_module(node.path, module, node.operator)
            elif not isinstance(module, SpikingNeuron):
                raise ValueError(
                    f"{node.path} is a {type(module).__name__}; allowed in its place: SpikingNeuron"
                )
            for name, parameter in module.named_parameters():
                if parameter.dtype not in REALS:
                    raise ValueError(
                        f"{node.path}.{name} is {parameter.dtype}; allowed: torch.float32, "
                        "torch.float64 (products in bfloat16: precision=torch.bfloat16)"
                    )
                dtype = dtype or parameter.dtype
                if parameter.dtype != dtype:
                    raise ValueError(
                        f"{node.path}.{name} is {parameter.dtype} and the layers before it are "
                        f"{dtype}; allowed: one type for all, net.to({dtype})"
                    )
                if values and not parameter.isfinite().all():
                    raise ValueError(
                        f"{node.path}.{name} holds NaN or infinity; allowed: finite numbers"
                    )

    def density_limits(self) -> list[float]:
        """By node, the density below which its product takes events, or those that read it do."""
        limits = []
        for i, node in enumerate(self.graph.nodes):
            kind = node.operator.product
            weights = weight_count(self.module(i)) if kind else 0
            limits.append(density_limit(kind, weights, self.precision, self.events))
        return self.graph.largest_above(limits)

    def _learned(self, presentation: Presentation) -> list[Tensor]:
        """What has a gradient, each once: what the encoder learns; the body's weights, V and λ."""
        presentation.take_weights()
        found: dict[Tensor, None] = dict.fromkeys(parameters_of(self.encoder))
        for i in self.graph.body:
            site, operator = presentation.sites[i], self.graph.nodes[i].operator
            if operator.learns:
                found[site.weight] = None
                if site.bias is not None:
                    found[site.bias] = None
            elif operator.fires:
                found |= dict.fromkeys(site.module.parameters())
        return [tensor for tensor in found if tensor.requires_grad]

    # -- neurons -------------------------------------------------------------------------------

    @property
    def neurons(self) -> dict[str, SpikingNeuron]:
        """The spiking layers, in order, by the name of the weights that drive them."""
        neurons = {}
        for i, label in self.graph.labels.items():
            neuron = self.module(i)
            assert isinstance(neuron, SpikingNeuron)
            neurons[label] = neuron
        return neurons

    @property
    def thresholds(self) -> dict[str, float]:
        """V of every spiking layer."""
        return {name: neuron.threshold.item() for name, neuron in self.neurons.items()}

    def set_thresholds(
        self, thresholds: dict[str, float], balanced: Iterable[str] | None = None
    ) -> None:
        """Set V of every spiking layer.

        Args:
            thresholds: layer name → V, for exactly the layers of this network.
            balanced: the layers whose V came out of Algorithm 1, which scaling refers to; all by
                default.

        Raises:
            ValueError: the names are another network's, or a V is not a positive number.
        """
        neurons = self.neurons
        if set(thresholds) != set(neurons):
            missing, unknown = set(neurons) - set(thresholds), set(thresholds) - set(neurons)
            raise ValueError(
                "these thresholds belong to another network: "
                f"missing {sorted(missing) or 'none'}, unknown {sorted(unknown) or 'none'}; "
                f"this network's layers are {', '.join(neurons)}"
            )
        for name, value in thresholds.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"the threshold of {name} is {value}; allowed: a positive number")
        chosen = set(neurons) if balanced is None else set(balanced)
        with torch.no_grad():
            for i, (name, neuron) in zip(self.graph.neurons, neurons.items(), strict=True):
                self._set_threshold(i, neuron, thresholds[name])
                found = thresholds[name] if name in chosen else float("nan")
                neuron.balanced_threshold.fill_(found)

    def _set_threshold(self, i: int, neuron: SpikingNeuron, value: float) -> None:
        """V of a layer, and with it what its spikes stand for, where weights hold that."""
        neuron.threshold.fill_(value)
        if self.has_units and value != neuron.unit:
            ratio = torch.tensor([value / neuron.unit], dtype=torch.float64)
            change_unit(self.graph, self.net, i, ratio)
            neuron.unit = value

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring learned V and λ back to where they have a meaning; after an optimiser's step.

        V stays at ``SMALLEST_THRESHOLD`` of its balanced value or above, λ within (0, 1]. The next
        presentation does it where V is not positive or λ not in (0, 1], so that no loop has to.
        """
        for neuron in self.neurons.values():
            if neuron.threshold.requires_grad:
                balanced = neuron.balanced_threshold.nan_to_num(nan=1.0)
                neuron.threshold.clamp_(min=SMALLEST_THRESHOLD * balanced)
            if neuron.leak.requires_grad:
                neuron.leak.clamp_(SMALLEST_LEAK, 1.0)

    @torch.no_grad()
    def scale_thresholds(self, factor: float) -> None:
        """V ← factor · V_balanced, for fewer time steps. Never cumulative.

        Layers that were not balanced, as in a ResNet's basic blocks, keep their V.
        """
        if not 0 < factor < float("inf"):
            raise ValueError(f"the threshold scale is {factor}; allowed: a positive number")
        for i, neuron in zip(self.graph.neurons, self.neurons.values(), strict=True):
            if not neuron.balanced_threshold.isnan():
                self._set_threshold(i, neuron, (neuron.balanced_threshold * factor).item())

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply the output layer's weights, and so every U_t of Eq. 4; no decision changes.

        U_T grows with T, far beyond what an ANN's logits are: softmax(U_T) is then surer than it is
        right, and what lowers its cross-entropy most is to spike less. See :func:`logit_scale`.
        """
        if not 0 < factor < float("inf"):
            raise ValueError(f"the logit scale is {factor}; allowed: a positive number")
        scaled = self.graph.output_layers()
        if self.output_correction is not None:
            self.output_correction = self.output_correction * factor
        for name in scaled:
            scale_weight(self.net.get_submodule(name), factor)
            scale_bias(self.net.get_submodule(name), factor)
