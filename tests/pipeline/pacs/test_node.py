"""Addresses: what is understood, what is refused, and that no secret comes back out."""

from __future__ import annotations

import pytest

from pipeline.errors import PacsError
from pipeline.pacs.node import Node, check_aet, check_uid, is_node, parse_node


@pytest.mark.parametrize(
    ("text", "node", "shown"),
    [
        ("dicomweb://pacs:8042/dicom-web/", Node("dicomweb", False, "pacs", 8042, path="/dicom-web"),
         "dicomweb://pacs:8042/dicom-web"),
        ("DICOMWEBS://Pacs.Example/a/b", Node("dicomweb", True, "pacs.example", 443, path="/a/b"),
         "dicomwebs://pacs.example:443/a/b"),
        ("dicomweb://10.0.0.1", Node("dicomweb", False, "10.0.0.1", 80), "dicomweb://10.0.0.1:80"),
        ("dimse://ORTHANC@pacs:104", Node("dimse", False, "pacs", 104, called_aet="ORTHANC"),
         "dimse://ORTHANC@pacs:104"),
        ("dimses://MY%20PACS@[::1]:2762/", Node("dimse", True, "::1", 2762, called_aet="MY PACS"),
         "dimses://MY PACS@[::1]:2762"),
    ],
)  # fmt: skip
def test_an_address(text: str, node: Node, shown: str) -> None:
    assert is_node(text)
    assert parse_node(text) == node
    assert str(node) == shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://pacs/x", "the address of an archive is dicomweb://"),
        ("dicomweb:/pacs/x", "the address of an archive is"),
        ("dicomweb://", "no host"),
        ("dicomweb://pacs:99999/x", "cannot be read"),
        ("dicomweb://pacs:0/x", "port 0"),
        ("dicomweb://pacs/x?key=1", "nothing may follow the path"),
        ("dicomweb://pacs/x y", "characters"),
        ("dicomweb://[::1]:80/x", "host name or an IPv4"),
        ("dimse://pacs:104", "AE title is missing"),
        ("dimse://PACS@pacs", "port is missing"),
        ("dimse://PACS@pacs:104/x", "no path"),
        ("dimse://ABCDEFGHIJKLMNOPQ@pacs:104", "1 to 16"),
        ("dimse://A%5CB@pacs:104", "no backslash"),
    ],
)
def test_what_is_none(text: str, words: str) -> None:
    with pytest.raises(PacsError, match="(?s).*" + words.replace("(", r"\(")):
        parse_node(text)


@pytest.mark.parametrize(
    "text",
    ["dicomweb://anna:heron@pacs/x", "dicomwebs://heron@pacs/x", "dimse://PACS:heron@pacs:104", "dicomweb://a:h/ron@p"],
)
def test_a_secret_in_it_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(PacsError) as told:
        parse_node(text)
    assert "heron" not in str(told.value)
    if "/ron" not in text:
        assert "--credentials" in str(told.value)


@pytest.mark.parametrize("text", ["dicomweb", "images/dicomweb", "dimse.nii.gz", "C:/dicomweb://x", "/dimse://x"])
def test_paths_are_no_addresses(text: str) -> None:
    assert not is_node(text)


@pytest.mark.parametrize("text", ["", "1.2/../3", "1.2.x", "1" * 65, "1.2\n"])
def test_uids_that_are_none(text: str) -> None:
    with pytest.raises(PacsError, match="digits and dots"):
        check_uid(text, "--study")


def test_titles() -> None:
    assert check_aet(" VOLSEG ", "--aet") == "VOLSEG"
    for text in ("", "  ", "Ä", "A\tB"):
        with pytest.raises(PacsError, match="AE title"):
            check_aet(text, "--aet")
