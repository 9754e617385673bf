"""Archives (PACS): one address, one set of actions, over DICOMweb or DIMSE.

`Node` says where, `Access` how, `open_archive` gives an `Archive`; `send` and `fetch` go on where they were cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.pacs.archive import Access, Archive
from pipeline.pacs.credentials import check_fit
from pipeline.quiet import quiet

__all__ = ["Access", "Archive", "open_archive"]


@contextmanager
def open_archive(access: Access) -> Iterator[Archive]:
    """The archive that `access` names; the network libraries are silent inside.

    Raises:
        PacsError: the credentials cannot be used with it. Nothing is sent yet.
    """
    check_fit(access.credentials, access.node)
    with quiet():
        # Each library is loaded when it is used.
        if access.node.protocol == "dicomweb":
            from pipeline.pacs.dicomweb import open_dicomweb

            with open_dicomweb(access) as archive:
                yield archive
        else:
            from pipeline.pacs.dimse import Dimse

            yield Dimse(access)
