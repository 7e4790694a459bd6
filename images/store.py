"""The decode-once store: the images of a folder as uint8, each decoded once and for all, in one memory-mapped file.

Files hold images back to back, at their own sizes: a header of 4 KiB (JSON), the pixels, an index. Where stages differ
much in size a copy at half size follows each image, out of which large crops are made small. Workers and processes that
map the file share one copy of it, in the memory that the system uses to cache files.
"""

import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from augment.draws import Boxes
from images.encoded import EncodedImages
from settings.errors import RunError

try:
    import fcntl
except ImportError:  # Windows, which does not let a file be removed that is open
    fcntl = None  # type: ignore[assignment]

FORMAT = 3
HEADER = 4096  # bytes
ALIGN = 192  # bytes; of each image's start: whole pixels of 3 bytes, and whole cache lines
INDEX = np.dtype([(name, "<i8") for name in ("offset", "height", "width")] + [("checksum", "<u8")])


def checksum(values: NDArray, seed: int = 0) -> int:
    """Hash the bytes of an array, in their order, to 64 bits.

    XXH3 reads them as fast as memory gives them; CRC-32 would add a tenth to the decoding of a small JPEG. It is to find
    damage, not forgery.

    seed: makes another hash of the same bytes: the number of an image, so that it is not taken for another
    """
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(values).data, seed)


def aligned(size: Any) -> Any:
    """Round a number of bytes, or an array of them, up to the next place where an image may start."""
    return size + -size % ALIGN


def bytes_of(height: int, width: int, half: bool) -> int:
    """Compute what an image takes in a store, with its copy at half size if there is one, without what follows to align."""
    size = 3 * height * width
    return aligned(size) + 3 * (height // 2) * (width // 2) if half else size


class StoredImages:
    """The images of `source` out of a store file.

    The file stays open, and mapped from the start: a run goes on when it is removed or replaced meanwhile.

    targets: class numbers (N,)
    index: offset in bytes, height and width of each image, a record array
    resident: all pixels (P, 3) on a GPU, None unless placed there

    Raises:
        OSError, ValueError: no store of these images, or a damaged one.
    """

    def __init__(self, path: str, source: EncodedImages):
        self.path = path
        self.source = source
        self.classes = source.classes
        self.targets = source.targets
        self.place = path  # where it is opened from; another one in a worker
        self.file: io.FileIO | None = io.FileIO(path)
        hold(self.file)
        self.header = read_header(self.file)
        if self.header["images"] != len(source):
            raise ValueError("it is of other images")
        self.index = read_index(self.file, self.header)
        self.identity = identity(self.file)
        self.resident: Tensor | None = None
        self.mapped: Tensor | None = self.map()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels(index).numpy()), int(self.targets[index])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pixels out: a worker that is not forked opens the file, by this process's handle if there are any."""
        handle = f"/proc/{os.getpid()}/fd/{self.file.fileno()}" if self.file is not None else ""
        place = handle if os.path.exists(handle) else self.path
        return self.__dict__ | {"file": None, "mapped": None, "resident": None, "place": place}

    def pixels(self, index: int) -> Tensor:
        """Return image `index`, uint8 (H, W, 3): a view of the file, not to be written to."""
        return self.view(self.index[index].tolist())

    def view(self, row: Sequence[int]) -> Tensor:
        """Return the image at offset, height and width, the first numbers of a row of the index: a view of the file."""
        offset, height, width = row[:3]
        return self.flat[offset : offset + 3 * height * width].view(height, width, 3)

    def for_crops(self, rows: NDArray, boxes: Boxes, size: int) -> tuple[NDArray, NDArray, NDArray, Boxes]:
        """Find the pixels that crops to `size` are made of: offset, height and width of each image, and the boxes in it.

        A crop of at least twice `size` pixels each way comes out of the copy at half size, where the store has them: what
        `size` pixels can show is all there, and a quarter of the pixels are read. Its box is moved to even pixels.

        rows: of the index; boxes: (N, 4) of `crop_boxes`
        """
        offsets, heights, widths = rows["offset"], rows["height"], rows["width"]
        if not self.header["half"]:
            return offsets, heights, widths, boxes
        small = boxes[:, 2:].min(axis=1) >= 2 * size
        offsets = np.where(small, offsets + aligned(3 * heights * widths), offsets)
        halved = 1 + small  # divisors
        return offsets, heights // halved, widths // halved, boxes // halved[:, None]

    @property
    def flat(self) -> Tensor:
        """All pixels of the file, uint8 (bytes,), mapped into memory.

        Raises:
            RunError: the file was cut short while it was used; the system would end a process that reads on.
        """
        if self.mapped is None:
            self.mapped = self.map()
        if fault := self.fault():
            raise RunError(fault)
        return self.mapped

    def fault(self) -> str | None:
        """Tell what has happened to the file since it was opened; None if it is as long as it was."""
        assert self.file is not None
        if os.fstat(self.file.fileno()).st_size >= HEADER + self.header["bytes"]:  # takes half a microsecond
            return None
        return f"decode cache {self.path} was cut short while it was used; --resume auto makes it anew"

    def map(self) -> Tensor:
        """Map the pixels of the file into memory; in a worker that is not forked, open it first.

        Raises:
            RunError: another file is there now, or none.
        """
        if self.file is None:
            with suppress(OSError):
                self.file = open(self.place, "rb", buffering=0)  # noqa: SIM115, as long as this is there
            if self.file is None or identity(self.file) != self.identity:
                raise RunError(f"decode cache {self.path} was removed while it was used; --resume auto makes it anew")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is read-only
            return torch.from_numpy(np.memmap(self.file, np.uint8, "r", HEADER, shape=(self.header["bytes"],)))

    def place_on(self, device: torch.device) -> None:
        """Copy all pixels to `device`, piece by piece."""
        resident = torch.empty(self.flat.numel(), dtype=torch.uint8, device=device)
        for at in range(0, resident.numel(), 2**28):
            resident[at : at + 2**28].copy_(self.flat[at : at + 2**28])
        self.resident = resident.view(-1, 3)

    def damaged(self) -> bool:
        """Check whether any pixel differs from what was stored.

        Reads the whole file, which training wants in memory anyway. It is not read through the map, because that would
        count as this process's memory.
        """
        half = self.header["half"]
        sizes = 3 * self.index["height"] * self.index["width"]
        buffer = np.empty(int((sizes + half * aligned(sizes)).max()), np.uint8)
        parts = range(0, len(self), 2**16)  # of the index, a list of which would take 300 MB for 1.3 million images
        rows = (row for at in parts for row in self.index[at : at + 2**16].tolist())
        title = "checking the decode cache"
        bar = tqdm(rows, title, len(self), unit="images", delay=2, leave=False, disable=None)
        with io.FileIO(self.path) as file:
            for i, (offset, height, width, expected) in enumerate(bar):
                pixels = buffer[: bytes_of(height, width, half)]
                file.seek(HEADER + offset)
                if file.readinto(pixels.data) != pixels.size or checksum(pixels, i) != expected:
                    return True
        return False


