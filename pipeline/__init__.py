"""The pipeline: DVC stages that run the engine as Ray Train jobs and log to MLflow."""

from pipeline.environment import THREADS, set_default_environment

set_default_environment(THREADS)  # here, since OpenMP reads it when torch is imported
