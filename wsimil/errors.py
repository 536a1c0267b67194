"""Every error wsimil raises on purpose, in one tree.

- A message names the thing, the value and the way out; `slide_id: ` is put in front where the slide is known.
- `SlideError` and its children end one slide (a row with a reason); every other error ends the run.
- `UsageError` is the user's to mend before any work: the command line exits with 2.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AggregatorInputError",
    "BagFormatError",
    "ConfigError",
    "EncoderError",
    "EncoderMismatchError",
    "EncoderWeightsError",
    "LabelsError",
    "ScaleError",
    "SlideError",
    "SlideReadError",
    "SlideScaleUnknownError",
    "SlideStuckError",
    "SlideUnreadableError",
    "SplitsError",
    "StaleBagError",
    "UsageError",
    "WsimilError",
    "some_of",
]


def some_of(names: Sequence[str]) -> str:
    """The first five, and how many more there are: a message stays a line."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class WsimilError(Exception):
    """Root of the tree: catch this to catch everything wsimil raises on purpose."""


class UsageError(WsimilError):
    """The request itself is wrong (an option, a path, a table); nothing was started."""


class ConfigError(UsageError):
    """A configuration has an unknown key or a value out of range."""


class LabelsError(UsageError):
    """A label table that cannot be used: a missing column, an unknown slide, two labels for one slide."""


class SplitsError(UsageError):
    """Folds that cannot be made or trusted: a patient on two sides, a class with too few patients."""


class SlideError(WsimilError):
    """One slide cannot be used; the run goes on without it."""


class SlideUnreadableError(SlideError):
    """The file is not a slide that any reader opens, or it breaks while being read."""


class SlideReadError(SlideError):
    """A region of an open slide could not be read."""


class SlideStuckError(SlideError):
    """A read did not come back, or its process was killed: not known to be the slide's own fault, so tried again next time."""


class CompanionError(SlideError):
    """What was given along with a slide, its polygons or coordinates, is missing or does not fit; the slide itself may be fine."""


class ScaleError(SlideError):
    """The slide's µm/px is outside the sane range, or coarser than the asked scale."""


class SlideScaleUnknownError(ScaleError):
    """Neither the slide table, nor the file, nor the user states the slide's µm/px."""


class StaleBagError(SlideError):
    """A bag exists that another recipe or another slide file made."""


class BagFormatError(WsimilError):
    """A file that should be a bag is truncated, incomplete or inconsistent."""


class EncoderError(UsageError):
    """An encoder name or folder that cannot be understood."""


class EncoderWeightsError(EncoderError):
    """The weights of an encoder cannot be had; random weights never stand in for them."""


class EncoderMismatchError(UsageError):
    """Bags made by different encoders, or bags that do not fit the model."""


class AggregatorInputError(WsimilError):
    """A batch of bags that an aggregator cannot use: an empty bag, wrong width, missing coordinates."""
