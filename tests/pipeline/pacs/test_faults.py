"""Archives that hang, refuse, lie or break off: one line each, in time, and no word of a patient."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from pipeline.console import Silence
from pipeline.errors import PacsError
from pipeline.pacs.credentials import Credentials
from pipeline.pacs.node import Node, parse_node
from pipeline.pacs.patience import Patience, Unreachable
from pipeline.pacs.sending import find_instances

from .conftest import Store, dimse_archive, elapsed_s, free_port, opened, web_archive


def refusal(node: Node | str, credentials: Credentials | None = None, **options: Any) -> str:
    """The line of a C-ECHO, or of its like, that must fail."""
    with opened(node, credentials, **options) as archive, pytest.raises(PacsError) as told:
        archive.echo()
    message = str(told.value)
    assert "\n" not in message
    assert "Doe" not in message
    return message


class TestNoAnswer:
    @pytest.mark.parametrize("scheme", ["dicomweb://", "dimse://ARCHIVE@"])
    def test_refused(self, scheme: str) -> None:
        assert "connection refused" in refusal(f"{scheme}127.0.0.1:{free_port()}")

    @pytest.mark.parametrize("scheme", ["dicomweb://", "dimse://ARCHIVE@"])
    def test_no_such_host(self, scheme: str) -> None:
        assert "no such host" in refusal(f"{scheme}no-such-host.invalid:4242")

    @pytest.mark.parametrize("scheme", ["dicomweb://", "dimse://ARCHIVE@"])
    def test_a_port_that_says_nothing(self, scheme: str) -> None:
        told: list[str] = []
        with silent_port() as port:
            assert elapsed_s(lambda: told.append(refusal(f"{scheme}127.0.0.1:{port}"))) < 4
        assert "no answer within 1 s" in told[0]

    def test_an_archive_that_hangs(self, node: Node, store: Store) -> None:
        store.faults.hang = threading.Event()
        assert "no answer within 1 s" in refusal(node)

    def test_one_that_stops_reading(self, data_dir: Path, tmp_path: Path) -> None:
        """A body larger than the buffers between us: the write would block for ever."""
        with silent_port() as port, opened(f"dicomweb://127.0.0.1:{port}/x") as archive:
            (instance,) = find_instances([large_file(data_dir, tmp_path)], console=Silence())
            with pytest.raises(Unreachable):
                list(archive.store([instance]))

    def test_one_that_stops_reading_after_it_was_associated(self, data_dir: Path, tmp_path: Path) -> None:
        (instance,) = find_instances([large_file(data_dir, tmp_path)], console=Silence())
        with stalling_archive() as address, opened(address) as archive:

            def store_it() -> None:
                with pytest.raises(Unreachable, match=r"no answer within 1 s|broke the association off"):
                    list(archive.store([instance]))

            assert elapsed_s(store_it) < 6


class TestRefusal:
    @pytest.mark.parametrize(
        ("status", "words"),
        [(403, "does not allow"), (404, "check the path"), (413, "--batch-mb"), (500, "HTTP 500"), (503, "busy"),
         (307, "another address")],
    )  # fmt: skip
    def test_by_http_status(self, web: str, store: Store, status: int, words: str) -> None:
        store.faults.status = status
        assert words in refusal(web)

    @pytest.mark.parametrize("text", ["<html>Doe^Jane</html>", "{", "[1]", '[{"00100020": 5}]', '"Doe"'])
    def test_an_answer_that_is_no_dicom(self, web: str, store: Store, text: str) -> None:
        store.faults.text = text
        with opened(web) as archive, pytest.raises(PacsError, match="not what a DICOMweb service gives") as told:
            archive.find("STUDY", {})
        assert "Doe" not in str(told.value)

    def test_by_another_title(self, dimse: str) -> None:
        message = refusal(dimse.replace("ARCHIVE", "ELSEWHERE"))
        assert "rejected the association (called AE title not recognised)" in message

    def test_by_dimse_status(self, dimse: str, store: Store) -> None:
        store.faults.status = 0x0124
        assert "status 0x0124, refused: not authorised" in refusal(dimse)

    def test_passwords(self, web: str, store: Store) -> None:
        store.faults.password = "anna:kingfisher"
        assert "wants credentials (HTTP 401)" in refusal(web)
        wrong = refusal(web, Credentials(username="anna", password=SecretStr("heron")))
        assert "does not accept the credentials (HTTP 401)" in wrong
        assert "heron" not in wrong
        with opened(web, Credentials(username="anna", password=SecretStr("kingfisher"))) as archive:
            archive.echo()

    def test_nothing_is_taken_from_the_environment(
        self, web: str, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        store.faults.password = "anna:kingfisher"
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login anna password kingfisher\n")
        (tmp_path / ".netrc").chmod(0o600)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
        assert "wants credentials (HTTP 401)" in refusal(web)


class TestAnswers:
    def test_pages_are_put_together(self, web: str, store: Store, series: Path) -> None:
        store.faults.page = 4
        for file in series.glob("*.dcm"):
            store.take(file.read_bytes())
        dataset = store.datasets()[0]
        with opened(web) as archive:
            assert archive.instances(dataset.StudyInstanceUID, dataset.SeriesInstanceUID).keys() == store.held.keys()

    def test_one_that_gives_the_same_page_again_ends(self, web: str, store: Store, series: Path) -> None:
        store.faults.forgets_offset, store.faults.page = True, 4
        for file in series.glob("*.dcm"):
            store.take(file.read_bytes())
        dataset = store.datasets()[0]
        with opened(web) as archive:
            assert len(archive.instances(dataset.StudyInstanceUID, dataset.SeriesInstanceUID)) == 4

    def test_both_kinds_find_the_same(self, store: Store, series: Path) -> None:
        for file in series.glob("*.dcm"):
            store.take(file.read_bytes())
        study = str(store.datasets()[0].StudyInstanceUID)
        with web_archive(store) as web, dimse_archive(store) as dimse, opened(web) as one, opened(dimse) as other:
            assert one.find("STUDY", {}) == other.find("STUDY", {})
            assert one.find("SERIES", {"StudyInstanceUID": study}) == other.find("SERIES", {"StudyInstanceUID": study})
            assert one.find("SERIES", {"StudyInstanceUID": study, "Modality": "CT"}) == []
            assert other.find("SERIES", {"StudyInstanceUID": study, "Modality": "CT"}) == []


class TestTls:
    @pytest.mark.parametrize("kind", [web_archive, dimse_archive])
    def test_only_an_authority_that_is_named_is_trusted(self, kind: Any, store: Store, tmp_path: Path) -> None:
        trusted, other = authority(tmp_path, "ours"), authority(tmp_path, "theirs")
        with kind(store, server_side(trusted("127.0.0.1"))) as address:
            with opened(address, Credentials(ca_file=tmp_path / "ours-ca.pem")) as archive:
                archive.echo()
            assert "certificate is not trusted" in refusal(address)
            assert "certificate is not trusted" in refusal(address, Credentials(ca_file=tmp_path / "theirs-ca.pem"))
        with kind(store, server_side(trusted("127.0.0.2"))) as address:
            message = refusal(address, Credentials(ca_file=tmp_path / "ours-ca.pem"))
            assert "certificate is not trusted" in message
            assert "ca_file" in message
        assert other("127.0.0.1").is_file()

    @pytest.mark.parametrize("kind", [web_archive, dimse_archive])
    def test_an_archive_may_want_a_certificate_of_ours(self, kind: Any, store: Store, tmp_path: Path) -> None:
        issue = authority(tmp_path, "ours")
        context = server_side(issue("127.0.0.1"))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tmp_path / "ours-ca.pem")
        own = issue("192.0.2.7")
        with kind(store, context) as address:
            credentials = Credentials(ca_file=tmp_path / "ours-ca.pem", certificate=own, key=own)
            with opened(address, credentials) as archive:
                archive.echo()
            with opened(address, Credentials(ca_file=tmp_path / "ours-ca.pem")) as archive, pytest.raises(PacsError):
                archive.echo()

    @pytest.mark.parametrize("scheme", ["dicomwebs://", "dimses://ARCHIVE@"])
    def test_a_port_without_tls(self, scheme: str, store: Store) -> None:
        with web_archive(store) as address:
            port = parse_node(address).port
            assert "does the archive speak TLS at this port?" in refusal(f"{scheme}127.0.0.1:{port}")

    def test_a_port_that_wants_tls(self, store: Store, tmp_path: Path) -> None:
        with dimse_archive(store, server_side(authority(tmp_path, "ours")("127.0.0.1"))) as address:
            message = refusal(address.replace("dimses", "dimse"), patience=Patience(1, 1, 20, 1, 0.01))
        assert "dimses://" in message or "no answer within 1 s" in message


@contextmanager
def silent_port() -> Iterator[int]:
    """Accepts connections and neither reads nor writes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def stalling_archive() -> Iterator[str]:
    """Accepts an association for everything, by hand (PS3.8 section 9.3.3), and never reads again."""
    done = threading.Event()

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            head = connection.recv(6, socket.MSG_WAITALL)
            request = connection.recv(int.from_bytes(head[2:6], "big"), socket.MSG_WAITALL)
            items = b"".join(accepted(request))
            user = b"\x51\x00\x00\x04" + (16384).to_bytes(4, "big") + b"\x52\x00\x00\x05" + b"1.2.3"
            items += b"\x50\x00" + len(user).to_bytes(2, "big") + user
            body = request[:68] + b"\x10\x00\x00\x15" + b"1.2.840.10008.3.1.1.1" + items
            connection.sendall(b"\x02\x00" + len(body).to_bytes(4, "big") + body)
            done.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"dimse://ARCHIVE@127.0.0.1:{server.getsockname()[1]}"
        done.set()
        thread.join()


