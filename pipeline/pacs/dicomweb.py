"""An archive over DICOMweb (PS3.18: QIDO-RS, WADO-RS, STOW-RS), through dicomweb-client."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from socket import gaierror
from typing import TYPE_CHECKING, Any, cast

import requests
from dicomweb_client.api import DICOMwebClient
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from requests.auth import HTTPBasicAuth

from pipeline.errors import PacsError
from pipeline.pacs.archive import (
    SERIES_KEYWORDS,
    STUDY_KEYWORDS,
    Access,
    Archive,
    Instance,
    Keep,
    Level,
    Match,
    Outcome,
    Unreachable,
    row_of,
)

if TYPE_CHECKING:
    from pipeline.pacs.credentials import Credentials
    from pipeline.pacs.node import Node

PAGE = 500
"""Rows asked for at a time; an archive may give fewer."""

_PASSING = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}
# PS3.18 table I.2.2-2 and PS3.4 table B.2-1.
_FAILURES = {
    0x0110: "processing failure",
    0x0111: "duplicate",
    0x0117: "invalid instance",
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    0xA700: "out of resources",
    0xA900: "the data set does not match its SOP class",
    0xC000: "cannot be understood",
    0xC122: "transfer syntax not supported",
}


class _DicomWeb:
    """`Archive` over HTTP; see there."""

    def __init__(self, access: Access, session: requests.Session) -> None:
        self._access = access
        patience = access.patience
        self._client = DICOMwebClient(
            access.node.url, session=session, permissive_uid=True, timeout=(patience.connect_s, patience.answer_s)
        )
        # Its own retries would send a streamed body a second time as an empty one; ours are in `Effort`.
        self._client.set_http_retry_params(retry=False)
        # It names the host without the port, which is another service to a server of several.
        self._client.host = access.node.authority

    def echo(self) -> None:
        with self._errors("the DICOMweb service"):
            self._client.search_for_studies(limit=1)

    def find(self, level: Level, matching: Mapping[str, str]) -> list[Match]:
        if level == "STUDY":
            return self._pages("StudyInstanceUID", STUDY_KEYWORDS, matching, self._client.search_for_studies)
        filters = {key: value for key, value in matching.items() if key != "StudyInstanceUID"}

        def search(**page: Any) -> list[dict[str, Any]]:
            return self._client.search_for_series(matching["StudyInstanceUID"], **page)

        return self._pages("SeriesInstanceUID", SERIES_KEYWORDS, filters, search)

    def instances(self, study_uid: str, series_uid: str) -> dict[str, str]:
        def search(**page: Any) -> list[dict[str, Any]]:
            return self._client.search_for_instances(study_uid, series_uid, **page)

        rows = self._pages("SOPInstanceUID", ("SOPInstanceUID", "SOPClassUID"), {}, search)
        return {row["SOPInstanceUID"]: row["SOPClassUID"] for row in rows}

    def retrieve(self, study_uid: str, series_uid: str, wanted: Mapping[str, str], keep: Keep) -> None:
        for uid in wanted:
            with self._errors("an instance that it listed"):
                dataset = self._client.retrieve_instance(study_uid, series_uid, uid)
            keep(uid, _writer(dataset))

    def store(self, batch: Sequence[Instance]) -> Iterator[Outcome]:
        readable = list(batch)
        while readable:
            reading: list[Instance] = []
            try:
                answer = self._store(readable, reading)
            except _Unreadable as unreadable:
                yield Outcome(unreadable.instance, False, "the file cannot be read or encoded")
                readable.remove(unreadable.instance)
            else:
                yield from _outcomes(readable, answer)
                return

    def _store(self, batch: Sequence[Instance], reading: list[Instance]) -> Dataset:
        def datasets() -> Iterator[Dataset]:
            # Read one by one while the body is made: the batch is held once, as bytes.
            for instance in batch:
                reading[:] = [instance]
                yield dcmread(instance.path)
            reading.clear()

        try:
            with self._errors("the service for storing (STOW)"):
                return self._client.store_instances(cast(Sequence[Dataset], datasets()))
        except _Refused as refused:
            return refused.answer
        except (PacsError, InvalidDicomError) as error:
            if reading:
                raise _Unreadable(reading[0]) from error
            raise

    def _pages(
        self,
        key: str,
        keywords: Sequence[str],
        matching: Mapping[str, str],
        search: Callable[..., list[dict[str, Any]]],
    ) -> list[Match]:
        """All rows, by pages; ends with a page that brings nothing new, as of a server that knows no offset."""
        rows: dict[str, Match] = {}
        while True:
            with self._errors("such a study or series"):
                page = search(limit=PAGE, offset=len(rows), fields=list(keywords), search_filters=dict(matching))
                found = [row_of(Dataset.from_json(item), keywords) for item in page]
            new = {row[key]: row for row in found if row[key] and row[key] not in rows}
            if not new:
                return list(rows.values())
            rows.update(new)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """One line for whatever goes wrong inside. Exceptions' own words quote addresses and queries: left out."""
        node = self._access.node
        try:
            yield
        except requests.HTTPError as error:
            raise _explain_status(error.response, self._access, what) from None
        except requests.TooManyRedirects:
            raise PacsError(f"{node}: the archive sends us to another address; give that one") from None
        except requests.ConnectTimeout:
            raise Unreachable(f"{node}: no connection within {self._access.patience.connect_s:g} s") from None
        except requests.Timeout:
            raise Unreachable(f"{node}: no answer within {self._access.patience.answer_s:g} s") from None
        except requests.RequestException as error:
            # A JSON text that cannot be read is one of them, and a ValueError.
            if not isinstance(error, requests.exceptions.JSONDecodeError):
                raise _explain_connection(error, self._access) from None
            raise _foreign(node, error) from None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            # ValueError holds multipart that cannot be read, and pydicom's own errors.
            raise _foreign(node, error) from None


