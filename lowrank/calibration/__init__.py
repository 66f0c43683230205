"""Calibration: one pass over the user's batches measures what a policy needs."""

from lowrank.calibration.run import calibrate, predicted_bytes

__all__ = ["calibrate", "predicted_bytes"]
