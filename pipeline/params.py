"""params.yaml as typed, frozen models: each parameter once, checked before anything starts."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.data_params import DataParams
from pipeline.errors import ParamsError
from pipeline.network_params import NetworkParams
from pipeline.typed import (
    MOST_STEPS,
    BatchSize,
    Count,
    NonNegative,
    Positive,
    Rate,
    Section,
    Seed,
    Share,
    Steps,
    load,
    one_of,
)
from stdb import ENCODERS, EVENTS, SURROGATES

__all__ = ["DataParams", "NetworkParams", "Params", "ParamsError", "load_params"]

PARAMS_FILE = Path("params.yaml")

MOST_EPOCHS = 100_000

Epochs = Annotated[int, Field(ge=1, le=MOST_EPOCHS)]
Precision = Literal["auto", "float32", "tf32", "bf16"]
Workers = Annotated[int, Field(ge=1, le=10_000)]
Range = Annotated[list[Workers], Field(min_length=2, max_length=2)]


class Training(Section):
    """What both trainings have in common."""

    epochs: Epochs | list[Epochs]
    """How often the training images are seen, 1 to 100,000."""
    batch_size: BatchSize
    """Images per optimiser step, over all workers together."""
    learning_rate: Positive
    """Learning rate of the first epoch, above 0; the largest one of other schedules."""
    weight_decay: NonNegative
    """L2 coefficient, 0 or more."""
    schedule: Literal["milestones", "onecycle", "cosine"] = "milestones"
    """How the learning rate goes on: divided at milestones, the paper's way; up and down along
    cosines, ``onecycle``; or down to 0 along a cosine, behind a rise over a twentieth of the steps.
    With one of the latter two, train_ann leaves batch norms out of the weight decay."""
    milestones: Annotated[list[Share], Field(max_length=1000)]
    """Fractions of the epochs after which the learning rate is divided."""
    decay: Annotated[float, Field(gt=1, le=1e6, allow_inf_nan=False)]
    """Divisor of the learning rate at each milestone, above 1."""
    augment: bool | Literal["trivial"]
    """Random crops (padding 4) and horizontal flips, by (seed, epoch, sample); ``trivial``: behind
    them one operation of TrivialAugment, too, against overfitting in long trainings."""
    seed: Seed
    """Seed of initial weights, order of the images, dropout, augmentation, spikes."""


class Schedule(Training):
    """What one training from its start to its end is told."""

    epochs: Epochs
    """How often the training images are seen, 1 to 100,000."""


class TrainAnnParams(Schedule):
    """ANN training: SGD (paper §4)."""

    weights: str | None
    """A weights file that stands in for the training. Of a ``torchvision:`` network with another
    number of classes it is where the training begins, with an output layer of its own."""
    precision: Precision
    """Precision of products; TF32 is a GPU's. auto: bf16 where the job's device has it."""
    momentum: Rate
    """Momentum of SGD, in [0, 1)."""
    nesterov: bool = False
    """Whether the momentum is Nesterov's, which looks ahead."""
    label_smoothing: Rate = 0.0
    """Share of a label that all classes have in equal parts, in [0, 1)."""
    cutout: Annotated[int, Field(ge=0, le=4096)] = 0
    """Side in pixels of a square of every image that is made grey, by (seed, epoch, sample)."""
    compile: bool | Literal["auto"] = "auto"
    """Whether training steps are compiled by torch.compile; auto: on a CPU with a C++ compiler,
    of a long training of a network whose activations have bounds, where it halves the time."""
    norm_images: Annotated[int, Field(ge=2, le=65536)] = 32
    """Number of images, about, that a batch norm takes its statistics of: a batch is divided into
    groups of so many, which go whole to a worker. Nothing to networks without batch norm."""

    @model_validator(mode="after")
    def _looks_ahead_of_something(self) -> "TrainAnnParams":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true with momentum: 0; allowed: false, or a momentum")
        return self