def _foreign(node: Node, error: Exception) -> PacsError:
    return PacsError(
        f"{node}: the answer is not what a DICOMweb service gives ({type(error).__name__}); check the path"
    )


class _Refused(PacsError):
    """STOW's answer to a batch of which nothing, or not everything, was stored."""

    def __init__(self, answer: Dataset) -> None:
        super().__init__("the archive did not store the instances")
        self.answer = answer


class _Unreadable(Exception):
    """A file of a batch that cannot be made into a part of the request."""

    def __init__(self, instance: Instance) -> None:
        super().__init__("a file cannot be read or encoded")
        self.instance = instance


@contextmanager
def open_dicomweb(access: Access) -> Iterator[Archive]:
    """The archive behind a DICOMweb address; connections are kept open until the end."""
    with requests.Session() as session:
        # Nothing from the environment: neither proxies nor .netrc nor other authorities.
        session.trust_env = False
        session.max_redirects = 0
        session.headers["Accept"] = "application/dicom+json"
        _authenticate(session, access.credentials)
        yield _DicomWeb(access, session)


def _authenticate(session: requests.Session, credentials: Credentials) -> None:
    if credentials.ca_file is not None:
        session.verify = str(credentials.ca_file)
    if credentials.certificate is not None:
        certificate = str(credentials.certificate)
        session.cert = certificate if credentials.key is None else (certificate, str(credentials.key))
    if credentials.token is not None:
        session.headers["Authorization"] = f"Bearer {credentials.token.get_secret_value()}"
    elif credentials.username is not None and credentials.password is not None:
        secret = credentials.password.get_secret_value().encode()
        session.auth = HTTPBasicAuth(credentials.username.encode(), secret)


def _writer(dataset: Dataset) -> Callable[[Path], None]:
    # What was read is written as it came: elements that nobody looked at stay bytes.
    return lambda path: dcmwrite(path, dataset, enforce_file_format=True)


def _outcomes(batch: Sequence[Instance], answer: Dataset) -> Iterator[Outcome]:
    stored = {str(item.get("ReferencedSOPInstanceUID")) for item in answer.get("ReferencedSOPSequence") or ()}
    # Empty on success with Orthanc, absent with others.
    failed = {
        str(item.get("ReferencedSOPInstanceUID")): int(item.get("FailureReason") or 0)
        for item in answer.get("FailedSOPSequence") or ()
    }
    for instance in batch:
        uid = instance.sop_instance_uid
        if uid in failed:
            yield Outcome(instance, False, _failure(failed[uid]))
        elif uid in stored:
            yield Outcome(instance, True, "0x0000")


def _failure(code: int) -> str:
    near = code if code in _FAILURES else code & 0xFF00
    return f"status 0x{code:04X}" + (f", {_FAILURES[near]}" if near in _FAILURES else "")


def _explain_status(response: requests.Response | None, access: Access, what: str) -> PacsError:
    node = access.node
    if response is None:
        return PacsError(f"{node}: the archive answered with an error")
    status = response.status_code
    answer = _dicom_answer(response)
    if answer is not None:
        return _Refused(answer)
    if status == HTTPStatus.UNAUTHORIZED:
        given = "does not accept the credentials" if access.credentials.has_secret else "wants credentials"
        return PacsError(f"{node}: the archive {given} (HTTP 401); see --credentials and --keyring")
    if status == HTTPStatus.FORBIDDEN:
        return PacsError(f"{node}: the archive does not allow this to us (HTTP 403)")
    if status == HTTPStatus.NOT_FOUND:
        return PacsError(f"{node}: the archive does not have {what} (HTTP 404); check the path of the address")
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return PacsError(f"{node}: a request is too large for the archive (HTTP 413); give a smaller --batch-mb")
    if status in _PASSING:
        return Unreachable(f"{node}: the archive is busy or away (HTTP {status})")
    return PacsError(f"{node}: the archive answered HTTP {status} to a request for {what}")


def _dicom_answer(response: requests.Response) -> Dataset | None:
    """STOW tells of single failures in the body of 409 (PS3.18 section 10.5.3)."""
    if response.request.method != "POST" or "json" not in response.headers.get("Content-Type", ""):
        return None
    try:
        content = json.loads(response.content)
        answer = Dataset.from_json(content[0] if isinstance(content, list) else content)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return answer if answer.get("FailedSOPSequence") else None


def _explain_connection(error: requests.RequestException, access: Access) -> PacsError:
    node = access.node
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return PacsError(
                f"{node}: the archive's certificate is not trusted ({cause.verify_message}); name its authority as "
                "ca_file in the credentials file"
            )
    if any(isinstance(cause, requests.exceptions.SSLError | ssl.SSLError) for cause in causes):
        return PacsError(f"{node}: no TLS connection came about; does the archive speak TLS at this port?")
    if any(isinstance(cause, gaierror) for cause in causes):
        return PacsError(f"{node}: no such host")
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return Unreachable(f"{node}: connection refused; is the archive running, and is the port right?")
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
        return PacsError(f"{node}: not an address that can be reached")
    return Unreachable(f"{node}: the archive broke the connection off")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an exception wraps: urllib3 keeps causes among the arguments as well."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        linked = [current.__cause__, current.__context__, getattr(current, "reason", None), *current.args]
        waiting += [item for item in linked if isinstance(item, BaseException)]
