"""Runs below a stage's: a trial of a sweep, a T of a fine-tuning at several."""

from typing import Any

from pipeline.tracking.messages import text_of

INHERITED = ("job", "process", "git.", "dvc.")  # what a stage's tags begin with, and its child's


def open_child(client: Any, run_id: str, name: str, again: bool = False) -> tuple[str, bool]:
    """The run of this name below a stage's: the one there is, or a new one.

    One that a kill or an interruption has left is opened again.

    Args:
        client: MLflow's.
        run_id: of the stage's run.
        name: of the child.
        again: whether one that has ended well is opened again, too.

    Returns:
        Its id, and whether it is open.
    """
    above = client.get_run(run_id)
    experiment = above.info.experiment_id
    mine = f"tags.mlflow.parentRunId = '{run_id}' and attributes.run_name = '{name}'"
    found = client.search_runs([experiment], mine)
    tags = {k: text_of(v) for k, v in above.data.tags.items() if k.startswith(INHERITED)}
    if not found:
        tags["mlflow.parentRunId"] = run_id
        return client.create_run(experiment, tags=tags, run_name=name).info.run_id, True
    (run, *_) = found
    if run.info.status == "FINISHED" and not again:
        return run.info.run_id, False
    client.set_tag(run.info.run_id, "process", tags["process"])
    client.update_run(run.info.run_id, status="RUNNING")
    return run.info.run_id, True
