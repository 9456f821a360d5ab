"""Calibration on the running engine: a tenant's coefficients from a few examples, no gradients.

A candidate is the tenant's own adapter in a free slot with other coefficients, scored by the
log-probabilities that the engine gives to known answers. For a search with gradients and a second
copy of the model there is `safegene calibrate`.
"""

from safegene_server.calibration.job import CALIBRATE, calibrate
from safegene_server.calibration.service import CalibrationRequest, add_revision, register, start

__all__ = ["CALIBRATE", "CalibrationRequest", "add_revision", "calibrate", "register", "start"]
