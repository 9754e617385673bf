"""An archive over DIMSE: C-ECHO, C-FIND and C-STORE, through pynetdicom; C-GET and C-MOVE are in dimse_retrieve."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)
from pynetdicom.status import (
    GENERAL_STATUS,
    QR_FIND_SERVICE_CLASS_STATUS,
    STATUS_SUCCESS,
    STATUS_WARNING,
    STORAGE_SERVICE_CLASS_STATUS,
    code_to_category,
)

from pipeline.errors import PacsError
from pipeline.pacs.archive import (
    SERIES_KEYWORDS,
    STUDY_KEYWORDS,
    Access,
    Instance,
    Keep,
    Level,
    Match,
    NotOffered,
    Outcome,
    Unreachable,
    row_of,
)
from pipeline.pacs.dimse_association import BrokeOff, associated, in_words, silence
from pipeline.pacs.dimse_retrieve import get, move

_PENDING = (0xFF00, 0xFF01)
_NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
_MOST_KINDS = 60
"""SOP class and transfer syntax: two contexts each, and an association has at most 128 (PS3.8 section 9.3.2)."""


class Dimse:
    """`Archive` over DIMSE; see there. Each request has an association of its own."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._gets = True

    def echo(self) -> None:
        with associated(self._access, [build_context(Verification)]) as association:
            _need(association, Verification, self._access, "C-ECHO")
            started_s = time.monotonic()
            status = association.send_c_echo()
            if "Status" not in status:
                raise silence(self._access, started_s)
            if status.Status != 0:
                raise PacsError(f"{self._access.node}: C-ECHO: {in_words(status, GENERAL_STATUS)}")

    def find(self, level: Level, matching: Mapping[str, str]) -> list[Match]:
        keywords = STUDY_KEYWORDS if level == "STUDY" else SERIES_KEYWORDS
        return self._find(level, keywords, matching)

    def instances(self, study_uid: str, series_uid: str) -> dict[str, str]:
        parents = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid}
        rows = self._find("IMAGE", ("SOPInstanceUID", "SOPClassUID", *parents), parents)
        return {row["SOPInstanceUID"]: row["SOPClassUID"] for row in rows if row["SOPInstanceUID"]}

    def retrieve(self, study_uid: str, series_uid: str, wanted: Mapping[str, str], keep: Keep) -> None:
        if self._gets:
            try:
                return get(self._access, (study_uid, series_uid), wanted, keep)
            except (NotOffered, BrokeOff):
                if self._access.receive_port is None:
                    raise
                self._gets = False
        return move(self._access, (study_uid, series_uid), wanted, keep)

    def store(self, batch: Sequence[Instance]) -> Iterator[Outcome]:
        kinds = sorted({(instance.sop_class_uid, instance.transfer_syntax_uid) for instance in batch})
        for start in range(0, len(kinds), _MOST_KINDS):
            part = kinds[start : start + _MOST_KINDS]
            yield from self._store(
                [item for item in batch if (item.sop_class_uid, item.transfer_syntax_uid) in part], part
            )

    def _store(self, batch: Sequence[Instance], kinds: Sequence[tuple[str, str]]) -> Iterator[Outcome]:
        try:
            yield from self._store_associated(batch, kinds)
        except NotOffered:
            for instance in batch:
                yield Outcome(instance, False, _not_taken(instance))

    def _store_associated(self, batch: Sequence[Instance], kinds: Sequence[tuple[str, str]]) -> Iterator[Outcome]:
        contexts = _contexts(kinds)
        with associated(self._access, contexts) as association:
            for number, instance in enumerate(batch, start=1):
                try:
                    what = _sendable(association, instance)
                except _NotSendable as reason:
                    yield Outcome(instance, False, str(reason))
                    continue
                started_s = time.monotonic()
                try:
                    status = association.send_c_store(what, msg_id=number % 65535 or 1)
                except (ValueError, AttributeError, TypeError):
                    yield Outcome(instance, False, "the file cannot be read or encoded")
                    continue
                except RuntimeError:
                    raise Unreachable(f"{self._access.node}: the archive broke the association off") from None
                if "Status" not in status:
                    raise silence(self._access, started_s)
                arrived = code_to_category(int(status.Status)) in (STATUS_SUCCESS, STATUS_WARNING)
                yield Outcome(instance, arrived, in_words(status, STORAGE_SERVICE_CLASS_STATUS))

    def _find(self, level: str, keywords: Sequence[str], matching: Mapping[str, str]) -> list[Match]:
        model = StudyRootQueryRetrieveInformationModelFind
        query = _query(level, keywords, matching)
        rows: list[Match] = []
        with associated(self._access, [build_context(model)]) as association:
            _need(association, model, self._access, "C-FIND")
            started_s = time.monotonic()
            for status, found in association.send_c_find(query, model):
                if "Status" not in status:
                    raise silence(self._access, started_s)
                started_s = time.monotonic()
                if status.Status in _PENDING and found is not None:
                    rows.append(row_of(found, keywords))
                elif status.Status in _PENDING:
                    raise PacsError(f"{self._access.node}: C-FIND: an answer cannot be read")
                elif status.Status != 0:
                    words = in_words(status, QR_FIND_SERVICE_CLASS_STATUS)
                    raise PacsError(f"{self._access.node}: C-FIND: {words}")
        return rows


