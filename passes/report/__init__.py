"""`report.html` of a dump folder: what every pass did, on one page that needs no network."""

from moec.passes.report.page import Report

__all__ = ["Report"]
