"""List and read pictures in class folders, on disk or in a tar file."""

from __future__ import annotations

import os
import stat
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError
from torch.utils.data import Dataset

from prunesearch.errors import DataError
from prunesearch.evaluate.pixels import check_mode

_HIDDEN = frozenset({"@eadir", "__macosx", "thumbs.db", "desktop.ini"})
"""Names of files and folders that file managers leave behind. Names that begin with a dot are hidden too."""


class PictureFiles(Dataset[tuple[Image.Image, Any]], ABC):
    """Pictures in files, read by index as (PIL image, class index). Reading raises the errors of Pillow."""

    labels: Sequence[int] | None = None
    """Class indices, if they are known without opening files."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> tuple[BinaryIO, Any]:
        """The opened file of a picture, which the caller closes, and its class index."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of a picture in messages."""

    def stamp(self, index: int) -> str | None:
        """Text that changes when the file changes; None when that is unknown."""
        return None

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        file, label = self.open(index)
        with file:
            image = _opened(file)
            image.load()
        return image, label

    def read_header(self, index: int) -> None:
        """Raise an error when the file is missing or does not begin like a picture. Decodes nothing."""
        file, _ = self.open(index)
        with file:
            _opened(file)


def _opened(file: BinaryIO) -> Image.Image:
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        if file.seek(0, os.SEEK_END) == 0:
            raise ValueError("the file is empty") from None
        raise ValueError("not a picture that Pillow knows") from None
    check_mode(image)
    return image


class FolderPictures(PictureFiles):
    """Files on disk. names: paths relative to `root`."""

    def __init__(self, root: str, names: Sequence[str], labels: Sequence[int]) -> None:
        self.root, self.names, self.labels = root, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> tuple[BinaryIO, Any]:
        assert self.labels is not None
        return open(os.path.join(self.root, self.names[index]), "rb"), self.labels[index]

    def name(self, index: int) -> str:
        return self.names[index]

    def stamp(self, index: int) -> str | None:
        try:
            found = os.stat(os.path.join(self.root, self.names[index]))
        except OSError:
            return None
        return f"{found.st_size} {found.st_mtime_ns}"


class Member(NamedTuple):
    """A file in a tar file: its path, and the offset and size of its bytes. offset: -1 when they are not in the tar."""

    name: str
    offset: int
    size: int


class TarPictures(PictureFiles):
    """Members of an uncompressed tar file, or of tar files in it."""

    def __init__(self, path: str, members: Sequence[Member], labels: Sequence[int]) -> None:
        self.path, self.members, self.labels = path, members, labels

    def __len__(self) -> int:
        return len(self.members)

    def open(self, index: int) -> tuple[BinaryIO, Any]:
        member = self.members[index]
        if member.offset < 0:
            raise ValueError("a link to a file that is not in the tar, or a sparse file")
        assert self.labels is not None
        with open(self.path, "rb") as file:  # opened each time: loading processes must not share a position
            file.seek(member.offset)
            return BytesIO(file.read(member.size)), self.labels[index]

    def name(self, index: int) -> str:
        return self.members[index].name

    def stamp(self, index: int) -> str | None:
        member = self.members[index]
        return f"{member.offset} {member.size} {os.stat(self.path).st_mtime_ns}"


class ReaderPictures(PictureFiles):
    """Pictures of one of timm's readers that opens files by index, such as hfds/..."""

    def __init__(self, images: Any) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def open(self, index: int) -> tuple[BinaryIO, Any]:
        file, label, *_ = self._images.reader[index]
        return file, -1 if label is None else label

    def name(self, index: int) -> str:
        try:
            return str(self._images.filename(index))
        except Exception:  # readers raise anything, and some have no file names
            return f"picture {index}"


