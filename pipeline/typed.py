"""YAML files as typed, frozen models; an error names every key, its value, and what is allowed."""

from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from pipeline.errors import ParamsError


class Section(BaseModel):
    """One section: unknown keys, wrong types and impossible values are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


Model = TypeVar("Model", bound=Section)


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
    """A file's value by YAML 1.2, as DVC reads it: 1e-4 is a number, no key may stand twice."""
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing; run from the root of the repository") from None
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1]
        line = error.problem_mark.line + 1
        raise ParamsError(f"{path} is not valid YAML: {key} stands twice, line {line}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from None


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
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for problem in error.errors():  # the branches of a union come one by one
            statement, _, allowed = _explain(problem, model).partition("; allowed: ")
            lines[statement] = f"{lines[statement]} or {allowed}" if statement in lines else allowed
        said = [f"{what}; allowed: {a}" if a else what for what, a in lines.items()]
        raise ParamsError(f"{where} cannot be used:\n  " + "\n  ".join(said)) from None


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
            inner: Any = one.model_fields[part].annotation
            models = [a for a in get_args(inner) if hasattr(a, "model_fields")]
            return inner if get_origin(inner) is dict or not models else models[0]
    return get_args(annotation)[-1]


def _is_branch(part: object) -> bool:
    """Pydantic adds the branch of a union, such as ``int`` or ``literal['auto']``, to the key."""
    return isinstance(part, str) and (
        part in ("int", "float", "bool", "str", "constrained-int") or "[" in part
    )
