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

from .architectures import ARCHITECTURES, ResidualBlock, build
from .authors import AuthorsNetwork, import_authors
from .balancing import balance_thresholds
from .conversion import ConversionError, convert
from .decision import Decision, decide
from .diagnosis import LayerDiagnosis, diagnose
from .encoding import ENCODERS, DirectEncoder, PoissonEncoder, SpikeTrain
from .interop import export_program, to_nir
from .memory import largest_chunk, training_memory
from .network import Presentation, SpikingNetwork
from .neuron import SpikingNeuron
from .saving import build_network, load, save
from .statistics import SpikeStatistics, fan_out, record_spikes
from .surrogate import STDB, SURROGATES, Exponential, Linear, Surrogate

__all__ = [
    "ARCHITECTURES",
    "ENCODERS",
    "STDB",
    "SURROGATES",
    "AuthorsNetwork",
    "ConversionError",
    "Decision",
    "DirectEncoder",
    "Exponential",
    "LayerDiagnosis",
    "Linear",
    "PoissonEncoder",
    "Presentation",
    "ResidualBlock",
    "SpikeStatistics",
    "SpikeTrain",
    "SpikingNetwork",
    "SpikingNeuron",
    "Surrogate",
    "balance_thresholds",
    "build",
    "build_network",
    "convert",
    "decide",
    "diagnose",
    "export_program",
    "fan_out",
    "import_authors",
    "largest_chunk",
    "load",
    "record_spikes",
    "save",
    "to_nir",
    "training_memory",
]
