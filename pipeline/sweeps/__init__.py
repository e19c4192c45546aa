"""Sweeps: what is searched, a trial, the tuner, and the front of what was found."""