class BalanceThresholdsParams(Section):
    """What a spike stands for: by Algorithm 1, or by the ANN's activations; docs/networks.md."""

    timesteps: Steps
    """Time steps T of Algorithm 1; the other methods, and a correction, take ``stdb.timesteps``."""
    images: Count
    """Number of calibration images, from the training split."""
    batch_size: BatchSize
    """Number of images that are presented at once."""
    method: Literal["auto", "maximum", "percentile", "mse", "learned"] = "auto"
    """What V is: the largest weighted input, a percentile of them, of least error at
    ``stdb.timesteps``, or the activation's bound; auto: mse for networks with biases at λ = 1, else
    one of the first two, as ``percentile`` says."""
    per: Literal["layer", "channel"] | None = None
    """Whether V is one of each layer or channel; None: channel with mse, layer with others."""
    initial_membrane: Rate | None = None
    """U_0/V of every layer, in [0, 1); None: found with mse, ½ with learned, 0 with others."""
    bias_correction: bool | None = None
    """Whether mean rates are brought to the ANN's means; None: with mse and learned. Algorithm 1
    then runs over ``stdb.timesteps``, too."""
    percentile: Annotated[float, Field(gt=0, le=100)]
    """V is this percentile of a layer's weighted inputs; 100, the paper's way, is the maximum."""
    residual_blocks: bool
    """Balance the layers in basic blocks too. A network with biases or batch norm always does."""
    seed: Seed
    """Seed that draws the images and their spikes."""


class EvaluateConvertedParams(Section):
    """The converted network before fine-tuning (Table 1, columns 3 and 4)."""

    timesteps: Steps
    """Time steps T of the long presentation, at the balanced thresholds."""
    scales: Annotated[list[Positive], Field(min_length=1, max_length=1000)]
    """Threshold scales tried at the reduced T; the best on validation is taken."""
    batch_size: BatchSize
    """Number of images that are presented at once."""


class DistilParams(Section):
    """The ANN as a teacher beside the labels; see ``stdb.distillation_loss``."""

    weight: Annotated[float, Field(gt=0, le=1)]
    """Share w of the teacher in the loss, above 0, up to 1; the labels have the rest."""
    temperature: Annotated[float, Field(gt=0, le=1000)]
    """Temperature τ that both networks' logits are divided by, above 0, up to 1000."""


def known_teacher(value: Any) -> Any:
    """A pydantic validator: null, or a mapping with the keys of :class:`DistilParams`."""
    whole = isinstance(value, dict) and set(value) == set(DistilParams.model_fields)
    if not (value is None or whole or isinstance(value, DistilParams)):
        raise PydanticCustomError("distil", "null, or {weight: 0.7, temperature: 2}")
    return value


def known_timesteps(value: Any) -> Any:
    """A pydantic validator: a list of T is one that falls."""
    if isinstance(value, list) and not (
        value
        and all(type(t) is int and 1 <= t <= MOST_STEPS for t in value)
        and all(after < before for before, after in pairwise(value))
    ):
        raise PydanticCustomError(
            "timesteps", f"1 to {MOST_STEPS}, or several, each less than the last: [8, 4, 2, 1]"
        )
    return value


def known_epochs(value: Any) -> Any:
    """A pydantic validator: a list of numbers of epochs."""
    if isinstance(value, list) and not (
        value and all(type(n) is int and 1 <= n <= MOST_EPOCHS for n in value)
    ):
        raise PydanticCustomError("epochs", f"1 to {MOST_EPOCHS}, or such a number for each T")
    return value


