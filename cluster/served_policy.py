"""The trained policy as an MLflow model: load it with ``mlflow.pyfunc`` where this package is, and ask for actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch

from ript_ray.policies.checkpoints import load_policy


class ServedPolicy(mlflow.pyfunc.PythonModel):
    """``predict`` takes observations and returns chunks of actions."""

    def load_context(self, context: Any) -> None:
        """Load the policy among the model's files."""
        self._policy = load_policy(Path(context.artifacts["policy"]))
        self._settings = dict(context.model_config)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        """Chunks in the environment's units, float32[B, T, A].

        Args:
            context: of MLflow.
            model_input: ``frames`` uint8[B, C, H, W, 3], ``states`` float32[B, S], ``instructions`` (B texts) and, to
                have other noise, ``seed``.
            params: not used.
        """
        frames = torch.as_tensor(np.asarray(model_input["frames"], dtype=np.uint8))
        states = torch.as_tensor(np.asarray(model_input["states"], dtype=np.float32))
        generator = torch.Generator().manual_seed(int(np.asarray(model_input.get("seed", 0)).item()))
        noise = torch.randn(len(frames), self._policy.horizon, self._policy.action_dim, generator=generator)
        with torch.no_grad():
            chunks, _ = self._policy.act(
                frames,
                states,
                [str(text) for text in model_input["instructions"]],
                noise,
                self._settings["guidance"],
                self._settings["denoise_steps"],
            )
        return chunks.numpy()


mlflow.models.set_model(ServedPolicy())
