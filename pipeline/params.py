"""params.yaml as typed, frozen models: each parameter once, checked before anything starts."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stdb import ARCHITECTURES

PARAMS_FILE = Path("params.yaml")
SOURCES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder")

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Precision = Literal["float32", "tf32", "bf16"]
Range = Annotated[list[Count], Field(min_length=2, max_length=2)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class ParamsError(ValueError):
    """params.yaml says something that is not allowed."""


class Section(BaseModel):
    """One section: unknown keys, wrong types and impossible values are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class DataParams(Section):
    """Which images, and how they are split."""

    source: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder"]
    """The data set; ``folder`` is any folder or archive of class folders."""
    path: str | None
    """``folder``: the folder or archive. Others: where downloads are kept (data/downloads)."""
    image_size: Count | None
    """Images are resized to this many pixels square; None leaves them."""
    grayscale: bool
    """``folder`` only: read images as one grey channel."""
    stream: bool | Literal["auto"]
    """``folder`` only: images stay in their files and are read as they are needed; auto: where
    they would take more than 4 GiB of memory."""
    train_limit: Count | None
    """Use only this many training images."""
    test_fraction: Share
    """Held out for the test where the source has no test split of its own."""
    validation_fraction: Share
    """Of the training images."""
    seed: Seed
    """Draws the splits."""

    @model_validator(mode="after")
    def _folder_has_path(self) -> "DataParams":
        if self.source == "folder" and self.path is None:
            raise ValueError("path is null; allowed with source: folder: a folder or an archive")
        return self


class NetworkParams(Section):
    """The network; see ``stdb.build``."""

    architecture: str
    """A name of ``stdb.ARCHITECTURES``, or ``module:function`` of your own, called with
    (in_channels, image_size, num_classes)."""
    width: Positive
    """Multiplies the channels of every convolution."""
    hidden: Count
    """Size of a VGG's hidden linear layers."""
    dropout: Rate
    """After convolutions."""
    classifier_dropout: Rate
    """After hidden linear layers."""

    @model_validator(mode="after")
    def _known(self) -> "NetworkParams":
        if self.architecture not in ARCHITECTURES and not re.fullmatch(
            r"[\w.]+:\w+", self.architecture
        ):
            raise ValueError(
                f"architecture is {self.architecture!r}; allowed: {', '.join(ARCHITECTURES)}, "
                "or your_module:function"
            )
        return self


class Schedule(Section):
    """What both trainings have in common."""

    epochs: Count
    """How often the training images are seen."""
    batch_size: Count
    """Images per optimiser step, over all workers together."""
    learning_rate: Positive
    """At the start."""
    weight_decay: NonNegative
    """L2 coefficient."""
    milestones: list[Share]
    """Fractions of the epochs after which the learning rate is divided."""
    decay: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    """What it is divided by."""
    augment: bool
    """Random crops (padding 4) and horizontal flips, by (seed, epoch, sample)."""
    seed: Seed
    """Initial weights, order of the images, dropout, augmentation, spikes."""


class TrainAnnParams(Schedule):
    """ANN training: SGD (paper §4)."""

    weights: str | None
    """A weights file that stands in for the training."""
    precision: Precision
    """Of convolutions and matrix products; TF32 is a GPU's."""
    momentum: Rate
    """Of SGD."""


class BalanceThresholdsParams(Section):
    """Algorithm 1."""

    timesteps: Count
    """T of the calibration."""
    images: Count
    """Calibration images, from the training split."""
    batch_size: Count
    """Images presented at once."""
    percentile: Annotated[float, Field(gt=0, le=100)]
    """V is this percentile of a layer's weighted inputs; 100, the paper's way, is the maximum."""
    residual_blocks: bool
    """Balance the layers in basic blocks too."""
    seed: Seed
    """Draws the images and their spikes."""


class EvaluateConvertedParams(Section):
    """The converted network before fine-tuning (Table 1, columns 3 and 4)."""

    timesteps: Count
    """The long presentation, at the balanced thresholds."""
    scales: Annotated[list[Positive], Field(min_length=1)]
    """Threshold scales tried at the reduced T; the best on validation is taken."""
    batch_size: Count
    """Images presented at once."""


