"""Credentials: only from a file that is ours alone or the keyring, and never shown."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.backends import fail
from pydantic import SecretStr

from pipeline.errors import PacsError
from pipeline.pacs.credentials import Credentials, check_fit, read_credentials, with_keyring
from pipeline.pacs.node import parse_node

WEB = parse_node("dicomwebs://pacs.example/x")


def write(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "pacs.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_what_a_file_may_hold(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("x")
    found = read_credentials(write(tmp_path, 'username = "anna"\npassword = "heron"\nca_file = "ca.pem"\n'))
    assert found.username == "anna"
    assert found.password is not None
    assert found.password.get_secret_value() == "heron"
    assert found.ca_file == tmp_path / "ca.pem"
    assert "heron" not in f"{found} {found!r} {found.model_dump()}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, 'token = "heron"', mode)
    with pytest.raises(PacsError, match=f"chmod 600 {path}"):
        read_credentials(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('password = "heron', "not TOML"),
        ('pasword = "heron"', "pasword: .*the keys are username, password"),
        ("password = 5", "password: .*string"),
        ('password = "heron"', "go together"),
        ('username = "a"\npassword = "heron"\ntoken = "heron"', "either"),
        ('ca_file = "nowhere.pem"', "there is no file"),
        ('key = "pacs.toml"', "key without certificate"),
    ],
)
def test_what_is_refused_without_quoting_a_value(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(PacsError, match=words) as told:
        read_credentials(write(tmp_path, text))
    assert "heron" not in str(told.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PacsError, match="no such file"):
        read_credentials(tmp_path / "nowhere.toml")


def test_secrets_do_not_travel_in_the_open() -> None:
    secret = Credentials(username="anna", password=SecretStr("heron"))
    for address in ("dicomwebs://pacs.example/x", "dimses://A@pacs.example:104", "dicomweb://127.0.0.1:8042/x"):
        check_fit(secret, parse_node(address))
    for address in ("dicomweb://pacs.example/x", "dimse://A@pacs.example:104"):
        with pytest.raises(PacsError, match="would travel unencrypted"):
            check_fit(secret, parse_node(address))
        check_fit(secret.model_copy(update={"allow_unencrypted": True}), parse_node(address))
        check_fit(Credentials(), parse_node(address))


def test_tokens_are_for_the_web() -> None:
    with pytest.raises(PacsError, match="bearer token is for DICOMweb"):
        check_fit(Credentials(token=SecretStr("heron")), parse_node("dimses://A@pacs.example:104"))


class _Ring(KeyringBackend):
    """A keyring in memory: the one of this machine is nobody's to test with."""

    priority = 1  # type: ignore[assignment]

    def get_password(self, service: str, username: str) -> str | None:
        return {("volseg:pacs.example:443", "anna"): "heron"}.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        raise NotImplementedError


@pytest.fixture
def ring() -> Generator[None]:
    before = keyring.get_keyring()
    keyring.set_keyring(_Ring())
    yield
    keyring.set_keyring(before)


@pytest.mark.usefixtures("ring")
class TestKeyring:
    def test_by_host_port_and_user(self) -> None:
        found = with_keyring(Credentials(), WEB, "anna")
        assert found.password == SecretStr("heron")
        assert found.username == "anna"

    def test_nothing_in_it(self) -> None:
        with pytest.raises(PacsError, match=r"keyring set volseg:pacs\.example:443 USER"):
            with_keyring(Credentials(), WEB, "berta")

    def test_no_keyring_at_all(self) -> None:
        keyring.set_keyring(fail.Keyring())
        with pytest.raises(PacsError, match="keyring cannot be read"):
            with_keyring(Credentials(), WEB, "anna")

    def test_not_both(self) -> None:
        with pytest.raises(PacsError, match="as well"):
            with_keyring(Credentials(token=SecretStr("x")), WEB, "anna")
