"""Errors that a caller may want to catch. Wrong arguments raise ValueError or TypeError instead."""

import difflib
from collections.abc import Iterable


class RemosError(Exception):
    """Something about a model, a profile or a file does not allow the request; the message says what and what to do."""


class LayerMismatchError(RemosError):
    """A profile or a slice names other layers, or other shapes, than the model holds."""


class TeacherMismatchError(RemosError):
    """A profile or a slice was made from a teacher with other weights than the ones at hand."""


class UnsupportedModelError(RemosError):
    """A weight cannot be ranked: it is on the meta device, quantised, sharded, or computed by a parametrization."""


class NonFiniteError(RemosError):
    """A weight or an activation is NaN or infinite, so ranks mean nothing."""


class CorruptFileError(RemosError):
    """A sidecar file is truncated, tampered with, or not one of ours."""


def nearest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Ask about the names that are most like those that are unknown: a sentence behind a space, or nothing."""
    known = tuple(known)
    near = [one for name in unknown for one in difflib.get_close_matches(name, known, 1)]
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""
