"""Where runs go: MLflow's address and experiment, by MLflow's own environment variables."""

import os
import re
from urllib.parse import urlsplit

from pipeline.files import root

EXPERIMENT = "stdb"
SERVERS = ("http", "https")
DATABASES = ("postgresql", "mysql", "mssql")
ALLOWED = (
    "allowed are http://HOST:PORT, https://HOST, sqlite:////FOLDER/mlflow.db, postgresql://, "
    "mysql:// or mssql:// with host and database, databricks"
)


def tracking_uri() -> str:
    """Where runs go."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def address() -> str:
    """Names where runs go, without secrets; "" is the database at the root, wherever that lies."""
    return without_secrets(os.environ.get("MLFLOW_TRACKING_URI") or "")


def experiment() -> str:
    """Name of the experiment that runs are in."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def experiment_id() -> str:
    """Number of the experiment, where the user names one by its number; else ""."""
    named = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    return "" if named else os.environ.get("MLFLOW_EXPERIMENT_ID", "")


def fault_of(uri: str) -> str:
    """What is wrong with an address, whoever listens there; "" where nothing is."""
    wrong = _wrong(uri)
    if not wrong:
        return ""
    shown = repr(without_secrets(uri[:200]))
    return f"MLFLOW_TRACKING_URI is {shown}, {wrong}; {ALLOWED}"


def _wrong(uri: str) -> str:
    scheme, found, rest = uri.partition("://")
    kind = scheme.partition("+")[0]
    if not uri.isprintable() or " " in uri.strip() * (kind != "sqlite"):
        return "which has characters that no address has"
    if uri == "databricks" or kind == "databricks":
        return ""
    if not found or kind not in ("sqlite", "file", *SERVERS, *DATABASES):
        local = re.match(r"file:|[\w./~-]*$", uri) and uri.strip()
        return _wrong("file://" + uri) if local else "which MLflow does not know"
    if kind == "file":
        allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
        return "" if allowed else "a folder, which MLflow 3 no longer writes to"
    if kind == "sqlite":
        path = rest.partition("?")[0]
        return "" if path[:1] == "/" and path[1:] else "which names no file"
    try:
        parts = urlsplit(uri)
        complete = parts.hostname and (parts.port or True)
    except ValueError as error:
        return f"which is no address ({error})"
    return "" if complete else "which names no host"


def without_secrets(text: str) -> str:
    """A text without the user names and passwords of the addresses in it."""
    return re.sub(r"(://)[^/\s]+@", r"\1***@", text)
