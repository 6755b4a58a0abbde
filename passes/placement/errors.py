"""Wrong input to expert placement: one class per mistake, each message one line that says what to change."""

from __future__ import annotations

from moec.errors import InputError


class UnreadableFile(InputError):
    template = "cannot read {path}: {reason}"


class NoSuchArray(UnreadableFile):
    """A file of several arrays without the wanted one."""


class NotWhole(InputError):
    template = "{name}: layers are given by whole numbers, got {value:g} at [{at}]"


class WrongRank(InputError):
    template = "{name}: expected {expected}, got an array of shape {shape}"


class NotNumbers(InputError):
    template = "{name}: expected numbers, got elements of type {dtype}"


class NotFinite(InputError):
    template = "{name}: {what} at {where}: every entry must be a finite number"


class NegativeEntry(InputError):
    template = "{name}: negative entry {value:g} at {where}: token counts cannot be below zero"


class TooGreat(InputError):
    template = "{name}: entry {value:g} at {where} is above {greatest:g}: scale the loads down, only their ratios count"


class TooFewSlots(InputError):
    template = (
        "{experts} experts do not fit into {slots} slots ({devices} devices x {slots_per_device}): "
        "give at least {needed} slots a device"
    )


class TooManySlots(InputError):
    template = (
        "{slots} slots in all ({layers} layers on {devices} devices) are more than the {most} that can be placed "
        "together: give fewer devices, or fewer layers at a time"
    )


class DevicesDoNotDivide(InputError):
    template = "{devices} devices do not divide over nodes of {devices_per_node}: give a multiple of {devices_per_node}"


class GroupsDoNotDivide(InputError):
    template = "{groups} groups do not divide {what}: {advice}"


class NotPositive(InputError):
    template = "{name} must be {expected}, got {value}"


class UnknownChoice(InputError):
    template = "{name}: unknown value {value!r}{hint}"


class PreviousMismatch(InputError):
    template = "previous placement has {previous}, this one needs {wanted}: place without --previous"


class BadPlacement(InputError):
    template = "{path}: not a placement: {reason}"


class SearchTooLarge(InputError):
    template = (
        "the exact solver takes at most {limit} placement decisions a layer, this problem has {size}: "
        "leave --exact out (the bound is printed anyway)"
    )


class MissingDevices(InputError):
    template = "how many devices? give --target or --devices"


class NotForSglang(InputError):
    template = "{path}: SGLang takes --init-expert-location for a file only when its name ends in .json: name it so"


class ExactWithGroups(InputError):
    template = "the exact solver does not take groups: leave --exact or --groups out"


class RecordingsDiffer(InputError):
    template = "{first} and {other} are not of the same model: {what}"
