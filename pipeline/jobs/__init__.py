"""Jobs: a stage's loop on the workers of a Ray Train job, here or on a cluster."""
