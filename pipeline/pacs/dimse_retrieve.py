"""Fetching over DIMSE: C-GET, or C-MOVE into a storage service of our own (PS3.4 annex C)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
from pynetdicom.status import GENERAL_STATUS

from pipeline.errors import PacsError
from pipeline.pacs.archive import Access, Keep, NotOffered
from pipeline.pacs.credentials import server_context
from pipeline.pacs.dimse_association import BrokeOff, associated, in_words, silence

_PENDING = (0xFF00, 0xFF01)
_SUCCESS = 0x0000
_SOME_FAILED = 0xB000
_CANNOT_STORE = 0xA700
_MOST_CLASSES = 7
_MOST_UIDS = 100
"""Named in one request, where only a part of a series is wanted."""

# What `transforms` can decode; each is proposed by itself, so that the archive need not convert anything.
_SYNTAXES = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    JPEG2000,
    HTJ2KLossless,
    RLELossless,
]
# PS3.4 tables C.4-2 and C.4-3.
_WORDS = {
    **GENERAL_STATUS,
    0xA701: ("", "out of resources: cannot count matches"),
    0xA702: ("", "out of resources: cannot send"),
    0xA801: ("", "the archive does not know the AE title to send to"),
    0xA900: ("", "the request does not match its SOP class"),
}


def get(access: Access, series: tuple[str, str], wanted: Mapping[str, str], keep: Keep) -> None:
    """Fetch over the association that asks (C-GET).

    Raises:
        NotOffered: the archive has no C-GET for us.
    """
    model = StudyRootQueryRetrieveInformationModelGet
    for request, classes in _requests(series, wanted):
        store = _Store(keep, wanted)
        contexts = [build_context(model)]
        contexts += [build_context(sop_class, syntax) for sop_class in classes for syntax in _SYNTAXES]
        roles = [build_role(sop_class, scp_role=True) for sop_class in classes]
        handlers = [(evt.EVT_C_STORE, store)]
        with associated(access, contexts, roles=roles, handlers=handlers) as association:
            if model not in [context.abstract_syntax for context in association.accepted_contexts]:
                raise NotOffered(
                    f"{access.node}: the archive offers no C-GET; for C-MOVE, have it know our AE title {access.aet} "
                    "with this machine and a port, and give that port as --receive-port"
                )
            try:
                _follow(access, association.send_c_get(request, model), store, "C-GET")
            except BrokeOff as error:
                # Orthanc does not answer a C-GET that it does not allow, but breaks off.
                if store.kept_count:
                    raise
                raise BrokeOff(f"{error}; if it does not allow C-GET, have it send to us: --receive-port") from error


def move(access: Access, series: tuple[str, str], wanted: Mapping[str, str], keep: Keep) -> None:
    """Have the archive send to our own storage service (C-MOVE), which listens only meanwhile."""
    model = StudyRootQueryRetrieveInformationModelMove
    store = _Store(keep, wanted)
    with associated(access, [build_context(model)]) as association:
        if model not in [context.abstract_syntax for context in association.accepted_contexts]:
            raise NotOffered(f"{access.node}: the archive offers neither C-GET nor C-MOVE to us, {access.aet} (--aet)")
        server = _listen(access, {sop_class for sop_class in wanted.values() if sop_class}, store)
        try:
            for request, _ in _requests(series, wanted):
                _follow(access, association.send_c_move(request, access.aet, model), store, "C-MOVE")
        finally:
            server.shutdown()


class _Store:
    """Answers each C-STORE by keeping the instance; the first trouble of our own is kept to be told."""

    def __init__(self, keep: Keep, wanted: Mapping[str, str]) -> None:
        self._keep = keep
        self._wanted = wanted
        self.trouble: Exception | None = None
        self.kept_count = 0

    def __call__(self, event: evt.Event) -> int:
        if self.trouble is not None:
            return _CANNOT_STORE
        request: Any = event.request
        uid = str(request.AffectedSOPInstanceUID)
        if uid not in self._wanted:
            return _SUCCESS  # Nobody asked for it, so it is not written, and no fault of the archive's request.
        try:
            self._keep(uid, _writer(event))
        except Exception as error:  # Raised again in the thread that waits for the answers.
            self.trouble = error
            return _CANNOT_STORE
        self.kept_count += 1
        return _SUCCESS


def _writer(event: evt.Event) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(event.encoded_dataset())

    return write


def _requests(series: tuple[str, str], wanted: Mapping[str, str]) -> Iterator[tuple[Dataset, list[UID]]]:
    """Requests by a hundred instances, with the SOP classes to expect."""
    uids = sorted(wanted, key=lambda uid: wanted[uid])
    for start in range(0, len(uids), _MOST_UIDS):
        part = uids[start : start + _MOST_UIDS]
        request = Dataset()
        request.QueryRetrieveLevel = "IMAGE"
        request.StudyInstanceUID, request.SeriesInstanceUID = series
        request.SOPInstanceUID = part
        classes = sorted({wanted[uid] for uid in part if wanted[uid]})
        yield request, [UID(sop_class) for sop_class in classes[:_MOST_CLASSES]]


def _follow(access: Access, answers: Iterator[tuple[Dataset, Any]], store: _Store, service: str) -> None:
    started_s = time.monotonic()
    for status, _ in answers:
        if store.trouble is not None:
            raise store.trouble
        if "Status" not in status:
            raise silence(access, started_s)
        started_s = time.monotonic()
        # Failed sub-operations are found by what is missing in the end.
        if status.Status not in (*_PENDING, _SUCCESS, _SOME_FAILED):
            raise PacsError(f"{access.node}: {service}: {in_words(status, _WORDS)}")


def _listen(access: Access, classes: set[str], store: _Store) -> Any:
    if access.receive_port is None:
        raise PacsError("C-MOVE needs --receive-port")
    entity = AE(ae_title=access.aet)
    entity.network_timeout = entity.acse_timeout = entity.dimse_timeout = access.patience.answer_s
    entity.require_called_aet = True
    entity.require_calling_aet = []
    for sop_class in classes:
        entity.add_supported_context(sop_class, _SYNTAXES)
    try:
        return entity.start_server(
            ("", access.receive_port),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, store)],
            ssl_context=server_context(access.credentials) if access.node.tls else None,
        )
    except OSError as error:
        reason = (error.strerror or "not possible").lower()
        raise PacsError(f"cannot listen at port {access.receive_port} (--receive-port): {reason}") from None
