"""Weights files of our own say what their network is."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import StageError
from pipeline.learning.networks import build_ann, described, load_given
from pipeline.learning.weights import network_of, save_weights
from tests.pipeline.support import NETWORK, make_files


def test_a_file_says_what_its_network_is(tmp_path):
    """One of ours; others' metadata say nothing, whatever they are."""
    path = tmp_path / "ann.safetensors"
    weight = {"weight": torch.ones(2)}
    save_weights(weight, path, network={"activation": "qcfs", "levels": 4})
    assert network_of(path) == {"activation": "qcfs", "levels": 4}
    for config in ("{", "[1]", '{"network": "vgg"}'):
        save_file(weight, path, metadata={"config": config})
        assert network_of(path) == {}
    save_file(weight, path)
    assert network_of(path) == {}


@pytest.mark.parametrize(
    ("activation", "levels", "message"),
    [
        ("qcfs", 8, "trained with levels: 4, and network.levels is 8; allowed: 4"),
        ("clip", None, "trained with activation: qcfs, and network.activation is clip"),
    ],
)
def test_weights_of_another_activation_are_refused(tmp_path, activation, levels, message):
    """They fit the network, and would compute something else in it."""
    own = NETWORK.model_copy(update={"activation": "qcfs", "levels": 4})
    data = make_files(tmp_path)[1]["train"]
    path = tmp_path / "given.safetensors"
    save_weights(build_ann(own, data).state_dict(), path, network=described(own))
    assert load_given(build_ann(own, data), own, path) is None
    other = own.model_copy(update={"activation": activation, "levels": levels})
    with pytest.raises(StageError, match=message):
        load_given(build_ann(other, data), other, path)