class StdbParams(Training):
    """STDB fine-tuning (Algorithms 2 and 3): Adam with amsgrad."""

    epochs: Annotated[Epochs | list[Epochs], BeforeValidator(known_epochs)]
    """How often the training images are seen at each T, 1 to 100,000; [4, 2]: as often at the first
    T and at the second one."""
    timesteps: Annotated[Steps | list[Steps], BeforeValidator(known_timesteps)]
    """Time steps T of the network that is wanted, 1 to 32767; [8, 4, 2, 1]: at one after the other,
    each from the network of the one before it."""
    encoder: Annotated[str, AfterValidator(one_of(ENCODERS))]
    """Name of the encoder, of ``stdb.ENCODERS``: how pixels become input."""
    leak: Annotated[float, Field(gt=0, le=1)]
    """Leak λ of every neuron, in (0, 1]; 1 is the IF neuron."""
    surrogate: Annotated[str, AfterValidator(one_of(SURROGATES))] | Literal["auto"]
    """Name of the surrogate gradient, of ``stdb.SURROGATES``: Eq. 11, 13 or 14, or a rectangle;
    auto: the one for T (``stdb.surrogate_of``), where alpha, beta, over_threshold are null."""
    alpha: Positive | None
    """Factor α of the surrogate gradient, above 0; None: the surrogate's own."""
    beta: NonNegative | None
    """Decay β of the surrogate gradient, 0 or more; None: the surrogate's own."""
    over_threshold: bool | None
    """Whether the spike is taken over U/V instead of U; None: by one that looks at membranes."""
    temporal_gradient: bool
    """Whether the backward pass keeps the leak path ∂U_t/∂U_{t−1} = λ."""
    learn_thresholds: bool
    """Whether V of every layer learns too (DIET-SNN)."""
    learn_leaks: bool
    """Whether λ of every layer learns too (DIET-SNN)."""
    precision: Precision
    """Precision of products; membranes stay float32. auto: float32, on a GPU tf32."""
    events: Annotated[str, AfterValidator(one_of(("auto", *EVENTS)))] = "auto"
    """CPU whose measured densities decide between events and dense products; auto: this one's."""
    from_scratch: bool
    """Whether random weights replace the ANN's: the baseline of Appendix B."""
    truncate: Count | None
    """Time steps t' of a window of truncated BPTT (§2.2); None: all T."""
    images: Count | None
    """Number of training images that it learns from, drawn by seed; None: all."""
    threshold_scale: Positive | None
    """V ← scale · V_balanced; None takes what evaluate_converted found."""
    logit_scale: Positive | Literal["auto"]
    """Factor of the output layer's weights, which changes no decision; 1: the paper's; auto: that
    softmax(U_T) is as sure as it is right on validation, or with distil U_T/T in ANN units."""
    distil: Annotated[DistilParams | None, BeforeValidator(known_teacher)] = None
    """{weight: 0.7, temperature: 2}: the loss is that of U_t/t, and the trained ANN is a teacher
    beside the labels; None: the labels alone, the paper's way."""
    dropout: Rate | None
    """Probability of every dropout layer while fine-tuning, in [0, 1); None: the network's own."""
    clip: Positive | None
    """Largest norm of the gradient, above 0; None: any."""
    micro_batch: Count | None
    """Number of images that a worker presents at once; their gradients add up to the batch's."""
    chunk: Count | None
    """Time steps that are computed at once; changes memory, and rounding. None chooses."""

    @model_validator(mode="after")
    def _auto_chooses_all(self) -> "StdbParams":
        for name in ("alpha", "beta", "over_threshold"):
            if self.surrogate == "auto" and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} is {value} with surrogate: auto; allowed: null")
        return self

    @model_validator(mode="after")
    def _has_a_teacher(self) -> "StdbParams":
        if self.distil is None:
            return self
        if self.from_scratch:
            raise ValueError(
                "distil is given and from_scratch true, which does without the ANN that would be "
                "the teacher; allowed: from_scratch: false, or distil: null"
            )
        if self.logit_scale != "auto":
            raise ValueError(
                f"logit_scale is {self.logit_scale} beside distil, whose loss takes U_t/t in the "
                "ANN's units; allowed: auto, which finds them, or distil: null"
            )
        return self

    @model_validator(mode="after")
    def _falls_from_a_converted_network(self) -> "StdbParams":
        steps = self.timesteps
        if isinstance(self.epochs, list) and len(self.epochs) != len(self.falling):
            raise ValueError(
                f"epochs is {self.epochs} with timesteps: {steps}; allowed: a number, or one for "
                f"each T, {len(self.falling)} of them"
            )
        if not self.progressive:
            return self
        if self.from_scratch:
            raise ValueError(
                f"timesteps is {steps} with from_scratch: true; allowed: one T, or from_scratch: "
                "false, since it is a converted network that T falls from"
            )
        if self.logit_scale != "auto":
            raise ValueError(
                f"logit_scale is {self.logit_scale} with timesteps: {steps}, whose loss takes "
                "U_t/t in the ANN's units; allowed: auto, which finds them, or one T"
            )
        if self.truncate is not None and self.truncate >= self.first_timesteps:
            raise ValueError(
                f"truncate is {self.truncate} with timesteps: {steps}; allowed: null, or less "
                f"than the first of them, {self.first_timesteps}"
            )
        return self

    @property
    def falling(self) -> list[int]:
        """The T that are fine-tuned at, in turn; progressive where they are several."""
        return self.timesteps if isinstance(self.timesteps, list) else [self.timesteps]

    @property
    def progressive(self) -> bool:
        """Whether there are several T."""
        return len(self.falling) > 1

    @property
    def first_timesteps(self) -> int:
        """T that the converted network is scaled for, and that fine-tuning starts at."""
        return self.falling[0]

    @property
    def last_timesteps(self) -> int:
        """T of the network that is wanted."""
        return self.falling[-1]

    @property
    def in_units(self) -> bool:
        """Whether the loss is that of U_t/t, in the ANN's units, so that it is one for all T."""
        return self.distil is not None or self.progressive

    def at_each(self) -> list["StdbAtT"]:
        """The fine-tuning at each T."""
        counts = self.epochs if isinstance(self.epochs, list) else [self.epochs] * len(self.falling)
        return [
            StdbAtT.model_construct(**dict(self) | {"timesteps": steps, "epochs": count})
            for steps, count in zip(self.falling, counts, strict=True)
        ]


