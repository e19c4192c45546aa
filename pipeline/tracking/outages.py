"""What becomes of an error in the process that talks to MLflow: an outage, or a fault of ours."""

import sys
import traceback

from pipeline.tracking.address import tracking_uri, without_secrets

# whose exceptions say that MLflow, its database or its store does not answer
OUTSIDE = (
    *("mlflow", "requests", "urllib3", "sqlalchemy", "sqlite3", "alembic"),
    *("botocore", "boto3", "google", "azure"),
)
REFUSED = (401, 403, 429)  # HTTP's: of who asks or how often, not of what is asked
LENGTH = 300  # characters of an error's text that are shown


class UnavailableError(RuntimeError):
    """MLflow answers, but a person has to mend something there first; the message says what."""


class OutageError(RuntimeError):
    """MLflow has not taken a message, and may take it later.

    Attributes:
        dead: whether it would take no other message either.
    """

    def __init__(self, error: Exception, dead: bool) -> None:
        super().__init__(str(error))
        self.error, self.dead = error, dead


def warn(text: str) -> None:
    """Say that something of MLflow's failed; nothing else does with it."""
    print(f"warning: {without_secrets(text)}", file=sys.stderr, flush=True)


def is_outside(error: Exception) -> bool:
    """Whether an error is MLflow's, its database's, its store's or the machine's, not ours."""
    missing = isinstance(error, FileNotFoundError)  # a file that we said there is
    known = type(error).__module__.partition(".")[0] in OUTSIDE
    mended_outside = isinstance(error, OSError | ModuleNotFoundError | UnavailableError)
    return known or (mended_outside and not missing)


def is_outage(error: Exception) -> bool:
    """Whether the same message may be taken another time."""
    status = getattr(error, "get_http_status_code", None)
    if status is not None:
        return status() >= 500 or status() in REFUSED
    return is_outside(error)


def report(error: Exception, outage: str, outcome: str) -> None:
    """Say what came of an error: an outage in one line, an error of our own with its traceback."""
    if isinstance(error, UnavailableError):
        warn(f"{error}; {outcome}")
    elif is_outside(error):
        text = " ".join(str(error).split())
        shown = text if len(text) <= LENGTH else f"{text[:LENGTH]}…"
        warn(f"MLflow at {tracking_uri()} {outage}, {outcome}: {shown}")
    else:
        lines = "".join(traceback.format_exception(error))
        warn(f"a fault of this program, {outcome}:\n{lines.rstrip()}")
