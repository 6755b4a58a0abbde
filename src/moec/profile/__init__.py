"""Where the time of a step goes, op by op: measured by a profiled program, beside what the machine's limits allow."""

from moec.profile.run import OpTime, Profile, profile

__all__ = ["OpTime", "Profile", "profile"]
