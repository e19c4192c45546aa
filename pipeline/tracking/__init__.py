"""MLflow, a view of the runs: a tracker in the stage, messages, and a process that takes them."""
