"""MLflow reached, its database made, the experiment found or made."""

import random
import sys
import time
from typing import Any

from pipeline.tracking.address import tracking_uri
from pipeline.tracking.database import adopt, alone, artifacts_of
from pipeline.tracking.messages import Start
from pipeline.tracking.outages import UnavailableError, is_outage

AGAIN = (0.5, 1.0, 2.0)  # seconds between attempts to make a database that others make, too
PURPOSE = """\
A run is one execution of the pipeline, with a run for each stage below it. Select two to compare.

Image classifiers become spiking networks that are accurate at few time steps T: an ANN is trained,
converted by threshold balancing, and fine-tuned by STDB. `accuracy/` is that of the test split,
`spikes/` are per neuron and image, `energy/` is per image. Runs are named after network, T and
commit, or after their DVC experiment.
"""


def open_mlflow(message: Start) -> tuple[Any, str]:
    """A client of MLflow's, and the number of the experiment that a stage asks for.

    Raises:
        UnavailableError: the experiment takes no runs.
    """
    uri = tracking_uri()
    for pause in AGAIN:
        try:
            with alone(uri):
                return _reach(uri, message)
        except Exception as error:
            # "table … already exists": MLflow's tables are being made by another process
            if not type(error).__module__.startswith("sqlalchemy"):
                raise
            time.sleep(pause * (0.5 + random.random()))
    with alone(uri):
        return _reach(uri, message)


def _reach(uri: str, message: Start) -> tuple[Any, str]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)
    if earlier := adopt(uri):
        print(
            f"MLflow: artefacts are in {artifacts_of(uri)} now, not in {earlier}", file=sys.stderr
        )
    experiment = (
        _by_number(client, message.experiment_id)
        if message.experiment_id
        else (client.get_experiment_by_name(message.experiment) or _new(client, message.experiment))
    )
    if experiment.lifecycle_stage == "deleted":
        number = experiment.experiment_id
        raise UnavailableError(
            f"MLflow's experiment {experiment.name!r} was deleted; it is restored by "
            f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number}, "
            "or set MLFLOW_EXPERIMENT_NAME to another name"
        )
    return client, str(experiment.experiment_id)


def _by_number(client: Any, number: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_experiment(number)
    except MlflowException as error:
        if is_outage(error):
            raise
        raise UnavailableError(
            f"MLFLOW_EXPERIMENT_ID is {number!r}, which MLflow at {tracking_uri()} does not have; "
            "MLFLOW_EXPERIMENT_NAME makes an experiment where there is none"
        ) from error


def _new(client: Any, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    place, tags = artifacts_of(tracking_uri()), {"mlflow.note.content": PURPOSE}
    try:
        client.create_experiment(name, artifact_location=place, tags=tags)
    except MlflowException:  # perhaps another process was faster
        if client.get_experiment_by_name(name) is None:
            raise
    return client.get_experiment_by_name(name)
