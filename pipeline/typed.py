"""YAML files as typed, frozen models; an error names every key, its value, and what is allowed."""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from pipeline import reading
from pipeline.errors import ParamsError, StageError

LONGEST = 400  # characters of the problems that a message names
WIDEST = 80  # characters of a value in a message
MOST_STEPS = 32767  # T of a presentation: spike times are 16 bits

Pixels = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """One section: unknown keys, wrong types and impossible values are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


Model = TypeVar("Model", bound=Section)
Result = TypeVar("Result", bound=BaseModel)


def one_of(allowed: Any) -> Any:
    """A pydantic validator: a name that a registry has."""

    def check(value: str) -> str:
        if value not in allowed:
            *most, last = [repr(name) for name in allowed]
            raise PydanticCustomError(
                "registry", "Input should be {names}", {"names": f"{', '.join(most)} or {last}"}
            )
        return value

    return check


def read_yaml(path: Path) -> Any:
    """A file's value by YAML 1.2, as DVC reads it: 1e-4 is a number, no key may stand twice.

    Raises:
        ParamsError: names the file, and what is wrong in it.
    """
    try:
        return reading.read_yaml(path)
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing; run from the root of the repository") from None
    except reading.UnreadableError as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}") from None


def load(path: Path, model: type[Model]) -> Model:
    """Read and check a file of parameters.

    Raises:
        ParamsError: names every offending key, its value, and what is allowed.
    """
    return validate(read_yaml(path), model, str(path))


def validate(values: Any, model: type[Model], where: str) -> Model:
    """Check what ``where`` says.

    Raises:
        ParamsError: names every offending key, its value, and what is allowed.
    """
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"is {shown(values)}"
        raise ParamsError(f"{where} {what}; allowed: {', '.join(model.model_fields)}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        said = problems(error, model)
    named = said[:1]
    for problem in said[1:]:
        if len(" | ".join([*named, problem])) <= LONGEST:
            named.append(problem)
    more = [f"and {len(said) - len(named)} more"] if len(said) > len(named) else []
    raise ParamsError(f"{where} cannot be used: {' | '.join([*named, *more])}")


def load_result(path: Path, model: type[Result], remedy: str = "run dvc repro") -> Result:
    """Read and check a JSON file that a stage wrote.

    Raises:
        StageError: names the file, what is wrong in it, and what makes it again.
    """
    try:
        values = reading.read_json(path)
        return model.model_validate_json(json.dumps(values))  # JSON's lists are tuples, too
    except OSError as error:
        raise StageError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except ValidationError as error:
        what = problems(error, model)[0]
    except reading.UnreadableError as error:
        what = str(error)
    raise StageError(f"{path} is not what its stage writes: {what}; {remedy}")


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each key: its value, and what is allowed."""
    lines: dict[str, str] = {}
    for problem in error.errors():  # the branches of a union come one by one
        statement, _, allowed = _explain(problem, model).partition("; allowed: ")
        lines[statement] = f"{lines[statement]} or {allowed}" if statement in lines else allowed
    return [f"{what}; allowed: {a}" if a else what for what, a in lines.items()]


def shown(value: Any) -> str:
    """A value in a message, of bounded length."""
    text = repr(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def _explain(error: Any, model: type[BaseModel]) -> str:
    """One line: key, value, what is allowed."""
    location = [shown_key(part) for part in error["loc"] if not _is_branch(part)]
    key = ".".join(location)
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "extra_forbidden":
        section: Any = model
        for part in location[:-1]:
            section = _inside(section, part)
        return f"{key} is no known key; allowed: {', '.join(section.model_fields)}"
    if error["type"] == "value_error":
        return ".".join([*location, str(error["ctx"]["error"])])
    if error["type"] == "invalid_key":
        return f"{key} is no known key; allowed: text"
    allowed = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    value = shown(error["input"])
    return f"{key or 'it'} is {value}; allowed: {allowed.replace('boolean', 'true, false')}"


def shown_key(part: object) -> str:
    """A key in a message: short, and on one line."""
    text = str(part)
    return text if text.isprintable() and len(text) <= WIDEST else shown(text)


def _inside(annotation: Any, part: str) -> Any:
    """The type of what a key leads to: in a model, in a dict, or in one of them or None."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel) and part in one.model_fields:
            inner: Any = one.model_fields[part].annotation
            models = [a for a in get_args(inner) if hasattr(a, "model_fields")]
            return inner if get_origin(inner) is dict or not models else models[0]
    return (get_args(annotation) or [annotation])[-1]  # of a list, its positions


def _is_branch(part: object) -> bool:
    """Pydantic adds the branch of a union, such as ``int`` or ``literal['auto']``, to the key."""
    return isinstance(part, str) and (
        part in ("int", "float", "bool", "str") or part.startswith("constrained-") or "[" in part
    )