class Listing(NamedTuple):
    """Content of a folder or tar file, as paths from its root.

    pictures: files that Pillow may read. others: other files. empty: folders with nothing in them. members: for a tar
    file, the members of `pictures`, in the same order.
    """

    pictures: list[str]
    others: list[str]
    empty: list[str]
    members: list[Member] | None = None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not part of the data: .DS_Store, ._1.png, .ipynb_checkpoints, @eaDir, Thumbs.db."""
    return name.startswith(".") or name.lower() in _HIDDEN


def is_picture(name: str) -> bool:
    """Whether the name ends like one of the formats that Pillow reads, in any case."""
    return os.path.splitext(name)[1].lower() in _extensions()


@lru_cache(maxsize=1)
def _extensions() -> frozenset[str]:
    formats = {  # without formats that Pillow only writes (PDF) or only recognises (HDF5)
        name
        for name, (factory, _) in (Image.init(), Image.OPEN)[1].items()
        if not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    }
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def list_pictures(root: str, field: str) -> Listing:
    """List what is in a folder or tar file and not hidden. field: its name in errors. Raises DataError."""
    return _list_tar(root, field) if os.path.isfile(root) else _list_folder(root, field)


def _list_folder(root: str, field: str) -> Listing:
    found = Listing([], [], [])
    waiting = [("", frozenset[tuple[int, int]]())]
    while waiting:
        folder, above = waiting.pop()
        inside: list[tuple[str, bool]] = []
        try:
            here = os.stat(os.path.join(root, folder))
            with os.scandir(os.path.join(root, folder)) as entries:
                inside = [(entry.name, _is_folder(entry)) for entry in entries if not is_hidden(entry.name)]
        except OSError as error:
            raise DataError(
                f"data.{field}: the folder {os.path.join(root, folder)!r} cannot be listed: {error.strerror}. "
                f"Possible: folders that this user may read. Change its permissions, or move it away."
            ) from error
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            raise DataError(
                f"data.{field}: {os.path.join(root, folder)!r} is a link to a folder that it is in, without end. "
                f"Possible: links to other folders. Remove the link."
            )
        if not inside and folder:
            found.empty.append(folder)
        for name, is_folder in inside:
            path = f"{folder}/{name}" if folder else name
            if is_folder:
                waiting.append((path, above | {identity}))
            elif is_picture(name) and _is_file_or_broken(os.path.join(root, path)):
                found.pictures.append(path)
            else:
                found.others.append(path)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file_or_broken(path: str) -> bool:
    """False for pipes and devices, which must not be opened, because reading them may never end."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True  # a broken link; reading it reports the error


def _list_tar(path: str, field: str) -> Listing:
    members: dict[str, Member] = {}  # when a name occurs twice, the later member counts, as in unpacking
    others: dict[str, None] = {}
    folders, full = set[str](), set[str]()
    try:
        with tarfile.open(path, "r:") as tar:
            for info, name, offset in _walk_tar(tar):
                parts = PurePosixPath(name).parts
                if name.startswith("/") or ".." in parts:
                    raise DataError(
                        f"data.{field}: the tar file {path!r} has {name!r}, which leads out of it. Possible: relative "
                        f"names, class/image. Pack it again from inside the folder."
                    )
                clean = "/".join(part for part in parts if part != ".")
                if not clean or any(is_hidden(part) for part in clean.split("/")):
                    continue
                full.update(str(parent) for parent in PurePosixPath(clean).parents)
                if info.isdir():
                    folders.add(clean)
                elif not is_picture(clean) or not (info.isfile() or info.issym() or info.islnk()):
                    others[clean] = None
                elif info.isfile():
                    members[clean] = Member(clean, -1 if info.issparse() else offset, info.size)
                else:
                    target = info.linkname if info.islnk() else f"{PurePosixPath(clean).parent}/{info.linkname}"
                    known = members.get(os.path.normpath(target), Member(clean, -1, 0))
                    members[clean] = known._replace(name=clean)
            _check_end(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"data.{field}: {path!r} is a file, but cannot be read as a tar file: {error}. Possible: a folder, or a "
            f"whole and uncompressed .tar, of class/image files. Unpack or copy it again, or give a folder."
        ) from error
    return Listing(list(members), list(others), sorted(folders - full), list(members.values()))


def _walk_tar(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, int]]:
    """Members with their paths and the offsets of their bytes in the outer file.

    The members of a tar file inside it are in a folder of that file's name, as in ImageNet's training set.
    """
    for info in tar:
        if info.isfile() and info.name.lower().endswith(".tar") and not is_hidden(os.path.basename(info.name)):
            folder = os.path.splitext(info.name)[0]
            with tarfile.open(fileobj=tar.extractfile(info), mode="r:") as inner:
                for inside in inner:
                    yield inside, f"{folder}/{inside.name}", info.offset_data + inside.offset_data
                _check_end(inner)
        else:
            yield info, info.name, info.offset_data


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless a block of zeros follows the last member. tarfile itself does not notice a cut file."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("unexpected end of data")