def accepted(request: bytes) -> Iterator[bytes]:
    """An acceptance of explicit VR little endian for each presentation context of an A-ASSOCIATE-RQ."""
    position = 68
    while position < len(request):
        kind, length = request[position], int.from_bytes(request[position + 2 : position + 4], "big")
        if kind == 0x20:
            syntax = b"1.2.840.10008.1.2.1"
            item = b"\x40\x00" + len(syntax).to_bytes(2, "big") + syntax
            body = bytes([request[position + 4], 0, 0, 0]) + item
            yield b"\x21\x00" + len(body).to_bytes(2, "big") + body
        position += 4 + length


def large_file(data_dir: Path, folder: Path) -> Path:
    import pydicom

    dataset = pydicom.dcmread(data_dir / "dicom_hippocrop" / "1.dcm")
    dataset.Rows = dataset.Columns = 3000
    dataset.PixelData = bytes(2 * 3000 * 3000)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(folder / "large.dcm")
    return folder / "large.dcm"


def authority(folder: Path, name: str) -> Callable[[str], Path]:
    """A certificate authority in NAME-ca.pem; what it gives issues a certificate with its key for an address."""
    key = ec.generate_private_key(ec.SECP256R1())
    title = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    made = _certificate(title, title, key).add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    own = made.add_extension(usage, True).sign(key, hashes.SHA256())
    (folder / f"{name}-ca.pem").write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def issue(address: str) -> Path:
        theirs = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        signed = _certificate(subject, title, theirs).add_extension(names, False).sign(key, hashes.SHA256())
        path = folder / f"{name}-{address}.pem"
        secret = theirs.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
        return path

    return issue


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))


def server_side(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
