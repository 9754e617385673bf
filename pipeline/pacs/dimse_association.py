"""Associations with an archive (PS3.8, PS3.7), through pynetdicom, and what to say when none comes about."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation, UserIdentityNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.status import code_to_category

from pipeline.errors import PacsError
from pipeline.pacs.archive import Access, NotOffered, Unreachable
from pipeline.pacs.credentials import Credentials, client_context

# Files are sent as they lie on disk, piece by piece; the library's own event log prints whole data sets.
_config.STORE_SEND_CHUNKED_DATASET = True
_config.LOG_HANDLER_LEVEL = "none"

REJECTED_TRANSIENT = 2


class BrokeOff(Unreachable):
    """The archive ended an association instead of answering."""


@contextmanager
def associated(
    access: Access,
    contexts: Sequence[PresentationContext],
    *,
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    handlers: Sequence[Any] = (),
) -> Iterator[Association]:
    """An association, released at the end, aborted on an error.

    Raises:
        Unreachable: no connection, no answer, or a rejection for the moment.
        NotOffered: none of the contexts was accepted.
        PacsError: a rejection, or no TLS.
    """
    connection = _Connection(access.patience.answer_s)
    items = [*roles, *_identity(access.credentials)]
    try:
        association = _associate(access, contexts, connection, items=items, handlers=handlers)
        try:
            yield association
        except BaseException:
            association.abort()
            raise
        if association.is_established:
            association.release()
    finally:
        connection.close()


def silence(access: Access, started_s: float) -> Unreachable:
    """Why an answer that was awaited since `started_s` (monotonic) did not come."""
    waited = access.patience.answer_s
    if time.monotonic() - started_s >= 0.95 * waited:
        return Unreachable(f"{access.node}: no answer within {waited:g} s")
    return BrokeOff(f"{access.node}: the archive broke the association off")


def in_words(status: Dataset, words: dict[int, tuple[str, str]]) -> str:
    """A DIMSE status (PS3.7 annex C) as number and words."""
    code = int(status.Status)
    _, text = words.get(code, ("", ""))
    return f"status 0x{code:04X}, {(text or code_to_category(code)).lower()}"


class _Connection:
    """The socket under an association: what the library leaves at its defaults is set when it opens."""

    def __init__(self, answer_s: float) -> None:
        self._answer_s = answer_s
        self._socket: socket.socket | None = None
        self.opened_s: float | None = None
        self.handlers = [(evt.EVT_CONN_OPEN, self._on_open), (evt.EVT_DATA_SENT, self._on_sent)]

    def close(self) -> None:
        """Does nothing if it is closed; the library forgets to after the peer has broken off."""
        if self._socket is not None:
            self._socket.close()

    def _on_open(self, event: evt.Event) -> None:
        transport: Any = event.assoc.dul.socket
        opened: socket.socket = transport.socket
        self._socket, self.opened_s = opened, time.monotonic()
        # Without it a write to a peer that has stopped reading would block for ever.
        opened.settimeout(self._answer_s)
        # Short messages alternate; held back to be joined, each would wait for the peer's delayed acknowledgement.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_sent(self, event: evt.Event) -> None:
        # Linux forgets it after a while. Without it a peer that writes an answer in two parts waits 40 ms for each.
        if hasattr(socket, "TCP_QUICKACK") and self._socket is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _associate(
    access: Access,
    contexts: Sequence[PresentationContext],
    connection: _Connection,
    *,
    items: Sequence[Any],
    handlers: Sequence[Any],
) -> Association:
    node, patience = access.node, access.patience
    entity = AE(ae_title=access.aet)
    entity.connection_timeout = patience.connect_s
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = patience.answer_s
    try:
        association = entity.associate(
            node.host,
            node.port,
            list(contexts),
            node.called_aet,
            ext_neg=list(items),
            tls_args=(client_context(access.credentials), node.host) if node.tls else None,
            evt_handlers=[*connection.handlers, *handlers],
        )
    except OSError:  # Of the name's look-up; others do not come out.
        raise _probe(access) from None
    if not association.is_established:
        raise _explain(association, access, connection.opened_s)
    return association


def _identity(credentials: Credentials) -> list[UserIdentityNegotiation]:
    """User name and password (PS3.7 annex D.3.3.7, type 2)."""
    if credentials.username is None or credentials.password is None:
        return []
    item = UserIdentityNegotiation()
    item.user_identity_type = 2
    item.primary_field = credentials.username.encode()
    item.secondary_field = credentials.password.get_secret_value().encode()
    return [item]


def _explain(association: Association, access: Access, connected_s: float | None) -> PacsError:
    node = access.node
    if association.is_rejected:
        answer: Any = association.acceptor.primitive
        reason = answer.reason_str[:1].lower() + answer.reason_str[1:]
        message = (
            f"{node}: the archive rejected the association ({reason}); check the AE title in the address, and that "
            f"the archive knows ours, {access.aet} (--aet), at this machine"
        )
        return (Unreachable if answer.result == REJECTED_TRANSIENT else PacsError)(message)
    if any(context.result is not None for context in association.rejected_contexts):
        return NotOffered(f"{node}: the archive offers nothing of what was asked for to us, {access.aet} (--aet)")
    if connected_s is None:
        return _probe(access)
    if time.monotonic() - connected_s >= 0.95 * access.patience.answer_s:
        return Unreachable(f"{node}: connected, but no answer within {access.patience.answer_s:g} s")
    # An archive that rejects and hangs up at once may take its rejection back: a reset discards what was not read yet.
    wants = "another AE title" if node.tls else "TLS (dimses://), or another AE title"
    return Unreachable(
        f"{node}: the archive ended the connection before an association came about; does it want {wants}?"
    )


def _probe(access: Access) -> PacsError:
    """Why there was no connection: the library tells only its log, so it is tried once more."""
    node, patience = access.node, access.patience
    try:
        with socket.create_connection((node.host, node.port), timeout=patience.connect_s) as plain:
            if node.tls:
                with client_context(access.credentials).wrap_socket(plain, server_hostname=node.host):
                    pass
    except ssl.SSLCertVerificationError as error:
        return PacsError(
            f"{node}: the archive's certificate is not trusted ({error.verify_message}); name its authority as "
            "ca_file in the credentials file"
        )
    except ssl.SSLError:
        return PacsError(f"{node}: no TLS connection came about; does the archive speak TLS at this port?")
    except socket.gaierror:
        return PacsError(f"{node}: no such host")
    except ConnectionRefusedError:
        return Unreachable(f"{node}: connection refused; is the archive running, and is the port right?")
    except TimeoutError:
        return Unreachable(f"{node}: no connection within {patience.connect_s:g} s")
    except OSError as error:
        return Unreachable(f"{node}: no connection ({(error.strerror or 'network error').lower()})")
    return Unreachable(f"{node}: no connection at first; try again")
