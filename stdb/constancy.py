"""Values that are the same at every step, computed once for all T.

An encoder that is ``constant`` gives the same input at every step, as the direct one does. So is
then what linear operators make of it, up to neurons, max-poolings and sums with what changes: most
of all the first layer's current.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from .encoding import Encoder, parameters_of
from .graph import Graph
from .operators import Site, Value

State = list[tuple[Tensor | None, int]]  # tensors, and how often each was changed in place


class ConstantValues:
    """The constant values of a presentation, each kept from its first computation on.

    They are computed anew where images, weights or biases have changed since, and where nobody can
    know whether they have (tensors of ``torch.inference_mode``). Whoever reads them must not write
    to them.

    Args:
        graph: of the network.
        encoder: of the network.
        sites: the operators' places, by node.
        images: (B, …), that are presented.

    Attributes:
        nodes: those whose value is constant.
    """

    def __init__(
        self, graph: Graph, encoder: Encoder, sites: Sequence[Site], images: Tensor
    ) -> None:
        constant = bool(getattr(encoder, "constant", False))
        self.nodes = {i for i in graph.body if constant and graph.of_input[i]}
        self._given = [images, *parameters_of(encoder)]
        self._sites = [sites[i] for i in sorted(self.nodes) if graph.nodes[i].operator.learns]
        self._state: State = []
        self._kept: dict[int, Value] = {}

    def value(self, i: int, compute: Callable[[], Value]) -> Value:
        """The value of a node, computed where it is not constant or not known yet."""
        if i not in self.nodes or not self._known():
            return compute()
        if i not in self._kept:
            self._kept[i] = compute()
        return self._kept[i]

    def _known(self) -> bool:
        """Whether it is known what has changed; forgets what did."""
        tensors = [*self._given, *(t for site in self._sites for t in (site.weight, site.bias))]
        if any(t is not None and t.is_inference() for t in tensors):
            return False
        state: State = [(t, -1 if t is None else t._version) for t in tensors]
        if len(state) != len(self._state) or not all(
            now is before and version == old
            for (now, version), (before, old) in zip(state, self._state, strict=True)
        ):
            self._kept.clear()
            self._state = state
        return True
