"""A network as a graph: nodes in the order of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

from .operators import Operator

INPUT = "input"  # name of the first node
OF_UNIT = "_unit"  # how names end of diagonals that bring a shortcut to its sum's unit
IN_FRONT = "_in_front"  # how names end of diagonals that calibration puts in front of a layer


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name: that of its module, or one of its own.
        operator: what it does.
        inputs: the nodes whose values it takes.
        path: of its module in the module tree; None where it has none.
    """

    name: str
    operator: Operator
    inputs: tuple[int, ...] = ()
    path: str | None = None


class Graph:
    """The nodes in the order of a step, and what follows from it.

    The *body* reaches up to the last neurons; the *tail* is the output layer: operators that no
    neuron follows. They are linear and the output only accumulates (Eq. 4), so the tail is applied
    once, to the summed values of its ``entries``.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        count = len(self.nodes)
        self.neurons = [i for i, node in enumerate(self.nodes) if node.operator.fires]
        before_neuron = [False] * count
        for i in reversed(range(count)):
            if self.nodes[i].operator.fires or before_neuron[i]:
                before_neuron[i] = True
                for j in self.nodes[i].inputs:
                    before_neuron[j] = True
        self.body = [i for i in range(count) if before_neuron[i]]
        self.tail = [i for i in range(count) if not before_neuron[i]]
        in_body = set(self.body)
        self.entries = sorted({j for i in self.tail for j in self.nodes[i].inputs} & in_body)
        self.consumers = [0] * count  # within the body, an entry counting as one more
        self.last_use = list(range(count))
        for i in self.body:
            for j in self.nodes[i].inputs:
                self.consumers[j] += 1
                self.last_use[j] = i
        for i in self.entries:
            self.consumers[i] += 1
        # whether anything has weights at or below the node, so that a gradient may have to reach it
        self.reaches_weights = [False] * count
        for i, node in enumerate(self.nodes):
            learns = node.operator.fires or node.operator.learns
            self.reaches_weights[i] = learns or any(self.reaches_weights[j] for j in node.inputs)

        # whether linear operators alone make its value of the input, at every step by itself
        self.of_input: list[bool] = []
        for node in self.nodes:
            by_step = not (node.operator.fires or node.operator.accumulates)
            self.of_input.append(by_step and all(self.of_input[j] for j in node.inputs))

    def shared(self, i: int) -> bool:
        """Whether someone else reads the memory of a node's value, so that none may write to it."""
        return not self.nodes[i].operator.owns or self.consumers[i] > 1

    def largest_above(self, numbers: Sequence[float]) -> list[float]:
        """By node, the largest number of those that read its spikes, its own included."""
        largest = list(numbers)
        for i in reversed(range(len(self.nodes))):
            if not self.nodes[i].operator.fires:
                for j in self.nodes[i].inputs:
                    largest[j] = max(largest[j], largest[i])
        return largest

    def label(self, neuron: int) -> str:
        """A spiking layer goes by the name of the weights that drive it, such as ``conv1``."""
        node = self.nodes[neuron]
        while node.inputs:
            node = self.nodes[node.inputs[0]]
            if node.operator.learns and not node.name.endswith(IN_FRONT):
                return node.name
            if node.operator.fires:
                break
        return self.nodes[neuron].name

    def output_layers(self) -> set[str]:
        """The layers with weights whose sum is the output, by name.

        Raises:
            ValueError: something reaches the output without weights.
        """
        found, waiting = set(), [self.tail[-1]]
        while waiting:
            node = self.nodes[waiting.pop()]
            if node.operator.learns:
                found.add(node.name)
            elif node.operator.fires or not node.inputs:
                raise ValueError("a branch reaches the output without weights; nothing to scale")
            else:
                waiting += node.inputs
        return found

    @property
    def labels(self) -> dict[int, str]:
        """The label of every neuron node, in order."""
        labels = {i: self.label(i) for i in self.neurons}
        unique = len({INPUT, *labels.values()}) == 1 + len(labels)
        return labels if unique else {i: self.nodes[i].name for i in self.neurons}
