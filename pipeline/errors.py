"""Every error that volseg raises on purpose.

VolsegError
├── ConfigError            a config file or a --set value
├── ManifestError          a manifest, or the dataset that it describes
├── VolumeError            a volume's file or content (also a ValueError; defined in transforms.errors)
│   ├── GeometryMismatch   two volumes that must share a voxel grid do not
│   └── DicomError         a damaged, ambiguous or unhandled DICOM series
│       └── SeveralSeries  a folder of several image series, none of them named
├── PlanError              a plan that cannot be made, or settings that contradict it
├── BundleError            a model bundle that is damaged, foreign or does not fit the input
├── RunError               a run folder that cannot be started, resumed or read
├── ExportError            an export that cannot be written, or that did not read back the same
└── PacsError              an archive that cannot be reached, refuses, or did not take or give everything
"""

from __future__ import annotations

from transforms.errors import DicomError, GeometryMismatch, SeveralSeries, VolsegError, VolumeError


class ConfigError(VolsegError):
    """A config file or a --set value that does not fit the schema."""


class ManifestError(VolsegError):
    """A manifest, or the dataset that it describes, is wrong."""


class PlanError(VolsegError):
    """A plan cannot be made, or a setting contradicts what the network needs."""


class BundleError(VolsegError):
    """A model bundle is damaged, of another format, or does not fit its input."""


class RunError(VolsegError):
    """A run folder cannot be started, resumed or read."""


class ExportError(VolsegError):
    """An export cannot be written, or did not read back the same."""


class PacsError(VolsegError):
    """An archive cannot be reached, refuses, or did not take or give everything."""


def describe_fault(error: Exception) -> str:
    """One line of any exception: what volseg says of its own errors, and of others their type too."""
    text = str(error) if isinstance(error, VolsegError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


__all__ = [
    "BundleError",
    "ConfigError",
    "DicomError",
    "ExportError",
    "GeometryMismatch",
    "ManifestError",
    "PacsError",
    "PlanError",
    "RunError",
    "SeveralSeries",
    "VolsegError",
    "VolumeError",
    "describe_fault",
]