class StdbAtT(StdbParams, Schedule):
    """STDB fine-tuning at one T: from a network to another one."""

    epochs: Epochs
    """How often the training images are seen, 1 to 100,000."""
    timesteps: Steps
    """Time steps T, 1 to 32767."""


class ClusterParams(Section):
    """Where the jobs run. Changes no result, so no stage tracks it."""

    workers: Workers | Range | Literal["auto"]
    """Processes of a job, each with its share of every batch; [2, 8]: as many as there are, and on
    a cluster that loses and gains nodes a job goes on with fewer or more."""
    use_gpu: bool | Literal["auto"]
    """One GPU per worker, nccl; or CPU workers, gloo."""
    cpus_per_worker: Workers | Literal["auto"]
    """Number of cores that are reserved for a worker. It has as many threads, or fewer where the
    network is small (``pipeline/jobs/worker.py: WORK_PER_THREAD``)."""
    storage: str
    """Folder or URL of the checkpoints of unfinished stages."""
    checkpoint_steps: Count | None
    """Steps of an epoch after which the state is kept, beside every epoch; None: epochs only."""
    restarts: Annotated[int, Field(ge=0, le=1000)]
    """How often a job goes on from its last checkpoint when a worker or a node is lost."""
    readers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"]
    """Processes of a worker that read image files ahead of need; auto: half of its cores, 1 to 8.
    Data sets in memory need none."""

    @model_validator(mode="after")
    def _range_is_one(self) -> "ClusterParams":
        if isinstance(self.workers, list) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers is {self.workers}; allowed: the smaller number first")
        return self


class Params(Section):
    """All of params.yaml."""

    data: DataParams
    network: NetworkParams
    train_ann: TrainAnnParams
    balance_thresholds: BalanceThresholdsParams
    evaluate_converted: EvaluateConvertedParams
    stdb: StdbParams
    cluster: ClusterParams

    @model_validator(mode="after")
    def _every_worker_has_an_image(self) -> "Params":
        workers = self.cluster.workers
        most = workers[1] if isinstance(workers, list) else workers
        for name, size in (
            ("train_ann", self.train_ann.batch_size), ("stdb", self.stdb.batch_size)
        ):  # fmt: skip
            if most != "auto" and size < most:
                raise ValueError(
                    f"{name}.batch_size is {size} with cluster.workers: {workers}; allowed: at "
                    f"least an image for each worker, {most} or more"
                )
        return self


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: names every offending key, its value, and what is allowed.
    """
    return load(path, Params)
