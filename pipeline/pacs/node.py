"""The address of an archive: dicomweb://HOST:PORT/PATH, dicomwebs://, dimse://CALLED_AET@HOST:PORT, dimses://."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from pipeline.errors import PacsError

FORMS = (
    "dicomweb://HOST:PORT/PATH, dicomwebs://HOST/PATH, dimse://CALLED_AET@HOST:PORT or dimses://CALLED_AET@HOST:PORT"
)
_SCHEME = re.compile(r"(dicomwebs?|dimses?):/", re.IGNORECASE)
_UID = re.compile(r"[0-9.]{1,64}")
_AET_LENGTH = 16


@dataclass(frozen=True)
class Node:
    """Where an archive listens and what it speaks; no secret is ever part of it."""

    protocol: Literal["dicomweb", "dimse"]
    tls: bool
    host: str
    port: int
    path: str = ""
    """Of the DICOMweb service, as /dicom-web; empty for DIMSE."""
    called_aet: str = ""
    """The archive's application entity title; empty for DICOMweb."""

    def __str__(self) -> str:
        title = f"{self.called_aet}@" if self.called_aet else ""
        return f"{self.protocol}{'s' if self.tls else ''}://{title}{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        """Host and port as they stand in an address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Of the DICOMweb service."""
        return f"http{'s' if self.tls else ''}://{self.authority}{self.path}"

    @property
    def key(self) -> str:
        """A short name of this node for files that belong to it."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    @property
    def is_loopback(self) -> bool:
        """Whether what is sent stays on this machine."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def is_node(text: str) -> bool:
    """Whether `text` is meant as the address of an archive, not as a path."""
    return _SCHEME.match(text) is not None


def parse_node(text: str) -> Node:
    """The node that an address names.

    Raises:
        PacsError: it is none, or holds a user name or password.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.lower() not in ("dicomweb", "dicomwebs", "dimse", "dimses"):
        raise PacsError(f"the address of an archive is {FORMS}")
    protocol: Literal["dicomweb", "dimse"] = "dicomweb" if scheme.lower().startswith("dicomweb") else "dimse"
    _refuse_secrets(rest, protocol)
    try:
        # Parsed as http, which knows user, host, port and path; the schemes here are unknown to the parser.
        parts = urlsplit(f"http://{rest}")
        port = parts.port
    except ValueError:
        raise PacsError(f"{text}: the host or port cannot be read; expected {FORMS}") from None
    if not parts.hostname or port == 0:
        raise PacsError(f"{text}: no host, or port 0; expected {FORMS}")
    if parts.query or parts.fragment:
        raise PacsError(f"{text}: nothing may follow the path; expected {FORMS}")
    tls = scheme.lower().endswith("s")
    if protocol == "dicomweb":
        return _dicomweb(text, parts, port=port, tls=tls)
    return _dimse(text, parts, port=port, tls=tls)


def check_uid(text: str, what: str) -> str:
    """`text`, which is a DICOM UID (PS3.5 section 9); UIDs become parts of paths and addresses here.

    Raises:
        PacsError: it is none.
    """
    if not _UID.fullmatch(text):
        raise PacsError(f"{what}: a UID is made of digits and dots, 64 at most, as 1.2.840.113619.2.5")
    return text


def check_aet(text: str, what: str) -> str:
    """`text`, which is an application entity title (PS3.5 section 6.2, AE).

    Raises:
        PacsError: it is none.
    """
    if not text.strip() or len(text) > _AET_LENGTH or not text.isascii() or not text.isprintable() or "\\" in text:
        raise PacsError(f"{what}: an AE title has 1 to {_AET_LENGTH} ASCII characters and no backslash")
    return text.strip()


def _refuse_secrets(rest: str, protocol: str) -> None:
    """What stands before @ may be a secret, so the message quotes nothing."""
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and (protocol == "dicomweb" or ":" in user):
        raise PacsError(
            "the address holds a user name or password: others would see it in the list of processes and it would "
            "stay in the shell's history; leave it out and give --credentials FILE or --keyring USER"
        )


def _dicomweb(text: str, parts: SplitResult, *, port: int | None, tls: bool) -> Node:
    host = parts.hostname or ""
    if ":" in host:
        raise PacsError(f"{text}: a DICOMweb address wants a host name or an IPv4 address")
    if not re.fullmatch(r"[/\w.~%-]*", parts.path):
        raise PacsError(f"{text}: the path holds characters that no address of a service has")
    return Node("dicomweb", tls, host, port or (443 if tls else 80), path=parts.path.rstrip("/"))


def _dimse(text: str, parts: SplitResult, *, port: int | None, tls: bool) -> Node:
    if not parts.username:
        raise PacsError(f"{text}: the archive's AE title is missing; expected dimse://CALLED_AET@HOST:PORT")
    if port is None:
        raise PacsError(f"{text}: the port is missing; expected dimse://CALLED_AET@HOST:PORT, often 104 or 11112")
    if parts.path.strip("/"):
        raise PacsError(f"{text}: DIMSE has no path; expected dimse://CALLED_AET@HOST:PORT")
    title = check_aet(unquote(parts.username), f"{text}: the part before @")
    return Node("dimse", tls, parts.hostname or "", port, called_aet=title)
