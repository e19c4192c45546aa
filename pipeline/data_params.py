"""The section ``data`` of params.yaml: which images, and how they are split."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.data.images import known_pixels
from pipeline.data.sources import NEEDS_PATH, SOURCES, path_is_missing
from pipeline.typed import Count, Pixels, Section, Seed, Share, one_of
from stdb import NORMALISATIONS, Normalisation, Preparation, normalisation_of


class DataParams(Section):
    """Which images, and how they are split."""

    source: Annotated[str, AfterValidator(one_of(SOURCES))]
    """The data set; ``folder`` is any folder or archive of class folders."""
    path: str | None
    """``folder``: the folder or archive. Others: where downloads are kept (data/downloads)."""
    image_size: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None
    """Images are brought to this many pixels square, or to [height, width], 1 to 4096 each; None
    leaves them. It is their middle, as large as it can be, that is brought to the size."""
    resize: Annotated[int, Field(ge=1, le=Preparation.LARGEST)] | None = None
    """The shorter side is brought to this many pixels, and the middle of ``image_size`` cut out of
    that, as torchvision's published weights ask for (256 for 224); None: as above."""
    normalise: Annotated[str | dict[str, list[float]] | None, BeforeValidator(known_pixels)] = None
    """What pixels become: (x/255 − mean)/std with the mean and deviation of each channel, as
    {mean: [0.5], std: [0.25]} or by a name of ``stdb.NORMALISATIONS``; None: x/127.5 − 1."""
    grayscale: bool
    """``folder`` only: read images as one grey channel."""
    stream: bool | Literal["auto"]
    """``folder`` only: images stay in their files and are read as they are needed; auto: where
    they would take more than 4 GiB of memory."""
    train_limit: Count | None
    """Use only this many training images."""
    test_fraction: Share
    """Share that is held out for the test, in (0, 1), where the source has no test split."""
    validation_fraction: Share
    """Share of the training images that is held out for validation, in (0, 1)."""
    seed: Seed
    """Seed that draws the splits."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) that images are brought to."""
        size = self.image_size
        if isinstance(size, list):
            return size[0], size[1]
        return None if size is None else (size, size)

    @property
    def normalisation(self) -> Normalisation:
        """What pixels become."""
        how = self.normalise
        return NORMALISATIONS[how] if isinstance(how, str) else normalisation_of(how)

    @property
    def preparation(self) -> Preparation:
        """What becomes of images beside their size."""
        return Preparation(self.resize, self.normalisation)

    @model_validator(mode="after")
    def _holds_the_middle(self) -> "DataParams":
        if self.resize is not None and (self.size is None or self.resize < max(self.size)):
            raise ValueError(
                f"resize is {self.resize} and image_size {self.image_size}; allowed: null, or an "
                "image_size and no less than its longer side"
            )
        return self

    @model_validator(mode="after")
    def _has_a_path(self) -> "DataParams":
        if self.path is None and self.source in NEEDS_PATH:
            raise ValueError(path_is_missing(self.source))
        if self.path is not None and (not self.path.strip() or "\0" in self.path):
            raise ValueError(
                f"path is {self.path!r}; allowed: null, or the name of a file or folder"
            )
        return self
