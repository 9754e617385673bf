"""What can be wrong with the images of a DICOM series, each fault by its name; `dicom_placing` judges where they lie.

A check sees the headers of one series and gives findings; nothing is guessed. To handle a new kind of series, turn
its finding from "refuse" into "mend" here and read it in `transforms.dicom`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydicom.uid import UID

from transforms.dicom_decoders import ENCAPSULATED_SYNTAXES, LOSSY_SYNTAXES
from transforms.dicom_findings import Finding, Headers, distinct, files, mend, refuse, where
from transforms.dicom_header import NATIVE_SYNTAXES, Header, quiet_pydicom
from transforms.sanity import MAX_VOXELS

MEASURED_HU = (-1000.0, 3071.0)
"""CT numbers that tissue can have: a padding value in this range would erase measurements."""

BACKGROUND = {"CT": -1024.0}
"""Value of voxels that were not measured, by modality, where it is not 0."""

PHYSICAL_UNITS = ("CT", "PT", "NM")
"""Modalities whose rescaled values measure something, however they are shown."""

_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66",)


def kind_findings(headers: Headers) -> list[Finding]:
    """Whether these are slices of one image at all: one grey value a pixel, one slice a file."""
    findings: list[Finding] = []
    for check in _KIND_CHECKS:
        # What is no image needs no further faults to its name.
        findings += check(headers) if all(finding.outcome == "mend" for finding in findings) else []
    return findings


def pixel_findings(headers: Headers) -> list[Finding]:
    """Whether the pixels can be read as numbers, and what is done to them."""
    return [finding for check in _PIXEL_CHECKS for finding in check(headers)]


def background_of(modality: str) -> float:
    """The value of voxels that were not measured."""
    return BACKGROUND.get(modality, 0.0)


def keeps_padding(header: Header) -> bool:
    """Whether the padding value of a CT lies among its measured values, so that it must stay as it is."""
    if header.padding is None or header.modality != "CT" or header.slope is None or header.intercept is None:
        return False
    values = [stored * header.slope + header.intercept for stored in header.padding]
    return min(values) < MEASURED_HU[1] and max(values) > MEASURED_HU[0]


def is_inverted(header: Header) -> bool:
    """Whether stored values are to be mirrored, so that what is shown bright is high.

    MONOCHROME1 shows the lowest value as white (PS3.3 C.7.6.3.1.2). That is a matter of display, and comes after
    rescaling to the modality's unit (PS3.3 C.11.1): a CT number stays what it is. Only values of no unit, whose
    brightness is all that they mean, are mirrored.
    """
    return header.photometric == "MONOCHROME1" and header.modality not in PHYSICAL_UNITS


def _no_pixels(headers: Headers) -> Iterator[Finding]:
    if empty := where(headers, lambda header: header.rows < 1 or header.columns < 1):
        yield refuse("no-pixels", f"{files(empty)} holds no image")


def _segmentation(headers: Headers) -> Iterator[Finding]:
    if headers[0].modality == "SEG" or headers[0].sop_class.startswith(_SEGMENTATIONS):
        yield refuse("segmentation", "a DICOM segmentation object, not an image")


def _truncated(headers: Headers) -> Iterator[Finding]:
    if cut := where(headers, lambda header: header.pixels is not None and header.pixels.is_cut):
        yield refuse("truncated", f"{files(cut)} ends before its pixels do; fetch it again")


def _multi_frame(headers: Headers) -> Iterator[Finding]:
    if whole := where(headers, lambda header: bool(header.frames_fault)):
        yield refuse("multi-frame", f"{files(whole)}: {whole[0].frames_fault}")


def _mosaic(headers: Headers) -> Iterator[Finding]:
    if mosaics := where(headers, lambda header: "MOSAIC" in header.image_type):
        yield refuse("mosaic", f"{files(mosaics)} holds many slices side by side in one picture")


def _colour(headers: Headers) -> Iterator[Finding]:
    grey = ("MONOCHROME1", "MONOCHROME2")
    if coloured := where(headers, lambda header: header.samples != 1 or header.photometric not in grey):
        kind = coloured[0].photometric or "no PhotometricInterpretation"
        yield refuse("colour", f"{files(coloured)} has {kind}; expected one grey value a pixel")
    elif painted := where(headers, lambda header: header.has_colours):
        yield refuse("colour", f"{files(painted)} has values that stand for colours of a palette (PixelPresentation)")


def _pixel_format(headers: Headers) -> Iterator[Finding]:
    def odd(header: Header) -> bool:
        usual = header.bits_allocated in (8, 16, 32) and 0 < header.bits_stored <= header.bits_allocated
        # Bytes in big-endian words lie in pairs the other way round (PS3.5 8.1.1).
        in_words = header.bits_allocated == 8 and header.pixels is not None and header.pixels.is_words
        return not usual or header.high_bit != header.bits_stored - 1 or in_words

    if strange := where(headers, odd):
        h = strange[0]
        yield refuse(
            "pixel-format",
            f"{files(strange)}: {h.bits_stored} bits stored of {h.bits_allocated} allocated, high bit {h.high_bit}",
        )


def _rescale(headers: Headers) -> Iterator[Finding]:
    if where(headers, lambda header: header.has_lookup_table):
        yield refuse("modality-lut", "values go through a lookup table (ModalityLUTSequence)")
    if broken := where(headers, lambda header: not header.slope or header.intercept is None):
        yield refuse("rescale", f"RescaleSlope or RescaleIntercept of {files(broken)} is zero or no number")
        return
    slopes = sorted({header.slope or 0.0 for header in headers})
    if len(slopes) > 1:
        yield mend("slice-rescale", f"slopes from {slopes[0]:g} to {slopes[-1]:g}, applied slice by slice")


def _padding(headers: Headers) -> Iterator[Finding]:
    padded = where(headers, lambda header: header.padding is not None)
    if not padded:
        return
    low, high = padded[0].padding or (0, 0)
    value = str(low) if low == high else f"{low} to {high}"
    if keeps_padding(padded[0]):
        yield mend("padding-kept", f"PixelPaddingValue {value} lies among measured CT numbers; values kept")
    else:
        background = background_of(padded[0].modality)
        yield mend("padding", f"PixelPaddingValue {value} becomes the background {background:g}")


def _inverted(headers: Headers) -> Iterator[Finding]:
    shown = where(headers, lambda header: header.photometric == "MONOCHROME1")
    if not shown:
        return
    if is_inverted(shown[0]):
        yield mend("monochrome1", f"{files(shown)} shows low values bright; stored values were mirrored")
    else:
        yield mend("monochrome1", f"{files(shown)} shows low values bright; values are measurements and were kept")


def _private_scaling(headers: Headers) -> Iterator[Finding]:
    if scaled := where(headers, lambda header: header.has_private_scaling):
        yield mend(
            "private-scaling",
            f"{files(scaled)} has a private scale too (2005,100E); the standard RescaleSlope alone was applied",
        )


def _transfer_syntax(headers: Headers) -> Iterator[Finding]:
    for uid in distinct(headers, lambda header: header.transfer_syntax):
        if uid not in (*NATIVE_SYNTAXES, *ENCAPSULATED_SYNTAXES):
            yield refuse("transfer-syntax", f"no decoder for {syntax_name(uid)}; decompress the files")
    if odd := where(headers, _is_packed_wrong):
        name = syntax_name(odd[0].transfer_syntax)
        yield refuse("transfer-syntax", f"{files(odd)} names {name}, but its pixel data are not stored so")
    if lossy := where(headers, lambda header: header.is_lossy or header.transfer_syntax in LOSSY_SYNTAXES):
        yield mend(
            "lossy", f"{files(lossy)}: lossy compression has changed values; they are not quite what was measured"
        )


def _is_packed_wrong(header: Header) -> bool:
    """Whether pixels are encapsulated where the transfer syntax says that they are not, or the other way round."""
    is_native = header.transfer_syntax in NATIVE_SYNTAXES
    return header.pixels is not None and (header.pixels.fragments is None) != is_native


def syntax_name(uid: str) -> str:
    """What a transfer syntax is called, and its identifier."""
    with quiet_pydicom():
        name = UID(uid).name
    return f"{name} ({uid})" if name != uid else uid or "no transfer syntax"


def _size(headers: Headers) -> Iterator[Finding]:
    voxels = sum(header.rows * header.columns for header in headers)
    if voxels > MAX_VOXELS:
        yield refuse("too-large", f"{voxels} voxels, more than {MAX_VOXELS}; are the headers damaged?")
    if bare := where(headers, lambda header: header.pixels is None):
        yield refuse("no-pixel-data", f"{files(bare)} promises an image and holds no whole numbers for it")
    if short := where(headers, _holds_less):
        yield refuse("truncated", f"{files(short)} holds fewer pixels than its header promises; fetch it again")


def _holds_less(header: Header) -> bool:
    """Whether the pixel data are fewer than the header promises."""
    if header.pixels is None:
        return False
    if header.pixels.fragments is not None:
        return header.pixels.fragments < header.frames
    return header.pixels.length < header.frames * header.rows * header.columns * header.bits_allocated // 8


_Check = Callable[[Headers], Iterator[Finding]]
_KIND_CHECKS: tuple[_Check, ...] = (_no_pixels, _segmentation, _truncated, _multi_frame, _mosaic, _colour)
_PIXEL_CHECKS: tuple[_Check, ...] = (
    *(_pixel_format, _rescale, _private_scaling, _inverted, _padding),
    *(_transfer_syntax, _size),
)