class StdbParams(Schedule):
    """STDB fine-tuning (Algorithms 2 and 3): Adam with amsgrad."""

    timesteps: Annotated[int, Field(ge=1, le=32767)]
    """T."""
    encoder: Literal["poisson", "direct"]
    """How pixels become input."""
    leak: Annotated[float, Field(gt=0, le=1)]
    """λ."""
    surrogate: Literal["stdb", "linear", "exponential"]
    """Eq. 11, 13 or 14."""
    alpha: Positive
    """α."""
    beta: NonNegative
    """β."""
    over_threshold: bool
    """The surrogate over U/V instead of U."""
    temporal_gradient: bool
    """Keep the leak path in the backward pass."""
    learn_thresholds: bool
    """V of every layer learns too (DIET-SNN)."""
    learn_leaks: bool
    """λ of every layer learns too (DIET-SNN)."""
    precision: Precision
    """Of convolutions and matrix products; membranes stay float32. TF32 is a GPU's."""
    from_scratch: bool
    """Random weights instead of the ANN's: the baseline of Appendix B."""
    truncate: Count | None
    """t' of truncated BPTT (§2.2)."""
    images: Count | None
    """Training images that it learns from, drawn by seed; None: all."""
    threshold_scale: Positive | None
    """V ← scale · V_balanced; None takes what evaluate_converted found."""
    logit_scale: Positive | Literal["auto"]
    """The output layer's weights are multiplied by it before the fine-tuning, which changes no
    decision; 1: the paper's; auto: so that softmax(U_T) is as sure as it is right on validation."""
    dropout: Rate | None
    """Of every dropout layer while fine-tuning."""
    clip: Positive | None
    """Largest norm of the gradient."""
    micro_batch: Count | None
    """Images that a worker presents at once; their gradients add up to the batch's."""
    chunk: Count | None
    """Time steps computed at once."""


class ClusterParams(Section):
    """Where the jobs run. Changes no result, so no stage tracks it."""

    workers: Count | Range | Literal["auto"]
    """Processes of a job, each with its share of every batch; [2, 8]: as many as there are, and on
    a cluster that loses and gains nodes a job goes on with fewer or more."""
    use_gpu: bool | Literal["auto"]
    """One GPU per worker, nccl; or CPU workers, gloo."""
    cpus_per_worker: Count | Literal["auto"]
    """Cores reserved for a worker; its threads."""
    storage: str
    """Checkpoints of unfinished stages."""
    checkpoint_steps: Count | None
    """Steps of an epoch after which the state is kept, beside every epoch; None: epochs only."""
    restarts: Annotated[int, Field(ge=0)]
    """How often a job goes on from its last checkpoint when a worker or a node is lost."""
    readers: Annotated[int, Field(ge=0)] | Literal["auto"]
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


Model = TypeVar("Model", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML with the floats of version 1.2, where 1e-4 is a number; no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for (key, _), value in zip(node.value, keys, strict=True):
            if keys.count(value) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"{value} stands twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: names every offending key, its value, and what is allowed.
    """
    return load(path, Params)


def load(path: Path, model: type[Model]) -> Model:
    """Read and check a file of parameters."""
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing; run from the root of the repository") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from None
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for problem in error.errors():  # the branches of a union come one by one
            statement, _, allowed = _explain(problem, model).partition("; allowed: ")
            lines[statement] = f"{lines[statement]} or {allowed}" if statement in lines else allowed
        said = [f"{what}; allowed: {a}" if a else what for what, a in lines.items()]
        raise ParamsError(f"{path} cannot be used:\n  " + "\n  ".join(said)) from None


def _explain(error: Any, model: type[BaseModel]) -> str:
    """One line: key, value, what is allowed."""
    location = [str(part) for part in error["loc"] if not _is_branch(part)]
    key = ".".join(location)
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "extra_forbidden":
        section: Any = model
        for part in location[:-1]:
            section = _inside(section, part)
        return f"{key} is no known key; allowed: {', '.join(section.model_fields)}"
    if error["type"] == "value_error":
        return f"{key}.{error['ctx']['error']}"
    allowed = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key} is {error['input']!r}; allowed: {allowed.replace('boolean', 'true, false')}"


def _inside(annotation: Any, part: str) -> Any:
    """The type of what a key leads to: in a model, in a dict, or in one of them or None."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel) and part in one.model_fields:
            found: Any = one.model_fields[part].annotation
            models = [a for a in get_args(found) if hasattr(a, "model_fields")]
            return found if get_origin(found) is dict or not models else models[0]
    return get_args(annotation)[-1]


def _is_branch(part: object) -> bool:
    """Pydantic adds the branch of a union, such as ``int`` or ``literal['auto']``, to the key."""
    return isinstance(part, str) and (
        part in ("int", "float", "bool", "str", "constrained-int") or "[" in part
    )
