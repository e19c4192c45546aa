"""The pipeline: DVC stages that run the engine as Ray Train jobs and log to MLflow."""
