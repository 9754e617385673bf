"""From files to an archive: in batches, each instance once, going on where an earlier send was cut off."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import MediaStorageDirectoryStorage

from pipeline.console import Console
from pipeline.errors import PacsError
from pipeline.pacs.archive import Archive, Instance, NotOffered, Outcome, Unreachable
from pipeline.pacs.journal import Journal
from pipeline.pacs.patience import Effort
from pipeline.quiet import quiet
from transforms.dicom_header import is_dicom

BATCH_BYTES = 16 * 2**20
BATCH_INSTANCES = 100

_TAGS = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]


@dataclass(frozen=True)
class Sent:
    """What became of the instances: how many there are, were in the archive before, and were sent now."""

    total: int
    before: int
    now: int


def find_instances(paths: Sequence[Path], *, console: Console) -> list[Instance]:
    """The DICOM instances among files and folders, in the order of paths; other files of a folder are left out.

    Raises:
        PacsError: a path is missing or holds no DICOM, a named file is none, or two files claim to be one instance.
    """
    found: dict[str, Instance] = {}
    other_count = 0
    files = [(path, file) for path in paths for file in _files(path)]
    for done, (path, file) in enumerate(files, start=1):
        instance = _instance(file)
        if instance is None and file == path:
            raise PacsError(f"{file}: not a DICOM instance; an archive takes DICOM only")
        if instance is None:
            other_count += 1
            continue
        twin = found.setdefault(instance.sop_instance_uid, instance)
        if twin is not instance and not filecmp.cmp(twin.path, file, shallow=False):
            raise PacsError(
                f"{twin.path} and {file} differ and have the same SOP Instance UID; send the right one only"
            )
        console.progress("looking at files", done, len(files))
    if not found:
        raise PacsError(f"{paths[0]}: no DICOM instance in it")
    if other_count:
        console.note(f"left out, as they are no DICOM instances: {other_count} of {len(files)} files")
    return list(found.values())


def send(
    archive: Archive,
    instances: Sequence[Instance],
    *,
    journal: Journal,
    effort: Effort,
    console: Console,
    batch_bytes: int = BATCH_BYTES,
) -> Sent:
    """Send what the archive does not have yet.

    Which instances it has is asked of the archive itself, before and after every failure; where it cannot be asked,
    the journal of what it acknowledged tells.

    Raises:
        PacsError: not every instance arrived; how many did is said, and the same call sends the rest.
        RunError: the journal cannot be read or written.
    """
    delivery = _Delivery(archive, {i.sop_instance_uid: i for i in instances}, journal, effort, console, batch_bytes)
    effort.run(delivery.settle)
    before = delivery.arrived_count
    try:
        effort.persist(delivery.attempt, lambda: len(delivery.left))
    except Unreachable as error:
        raise PacsError(f"{delivery.count()}; {error}; run the same command again to send the rest") from error
    except PacsError as error:
        raise PacsError(f"{delivery.count()}; {error}") from error
    delivery.judge()
    return Sent(len(instances), before, delivery.arrived_count - before)


class _Delivery:
    """What is still to send. An instance is settled when the archive has it or has refused it."""

    def __init__(
        self,
        archive: Archive,
        instances: dict[str, Instance],
        journal: Journal,
        effort: Effort,
        console: Console,
        batch_bytes: int,
    ) -> None:
        self._archive = archive
        self._journal = journal
        self._effort = effort
        self._console = console
        self._batch_bytes = batch_bytes
        self._total = len(instances)
        self.left = instances
        self._refused: list[Outcome] = []
        self._in_doubt = False
        """Whether more may have arrived than was acknowledged."""

    @property
    def arrived_count(self) -> int:
        return self._total - len(self.left) - len(self._refused)

    def count(self) -> str:
        return f"{self.arrived_count} of {self._total} instances arrived"

    def settle(self) -> None:
        """Take out what the archive has, by its own word or, where it cannot be asked, by the journal's."""
        acknowledged = self._journal.read()
        for study_uid, series_uid in sorted({(i.study_uid, i.series_uid) for i in self.left.values()}):
            try:
                held = set(self._archive.instances(study_uid, series_uid))
            except NotOffered:
                held = acknowledged
            for uid in held & set(self.left):
                del self.left[uid]

    def attempt(self) -> None:
        """Send all that is left; raises Unreachable when the archive fails in the middle."""
        if self._in_doubt:
            self.settle()
        self._in_doubt = True
        for batch in _batches(list(self.left.values()), self._batch_bytes):
            self._effort.check()
            self._send(batch)
        if self.left:
            raise Unreachable("the archive neither acknowledged nor refused every instance")

    def judge(self) -> None:
        """Raises PacsError if anything was refused, with the first reason; all are told."""
        for outcome in self._refused:
            self._console.note(f"not accepted: {outcome.instance.path}: {outcome.status}")
        if self._refused:
            first = self._refused[0]
            more = f" (and {len(self._refused) - 1} more)" if len(self._refused) > 1 else ""
            raise PacsError(f"{self.count()}; not accepted: {first.instance.path}: {first.status}{more}")

    def _send(self, batch: Sequence[Instance]) -> None:
        acknowledged: list[str] = []
        try:
            for outcome in self._archive.store(batch):
                self.left.pop(outcome.instance.sop_instance_uid)
                if outcome.arrived:
                    acknowledged.append(outcome.instance.sop_instance_uid)
                else:
                    self._refused.append(outcome)
                self._console.progress("sending", self._total - len(self.left), self._total)
        finally:
            self._journal.add(acknowledged)


def _batches(instances: Sequence[Instance], most_bytes: int) -> Iterator[list[Instance]]:
    batch: list[Instance] = []
    size_bytes = 0
    for instance in instances:
        if batch and (size_bytes + instance.size_bytes > most_bytes or len(batch) == BATCH_INSTANCES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(instance)
        size_bytes += instance.size_bytes
    if batch:
        yield batch


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise PacsError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    # Sorted, so that the same folder is sent in the same order everywhere; hidden files are journals and the like.
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names if not name.startswith("."))
    return sorted(found)


def _instance(path: Path) -> Instance | None:
    """The instance in a file, from its header alone; None where it is none."""
    try:
        if not is_dicom(path):
            return None
        with quiet():
            dataset = dcmread(path, specific_tags=_TAGS, stop_before_pixels=True)
        uids = [str(dataset[tag].value) for tag in _TAGS]
        syntax = str(dataset.file_meta.TransferSyntaxUID)
    except (InvalidDicomError, KeyError, AttributeError, ValueError, EOFError):
        return None
    if uids[0] == MediaStorageDirectoryStorage or not all(uids):
        return None
    return Instance(path, uids[1], uids[0], uids[2], uids[3], syntax, path.stat().st_size)
