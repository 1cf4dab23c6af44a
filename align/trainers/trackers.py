"""`report_to`: what a training's metrics go to is there before anything is loaded, and gets a run for each training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import integrations

from ..errors import ConfigError

#: Trackers of transformers: whether one is there, and what pip calls its package. Kubeflow's is the cluster it runs in.
TRACKERS = {
    "azure_ml": (integrations.is_azureml_available, "azureml-mlflow"),
    "clearml": (integrations.is_clearml_available, "clearml"),
    "codecarbon": (integrations.is_codecarbon_available, "codecarbon"),
    "comet_ml": (integrations.is_comet_available, "comet-ml"),
    "dagshub": (integrations.is_dagshub_available, "dagshub"),
    "dvclive": (integrations.is_dvclive_available, "dvclive"),
    "flyte": (integrations.is_flytekit_available, "flytekit"),
    "kubeflow": (lambda: True, ""),
    "mlflow": (integrations.is_mlflow_available, "mlflow"),
    "neptune": (integrations.is_neptune_available, "neptune"),
    "swanlab": (integrations.is_swanlab_available, "swanlab"),
    "tensorboard": (integrations.is_tensorboard_available, "tensorboard"),
    "trackio": (integrations.integration_utils.is_trackio_available, "trackio"),
    "wandb": (integrations.is_wandb_available, "wandb"),
}

#: Where TensorBoard's files lie in a training's folder.
EVENTS = "runs"


def check_trackers(report_to: Any) -> None:
    """Raises a ConfigError where metrics shall go to a tracker that is unknown or not installed.

    TRL asks when the trainer is made, behind the model, with errors of other kinds.

    Args:
        report_to: as transformers takes it: a name, a list of names, `none`, or `all`, which is what is installed.
    """
    if report_to in ("none", "all", ["none"], ["all"]):
        return
    for name in report_to if isinstance(report_to, (list, tuple)) else [report_to]:
        if not isinstance(name, str) or name not in TRACKERS:
            raise ConfigError(f"report_to: {name!r} is unknown; use none, all, or some of {', '.join(TRACKERS)}")
        there, package = TRACKERS[name]
        if not there():
            raise ConfigError(
                f"report_to: {name} needs the package {package}, which is not installed; pip install {package}, or leave "
                f"{name} out"
            )


@contextmanager
def run_of_its_own(report_to: Any) -> Iterator[None]:
    """Ends the wandb run that a training within begins, which transformers leaves open: the next training of a recipe would
    write into it. One whose training fails is marked so; a run that was open before is the caller's."""
    wandb: Any = sys.modules.get("wandb") if "wandb" in report_to else None
    open_before = wandb is not None and wandb.run is not None
    failed = 1
    try:
        yield
        failed = 0
    finally:
        wandb = sys.modules.get("wandb") if "wandb" in report_to else None
        if wandb is not None and wandb.run is not None and not open_before:
            wandb.finish(exit_code=failed)


def move_events(source: Path, target: Path) -> None:
    """Moves TensorBoard's files, where there are any, from one folder of a training to another."""
    if (source / EVENTS).is_dir():
        os.replace(source / EVENTS, target / EVENTS)
