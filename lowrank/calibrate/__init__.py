"""Calibration: one pass over the user's batches measures what a policy needs."""

from lowrank.calibrate.run import calibrate, predicted_bytes

__all__ = ["calibrate", "predicted_bytes"]
