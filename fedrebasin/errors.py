"""The errors that fedrebasin raises for what a caller can mend."""

from __future__ import annotations


class RebasinError(ValueError):
    """Base of all errors of the core; the message names the parameter, what was expected, what came."""


class UnsupportedOpError(RebasinError):
    """``trace(..., strict=True)`` met an op that no rule covers."""


class TraceError(RebasinError):
    """The model could not be exported, or its spec could not be derived."""


class InvalidSpecError(RebasinError):
    """A permutation spec changes the function of the network."""


class SpecMismatchError(RebasinError):
    """A state dict, a set of permutations or a model does not fit the spec or the reference."""


class CalibrationError(RebasinError):
    """Calibration or evaluation data is missing, exhausted or of the wrong kind."""


class NoSiteError(RebasinError):
    """A network has no layer whose activations a correction of REPAIR's kind can set."""


class UsageError(RebasinError):
    """A command or option that the user can mend; the command line prints it and exits with status 2."""


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message, to be quoted in another one.

    >>> first_line(KeyError("a"))
    "KeyError: 'a'"
    """
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def without_frames(error: Exception) -> Exception:
    """The error, fit to be kept: without traceback and causes, whose frames hold all that was at work.

    >>> without_frames(ValueError("no")).__traceback__ is None
    True
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
