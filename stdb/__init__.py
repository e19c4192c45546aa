"""Low-latency spiking networks by hybrid conversion and STDB (Rathi et al., ICLR 2020).

ann = stdb.build("vgg16", in_channels=3, image_size=32, num_classes=10)
snn = stdb.convert(ann, encoder=stdb.PoissonEncoder(seed=0), surrogate=stdb.STDB(0.3, 0.01))
stdb.balance_thresholds(snn, images, timesteps=1000)
snn.scale_thresholds(0.7)
logits = snn(images, timesteps=100)  # U_T, (B, classes), differentiable
"""

import os

# Large tensors in large pages: new memory costs a CPU much of a chunk's time otherwise. Torch reads
# it when it makes its first tensor; whoever has set it is left alone.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from .activations import ACTIVATIONS, QCFS, Clip, start_bounds
from .agreement import check_kernels
from .architectures import ARCHITECTURES, ResidualBlock, build, build_network
from .balancing import balance_thresholds, residual_layers
from .calibration import logit_scale, scaled_losses
from .classifier import Classifier
from .configuration import configure
from .conversion import ConversionError, convert
from .decision import Decision, decide, first_confident
from .diagnosis import LayerDiagnosis, diagnose
from .distillation import distillation_loss
from .encoding import ENCODERS, DirectEncoder, PoissonEncoder, SpikeTrain, encoder_of
from .energy import INTEGER_PJ, LayerCost, access_pj, ann_costs, ann_energy, fan_out
from .evaluation import evaluate
from .few_steps import Balance, Plan, settle
from .fronts import release, uncorrected
from .graph import Graph, Node
from .images import (
    DataError,
    Preparation,
    check_image,
    preparation_of,
    printable,
    read_image,
    to_size,
)
from .interop.authors import AuthorsNetwork, import_authors
from .interop.export import export_program
from .interop.from_nir import from_nir
from .interop.nir import to_nir
from .interop.saving import load, save
from .interop.weights import WeightsError, load_weights
from .kernels.densities import EVENTS, instruction_set, multiplies_bfloat16
from .memory import largest_chunk, training_memory
from .network import SpikingNetwork
from .neuron import SpikingNeuron, simulate_neuron
from .normalisation import NORMALISATIONS, Normalisation, normalisation_of
from .presentation import Presentation
from .quantised import quantised_logits
from .randomness import derive, dropout_mask, sample_keys, uniform
from .statistics import SpikeStatistics, record_spikes
from .surrogate import STDB, SURROGATES, Exponential, Linear, Rectangle, Surrogate, surrogate_of
from .traced import Rewrite

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "ENCODERS",
    "EVENTS",
    "INTEGER_PJ",
    "NORMALISATIONS",
    "QCFS",
    "STDB",
    "SURROGATES",
    "AuthorsNetwork",
    "Balance",
    "Classifier",
    "Clip",
    "ConversionError",
    "DataError",
    "Decision",
    "DirectEncoder",
    "Exponential",
    "Graph",
    "LayerCost",
    "LayerDiagnosis",
    "Linear",
    "Node",
    "Normalisation",
    "Plan",
    "PoissonEncoder",
    "Preparation",
    "Presentation",
    "Rectangle",
    "ResidualBlock",
    "Rewrite",
    "SpikeStatistics",
    "SpikeTrain",
    "SpikingNetwork",
    "SpikingNeuron",
    "Surrogate",
    "WeightsError",
    "access_pj",
    "ann_costs",
    "ann_energy",
    "balance_thresholds",
    "build",
    "build_network",
    "check_image",
    "check_kernels",
    "configure",
    "convert",
    "decide",
    "derive",
    "diagnose",
    "distillation_loss",
    "dropout_mask",
    "encoder_of",
    "evaluate",
    "export_program",
    "fan_out",
    "first_confident",
    "from_nir",
    "import_authors",
    "instruction_set",
    "largest_chunk",
    "load",
    "load_weights",
    "logit_scale",
    "multiplies_bfloat16",
    "normalisation_of",
    "preparation_of",
    "printable",
    "quantised_logits",
    "read_image",
    "record_spikes",
    "release",
    "residual_layers",
    "sample_keys",
    "save",
    "scaled_losses",
    "settle",
    "simulate_neuron",
    "start_bounds",
    "surrogate_of",
    "to_nir",
    "to_size",
    "training_memory",
    "uncorrected",
    "uniform",
]
