"""The fine-tuned network in MLflow's registry: one model for each source of data, a version a run.

The alias ``champion`` is moved to the version that is best on validation, and ``champion-t4`` to
the best one of those for T = 4: a network for few steps does not compete with one for many.
"""

import math
import sys
from contextlib import redirect_stderr
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

from pipeline.tracking.address import tracking_uri
from pipeline.tracking.messages import Model

CHAMPION = "champion"
ACCURACY_TAG = "accuracy.validation"  # of a version; what decides who is champion
REQUIREMENTS = ("mlflow", "numba", "numpy", "safetensors", "torch")  # of the model
LISTED = 20  # classes in a card


def register(client: Any, run_id: str, model: Model, source: dict[str, str], commit: str) -> str:
    """Log a network as a model of a run, register it, and let the best version be champion.

    Args:
        client: MLflow's.
        run_id: of the stage's run.
        model: what is logged.
        source: tags that say what made it.
        commit: of the code.

    Returns:
        The logged model's id.
    """
    earlier = client.search_model_versions(f"run_id = '{run_id}'")  # where the answer was lost
    if earlier:
        model_id, version = str(earlier[0].source).removeprefix("models:/"), earlier[0].version
    else:
        model_id, version = _log(run_id, model)
    name, about = model.name, model.about
    client.set_logged_model_tags(model_id, source)
    _describe(client, model, version, commit)
    of_all, of_its_t = CHAMPION, f"{CHAMPION}-t{about.timesteps}"
    won = [alias for alias in (of_its_t, of_all) if _crown(client, model, version, alias)]
    which = f"now models:/{name}@{' and @'.join(won)}" if won else "the champion is better"
    print(f"MLflow: model {name}, version {version}, {which}", file=sys.stderr, flush=True)
    return model_id


def _log(run_id: str, model: Model) -> tuple[str, str]:
    """Log a network as a model of a run, and register it; the model's id, its version."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    import stdb

    about = model.about
    images = np.array(model.example, dtype=np.uint8)
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, *images.shape[1:]), "images")]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, len(about.classes)))]),
        ParamSchema([ParamSpec("timesteps", "integer", about.timesteps)]),
    )
    mlflow.set_tracking_uri(tracking_uri())
    silent = redirect_stderr(StringIO())
    with silent, mlflow.start_run(run_id=run_id, log_system_metrics=False):
        info = mlflow.pyfunc.log_model(
            name="snn",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"network": model.path},
            code_paths=[str(Path(stdb.__file__).parent)],  # the engine, which needs no more
            signature=signature,
            input_example={"images": images},
            pip_requirements=[
                f"{p}=={metadata.version(p).partition('+')[0]}" for p in REQUIREMENTS
            ],
            registered_model_name=model.name,
            metadata=about.model_dump(),
        )
    return str(info.model_id), str(info.registered_model_version)


def _describe(client: Any, model: Model, version: str, commit: str) -> None:
    """What the registry's pages say of a model and of a version of it."""
    name, about = model.name, model.about
    if not client.get_registered_model(name).description:  # else it is somebody's own
        client.update_registered_model(
            name,
            "Spiking network: uint8 images in, class probabilities out.\n\n"
            f'`mlflow.pyfunc.load_model("models:/{name}@{CHAMPION}")` is the version that is '
            f"best on validation, `@{CHAMPION}-t4` the best one for T = 4.",
        )
    client.update_model_version(name, version, _card(model, version, commit))
    client.set_model_version_tag(name, version, ACCURACY_TAG, str(about.accuracy))
    client.set_model_version_tag(name, version, "timesteps", str(about.timesteps))


def _card(model: Model, version: str, commit: str) -> str:
    """What a version's page says: what it is, what it takes, how to use it; Markdown."""
    import numpy as np

    about, shape = model.about, "×".join(map(str, np.shape(model.example)[1:]))
    return f"""{about.architecture}, T = {about.timesteps}: {about.accuracy:.2%} on validation; \
commit {commit[:7]}

- **Takes** images of {shape} pixels, uint8, (N, C, H, W); pixels are normalised inside.
- **Gives** (N, {len(about.classes)}) probabilities: {", ".join(about.classes[:LISTED])}\
{", …" if len(about.classes) > LISTED else ""}.
- **Use** `mlflow.pyfunc.load_model("models:/{model.name}/{version}").predict(images)`, with
  `params={{"timesteps": 2}}` at another T. The engine travels with it.
- **The network's file** is among its artefacts, `snn.safetensors`: `stdb.load` reads it,
  `python -m stdb export` hands it on to NIR, ONNX and torch.export.
"""


def _crown(client: Any, model: Model, version: str, alias: str) -> bool:
    """Give this version an alias where no rival is better; whether it has it."""
    from mlflow.exceptions import MlflowException

    name, about = model.name, model.about
    try:
        rivals = [client.get_model_version_by_alias(name, alias)]
    except MlflowException:  # there is none yet
        found = client.search_model_versions(f"name = '{name}'") if alias != CHAMPION else []
        rivals = [v for v in found if v.tags.get("timesteps") == str(about.timesteps)]
    best = max((float(v.tags.get(ACCURACY_TAG, "-inf")) for v in rivals), default=-math.inf)
    if about.accuracy < best:
        return False
    client.set_registered_model_alias(name, alias, version)
    return True
