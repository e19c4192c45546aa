"""A spiking network as an MLflow model: uint8 images (B, C, H, W) in, class probabilities out.

MLflow runs this file where the model is loaded; it finds ``stdb`` among what was logged with it.
Every image draws the same random stream, so an answer does not depend on the batch it comes in.
"""

from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel

import stdb


class SpikingClassifier(PythonModel):
    """softmax(U_T) of a network that ``stdb.save`` wrote."""

    def load_context(self, context: Any) -> None:
        """Read the network."""
        self.snn, self.config = stdb.load(context.artifacts["network"])
        if torch.cuda.is_available():
            self.snn.cuda()

    def predict(  # type: ignore[no-untyped-def]  # MLflow would read type hints
        self,
        context,  # noqa: ARG002 (MLflow knows it by this name)
        model_input,
        params=None,
    ):
        """Class probabilities.

        Args:
            context: MLflow's.
            model_input: images, pixels 0 to 255.
            params: ``timesteps``, T; what the network was trained for by default.
        """
        images = model_input["images"] if isinstance(model_input, dict) else model_input
        device = next(self.snn.parameters()).device
        pixels = torch.from_numpy(np.array(images, dtype=np.float32)).to(device)
        pixels = self.config["normalisation"](pixels)
        steps = int((params or {}).get("timesteps") or self.config["timesteps"])
        ids = torch.zeros(len(pixels), dtype=torch.int64, device=device)
        decision = stdb.decide(self.snn, pixels, steps, sample_ids=ids)
        return decision.final.cpu().numpy()


mlflow.models.set_model(SpikingClassifier())
