"""Environment variables of the libraries that the pipeline runs on, where the user has none."""

import os

# MLflow's own 7 retries of 120 s each would hold up every stage for minutes
MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
# a thread that waits for others leaves its core to whoever has work
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
# quick reports, no line twice, tame logs
RAY = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DEDUP_LOGS_ALLOW_REGEX": r"^\[",  # the stages' own lines come at once
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Failed to query Ray Train|Reporting training result",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # on a busy machine its parts come up late, and by itself it gives up after 30 s; it looks twice
    # for so long where that is less, and ctrl-C waits for a look
    "RAY_raylet_start_wait_time_s": "29",
    "RAY_agent_register_timeout_ms": "60000",
}
# of a Ray that is started here: one that was killed with its job leaves agents, which would look
# for it for over a minute
OWN_RAY = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
# its state is written soon, ctrl-C is the stage's own, its progress tables are off
TUNE = {
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def set_default_environment(settings: dict[str, str]) -> None:
    """Set environment variables that the user has not set; before their library is imported."""
    for key, value in settings.items():
        os.environ.setdefault(key, value)
