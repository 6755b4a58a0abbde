"""Where the time of a step goes, op by op: measured by a profiled program, beside what the machine's limits allow."""

from moec.profile.rows import calibration_rows
from moec.profile.run import OpTime, Profile, profile

__all__ = ["OpTime", "Profile", "calibration_rows", "profile"]