def _query(level: str, keywords: Sequence[str], matching: Mapping[str, str]) -> Dataset:
    query = Dataset()
    query.QueryRetrieveLevel = level
    if not all(value.isascii() for value in matching.values()):
        query.SpecificCharacterSet = "ISO_IR 192"
    for keyword in keywords:
        setattr(query, keyword, None if keyword.startswith("NumberOf") else "")
    for keyword, value in matching.items():
        setattr(query, keyword, value)
    return query


def _need(association: Association, sop_class: UID, access: Access, service: str) -> None:
    if sop_class not in [context.abstract_syntax for context in association.accepted_contexts]:
        raise NotOffered(f"{access.node}: the archive offers no {service} to us, {access.aet} (--aet)")


def _contexts(kinds: Sequence[tuple[str, str]]) -> list[PresentationContext]:
    """For each SOP class its files' own transfer syntaxes, one a context so that each is answered for itself.

    And uncompressed ones beside them, for an archive that takes nothing else.
    """
    own = [(sop_class, (syntax,)) for sop_class, syntax in kinds]
    native = [(sop_class, tuple(map(str, _NATIVE))) for sop_class, _ in kinds]
    return [build_context(sop_class, list(syntaxes)) for sop_class, syntaxes in dict.fromkeys([*own, *native])]


class _NotSendable(Exception):
    """Why an instance cannot be sent over this association, in words."""


def _sendable(association: Association, instance: Instance) -> Path | Dataset:
    """What to send of an instance: its file as it is, or its data set for a transfer syntax that was accepted."""
    accepted = {
        str(context.transfer_syntax[0])
        for context in association.accepted_contexts
        if context.abstract_syntax == instance.sop_class_uid
    }
    if instance.transfer_syntax_uid in accepted:
        return instance.path
    if not accepted:
        raise _NotSendable(_not_taken(instance))
    syntax = UID(instance.transfer_syntax_uid)
    if not accepted & set(_NATIVE) or syntax == ExplicitVRBigEndian:
        raise _NotSendable(f"the archive does not take this transfer syntax ({syntax.name})")
    return _native(instance.path, syntax)


def _not_taken(instance: Instance) -> str:
    return f"the archive does not take this SOP class ({UID(instance.sop_class_uid).name})"


def _native(path: Path, syntax: UID) -> Dataset:
    """The data set uncompressed; the library changes between explicit and implicit VR by itself."""
    try:
        dataset = dcmread(path)
        if syntax.is_deflated:
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        elif syntax.is_compressed:
            dataset.decompress(generate_instance_uid=False)
    except Exception as error:  # Decoders raise what they like, and their words may quote the file.
        raise _NotSendable(f"the archive wants it uncompressed, and it cannot be decoded ({syntax.name})") from error
    return dataset
