"""Text, YAML, JSON and CSV that people and earlier stages wrote, read so that nothing is guessed.

Text is UTF-8, whatever the locale. A file is bounded in size and depth, and says each thing once.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode

LARGEST = 2**18  # bytes of a file of parameters, which YAML's reader takes seconds for
LARGEST_RESULT = 2**26  # and of a file that a stage wrote
DEEPEST = 20  # levels of mappings and lists in each other
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")


class UnreadableError(ValueError):
    """A file cannot be read; the message says why, and not which."""


def read_text(path: Path, largest: int = LARGEST) -> str:
    """A text in UTF-8; a byte order mark is left out, line ends are LF.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is no regular file, too large, or no text.
    """
    if path.exists() and not path.is_file():
        raise UnreadableError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UnreadableError(f"it has more than {largest >> 10:,} KiB, which is the most")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableError(
            f"line {line} is not UTF-8 (byte 0x{content[error.start]:02x})"
        ) from None
    if control := CONTROL.search(text):
        line = text.count("\n", 0, control.start()) + 1
        raise UnreadableError(f"line {line} has the control character U+{ord(control[0]):04X}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# -- YAML ------------------------------------------------------------------------------------------


class _PlainComposer(Composer):
    """Mappings, lists and scalars: what refers to elsewhere, or names a type, is refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, where it is a plain one."""
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent) or event.anchor is not None:
            self._refuse(event, "an anchor or alias (& or *), which is not allowed; write it out")
        if event.tag is not None:
            self._refuse(event, f"the tag {event.tag}, which is not allowed; write the plain value")
        is_key = isinstance(parent, MappingNode) and index is None
        if is_key and getattr(event, "value", None) == "<<":
            self._refuse(event, "the merge key <<, which is not allowed; write it out")
        if self.depth >= DEEPEST:
            self._refuse(event, f"more than {DEEPEST} levels of mappings and lists in each other")
        node = super().compose_node(parent, index)
        if is_key and not str(node.tag).endswith(":str"):
            self._refuse(event, "a key that is no text")
        return node

    def _refuse(self, event: Any, what: str) -> NoReturn:
        raise UnreadableError(f"line {event.start_mark.line + 1} has {what}")


class _PlainConstructor(SafeConstructor):
    """Names the scalar that looks like a number or a date and is none."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            return super().construct_object(node, deep)
        except (YAMLError, UnreadableError):
            raise
        except (ValueError, ArithmeticError, LookupError, TypeError):
            kind = str(node.tag).rpartition(":")[2]
            shown = str(node.value)[:40]
            line = node.start_mark.line + 1
            raise UnreadableError(f"line {line}: {shown!r} is no {kind}") from None


def read_yaml(path: Path) -> Any:
    """A file's value by YAML 1.2, as DVC reads it: 1e-4 is a number, no key may stand twice.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is no text, no YAML, or holds more than mappings, lists and scalars.
    """
    text = read_text(path)
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.Constructor = _PlainComposer, _PlainConstructor
    try:
        return yaml.load(text)
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1]
        raise UnreadableError(f"{key} stands twice, line {_line(error)}") from None
    except MarkedYAMLError as error:
        what = " ".join(f"{error.problem or error.context or 'no YAML'}".split())
        raise UnreadableError(f"line {_line(error)}: {what}") from None
    except YAMLError as error:
        raise UnreadableError(" ".join(str(error).split())[:200]) from None


def _line(error: MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark is not None else 1


# -- JSON and CSV ----------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A file's value by JSON: no key stands twice, numbers are finite.

    Raises:
        OSError: it cannot be opened.
        UnreadableError: it is no text, or no JSON.
    """
    text = read_text(path, LARGEST_RESULT)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnreadableError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"no JSON: {error}"[:200]) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, one in pairs:
        if key in value:
            raise UnreadableError(f"{key!r} stands twice")
        value[key] = one
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableError(f"it has the number {name}; allowed: finite numbers")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows with a value for every column; values are text.

    Raises:
        OSError: it cannot be opened.
        UnreadableError: it is no text, has no row, or a row is too short or too long.
    """
    table = csv.DictReader(read_text(path, LARGEST_RESULT).splitlines())
    try:
        rows = list(table)
    except csv.Error as error:
        raise UnreadableError(f"line {table.line_num}: {error}") from None
    if not rows:
        raise UnreadableError("it has no rows")
    for position, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            columns = len(table.fieldnames or [])
            raise UnreadableError(f"row {position} has not a value for each of {columns} columns")
    return rows
