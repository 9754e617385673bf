"""The root of the error tree and the errors of volumes. `pipeline.errors` shows the whole tree."""

from __future__ import annotations


class VolsegError(Exception):
    """Anything that volseg refuses. The message is one line: what was found, expected, where, what to do."""


class VolumeError(VolsegError, ValueError):
    """A volume that cannot be read, or whose content cannot be right."""


class GeometryMismatch(VolumeError):
    """Two volumes that must share a voxel grid do not."""


class DicomError(VolumeError):
    """A DICOM series that is damaged, ambiguous or of a kind that is not handled."""


class SeveralSeries(DicomError):
    """A folder holds several image series and none was named; the message lists them."""
