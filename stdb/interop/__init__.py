"""Doors in and out: files, the authors' checkpoints, NIR, ``torch.export``."""