def hold(file: IO[bytes] | io.FileIO) -> None:
    """Have other programs see that a store is used, until the file is closed; where files cannot be locked, do nothing."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)  # waits for one that looks whether it is held, and lets go at once


def held(path: str) -> bool | None:
    """Check whether a program uses the store, or builds it; None where that cannot be found out.

    Raises:
        OSError: it cannot be opened.
    """
    if fcntl is None:
        return None
    try:
        file = io.FileIO(path, "r+")  # NFS locks for one alone only what may be written to
    except PermissionError:
        file = io.FileIO(path)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        return False


def identity(file: io.FileIO) -> tuple[int, int]:
    """Find what tells a file from any other that gets its name: the device, and its number there."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


FIELDS = {"format": int, "images_key": str, "root": str, "side": int, "half": bool, "images": int, "bytes": int, "index": int, "header": int}  # fmt: skip


def read_header(file: io.FileIO) -> dict[str, Any]:
    """Read the header of a store file.

    Raises:
        ValueError: not one, or one that is damaged or was not finished.
    """
    file.seek(0)
    try:
        header = json.loads(file.read(HEADER))
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is damaged") from error
    if isinstance(header, dict) and header.get("format") != FORMAT:
        raise ValueError("it has another format")
    if not isinstance(header, dict) or {name: type(value) for name, value in header.items()} != FIELDS:
        raise ValueError("its header is damaged")
    if header["header"] != header_checksum(header):
        raise ValueError("its header is damaged")
    if os.fstat(file.fileno()).st_size != HEADER + header["bytes"] + header["images"] * INDEX.itemsize:
        raise ValueError("it has lost its end")
    return header


def header_checksum(header: Mapping[str, Any]) -> int:
    """Hash a header, but for this hash."""
    rest = {name: value for name, value in sorted(header.items()) if name != "header"}
    return checksum(np.frombuffer(json.dumps(rest).encode(), np.uint8))


def read_index(file: io.FileIO, header: Mapping[str, Any]) -> NDArray:
    """Read the index of a store file.

    Raises:
        ValueError: it is damaged.
    """
    file.seek(HEADER + header["bytes"])
    index = np.frombuffer(file.read(header["images"] * INDEX.itemsize), INDEX)
    if checksum(index) != header["index"]:
        raise ValueError("its index is damaged")
    return index


def open_store(path: str, images: EncodedImages, key: str, check: bool = False) -> StoredImages:
    """Open the store in `path`.

    key: of `store_key`, that the store must have been made with
    check: also compare every pixel with what was stored

    Raises:
        OSError, ValueError: there is none, or it is damaged.
    """
    stored = StoredImages(path, images)
    if stored.header["images_key"] != key:
        raise ValueError("it is of other images")
    if check and stored.damaged():
        raise ValueError("its pixels are damaged")
    return stored
