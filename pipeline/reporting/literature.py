"""What others published on the same data set, to stand beside a run: literature.yaml, typed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.handed_on import Count
from pipeline.typed import Section, load

FILE = Path(__file__).with_suffix(".yaml")


class Paper(Section):
    """Where rows come from."""

    authors: str
    """Family names."""
    title: str
    """Title."""
    venue: str
    """Conference or journal, year, and the table where it is known."""
    input: str
    """How pixels become input, by a name of ``stdb.ENCODERS``."""


class Row(Section):
    """One published network."""

    paper: str
    """Of ``papers``: the method."""
    network: str
    """Architecture."""
    timesteps: Count
    """Steps of binary spikes."""
    accuracy: Annotated[float, Field(gt=1, le=100)]
    """Test accuracy in %."""


class DataSet(Section):
    """What there is on one data set."""

    name: str
    """Its name."""
    classes: list[str]
    """Names of its classes, by which a run on it is known."""
    rows: list[Row]
    """Published networks."""


class Literature(Section):
    """pipeline/reporting/literature.yaml."""

    papers: dict[str, Paper]
    """Method → its paper."""
    data_sets: list[DataSet]
    """The data sets."""


def literature() -> Literature:
    """All of it."""
    return load(FILE, Literature)


def data_set_of(classes: Iterable[str]) -> DataSet | None:
    """The data set with these classes: known by their names, also as a folder of class folders."""
    wanted = {_plain(name) for name in classes}
    known = literature().data_sets
    return next((one for one in known if {_plain(name) for name in one.classes} == wanted), None)


def rows_for(classes: Iterable[str]) -> list[Row]:
    """What was published on the data set with these classes, by method and T; else nothing."""
    data_set = data_set_of(classes)
    if data_set is None:
        return []
    return sorted(data_set.rows, key=lambda row: (row.paper, row.timesteps))


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")
