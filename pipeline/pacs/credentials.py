"""Who we are to an archive, and whom we trust: from a file that only its owner can read, or from the keyring."""

from __future__ import annotations

import os
import re
import ssl
import stat
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from pipeline.errors import PacsError
from pipeline.pacs.node import Node


class Credentials(BaseModel):
    """What a credentials file may hold; secrets show as stars wherever they are printed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    username: str | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None
    """Bearer token, for DICOMweb."""
    ca_file: Path | None = None
    """PEM certificates of the authorities to trust, instead of those that come with volseg."""
    certificate: Path | None = None
    """Our own certificate, PEM, for archives that ask for one."""
    key: Path | None = None
    """Private key of `certificate`, PEM, not encrypted."""
    allow_unencrypted: bool = False
    """Send the password or token although the address has no TLS."""

    @property
    def has_secret(self) -> bool:
        """Whether anything here must not be overheard."""
        return self.password is not None or self.token is not None


def read_credentials(path: Path) -> Credentials:
    """The credentials in a TOML file; paths in it start from its folder.

    Raises:
        PacsError: the file is missing, open to others, or holds something else. No value of it is quoted.
    """
    try:
        with path.open("rb") as stream:
            _refuse_open_file(path, stream.fileno())
            values = tomllib.load(stream)
    except OSError as error:
        raise PacsError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        place = re.search(r"\(at line \d+, column \d+\)", str(error))
        raise PacsError(f'{path}: not TOML {place[0] if place else ""}; expected lines as username = "name"') from None
    try:
        found = Credentials.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        known = ", ".join(Credentials.model_fields)
        key = ".".join(map(str, first["loc"]))
        raise PacsError(f"{path}: {key}: {first['msg'].lower()}; the keys are {known}") from None
    files = {name: path.parent / value for name in ("ca_file", "certificate", "key") if (value := getattr(found, name))}
    _check(found, files, path)
    return found.model_copy(update=files)


def with_keyring(credentials: Credentials, node: Node, user: str) -> Credentials:
    """`credentials` with the password that the keyring holds for `user` under volseg:HOST:PORT.

    Raises:
        PacsError: there is none, or no keyring.
    """
    import keyring
    from keyring.errors import KeyringError

    if credentials.has_secret:
        raise PacsError("the credentials file holds a secret as well; take it out, or leave --keyring out")
    service = f"volseg:{node.authority}"
    try:
        password = keyring.get_password(service, user)
    except KeyringError as error:
        raise PacsError(
            f"the keyring cannot be read ({type(error).__name__}); unlock it, or give --credentials FILE"
        ) from None
    if password is None:
        raise PacsError(f"the keyring has no password for this user under {service}; run: keyring set {service} USER")
    return credentials.model_copy(update={"username": user, "password": SecretStr(password)})


def check_fit(credentials: Credentials, node: Node) -> None:
    """Refuse credentials that this node cannot use, or that would travel in the open.

    Raises:
        PacsError: as said.
    """
    if node.protocol == "dimse" and credentials.token is not None:
        raise PacsError("a bearer token is for DICOMweb; DIMSE takes username and password, or a certificate")
    if credentials.has_secret and not (node.tls or node.is_loopback or credentials.allow_unencrypted):
        raise PacsError(
            f"{node}: the password would travel unencrypted; use the address with TLS ({node.protocol}s://), "
            "or write allow_unencrypted = true into the credentials file"
        )


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """For DIMSE over TLS: the archive's certificate and name are always checked.

    Raises:
        PacsError: a certificate or key cannot be used.
    """
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    try:
        context = ssl.create_default_context(cafile=str(credentials.ca_file or DEFAULT_CA_BUNDLE_PATH))
        _load_own_certificate(context, credentials)
    except (ssl.SSLError, OSError):
        raise PacsError(
            "the CA file, certificate or key of the credentials file cannot be used; expected PEM"
        ) from None
    return context


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """For receiving over TLS, with our own certificate; the archive must show one of an authority that we trust.

    Raises:
        PacsError: there is no certificate, or it cannot be used.
    """
    if credentials.certificate is None:
        raise PacsError("C-MOVE over TLS needs a certificate of ours: certificate and key in the credentials file")
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_verify_locations(cafile=credentials.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
        _load_own_certificate(context, credentials)
    except (ssl.SSLError, OSError, TypeError):
        raise PacsError(
            "the CA file, certificate or key of the credentials file cannot be used; expected PEM"
        ) from None
    return context


def _load_own_certificate(context: ssl.SSLContext, credentials: Credentials) -> None:
    if credentials.certificate is not None:
        # An empty passphrase: an encrypted key fails instead of asking on the terminal.
        context.load_cert_chain(credentials.certificate, credentials.key, password="")


def _refuse_open_file(path: Path, descriptor: int) -> None:
    if os.name == "posix" and stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
        raise PacsError(f"{path}: others on this machine can read or change it; run: chmod 600 {path}")


def _check(found: Credentials, files: dict[str, Path], path: Path) -> None:
    for name, file in files.items():
        if not file.is_file():
            raise PacsError(f"{path}: {name}: there is no file {file}")
    if (found.username is None) != (found.password is None):
        raise PacsError(f"{path}: username and password go together; leave both out for --keyring or a token")
    if found.password is not None and found.token is not None:
        raise PacsError(f"{path}: either username and password, or a token")
    if found.key is not None and found.certificate is None:
        raise PacsError(f"{path}: key without certificate")
