"""The tensors of a Hugging Face folder, read and written a piece at a time, whatever the model's size.

Files are read, not mapped into memory, where their pages would count as the process's own; a shard is written without
ever being held. A piece has PIECE elements, and a few of them are all that is in memory.
"""

import json
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from xxhash import xxh3_128

from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json, write_json

PIECE = 2**19  # elements: few enough to stay in a processor's cache from one step to the next
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CODES = {  # dtypes as safetensors has them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """What a tensor looks like."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{CODES[self.dtype]} {list(self.shape)}"


@dataclass(frozen=True)
class StoredTensor(Spec):
    """A tensor in a file: its bytes, row by row, stand there from byte `begin` on."""

    file: Path
    begin: int

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `start` to `stop` (default: all) as a flat tensor; InputError where the file has fewer."""
        stop = self.numel if stop is None else min(stop, self.numel)
        found = torch.empty((stop - start) * self.dtype.itemsize, dtype=torch.uint8)
        rest = memoryview(found.numpy())
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.begin + start * self.dtype.itemsize)
                while rest:
                    if not (count := file.readinto(rest)):
                        raise InputError(f"{self.file}: ends within a tensor; get the file again")
                    rest = rest[count:]
        except OSError as error:
            raise InputError(f"{self.file}: cannot be read ({error.strerror})") from None
        return found.view(self.dtype)


# ---- Reading ----


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor, file by file, of a folder of safetensors files or, where it has none, `pytorch_model.bin` files.

    Raises:
        InputError: a file is missing, cut short, or not what the folder's index says.
    """
    for single, index, read in ((SINGLE, INDEX, read_safetensors), (PICKLED, PICKLED_INDEX, read_pickled)):
        if (folder / single).exists():
            return read(folder / single)
        if (folder / index).exists():
            return _read_shards(folder / index, read)
    raise InputError(f"{folder}: has no weights: neither {SINGLE} nor {PICKLED}, nor an index of several such files")


def _read_shards(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    file_of = read_json(index, "which tensor is in which file").get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise InputError(f"{index}: should have a weight_map, tensor -> file")
    weights: dict[str, StoredTensor] = {}
    for name, file in file_of.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index}: tensor {name!r} should be in a file beside it, not in {file!r}")
        if not (index.parent / file).is_file():
            raise InputError(f"{index.parent / file}: no such file, but {index.name} names it; get it again")
    for file in sorted(set(file_of.values())):
        found = read(index.parent / file)
        named = {name for name, its in file_of.items() if its == file}
        if wrong := sorted(named ^ found.keys()):
            has = "has not" if wrong[0] in named else "has"
            raise InputError(
                f"{index.parent / file}: {has} the tensor {wrong[0]!r}, other than {index.name} says; "
                "they are of different models, or one of them is old"
            )
        weights |= found
    return weights


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one file, in the order in which they stand there; InputError for what is no such file."""
    try:
        with safe_open(path, "pt") as file:  # which checks that the file is whole, and that there are no holes in it
            found = {name: file.get_slice(name) for name in file.offset_keys()}
            looks = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in found.items()}
        begin = 8 + struct.unpack("<Q", path.open("rb").read(8))[0]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); get it again") from None
    weights = {}
    for name, (code, shape) in looks.items():
        if code not in DTYPES:
            raise InputError(f"{path}: tensor {name!r} is of dtype {code}, which is not known here")
        weights[name] = StoredTensor(DTYPES[code], shape, path, begin)
        begin += weights[name].nbytes
    return weights


def read_pickled(path: Path) -> dict[str, StoredTensor]:
    """As `read_safetensors`, of a file by `torch.save`, of which nothing but tensors is ever opened."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second that others need not wait

    try:
        with FakeTensorMode():  # tensors that know where in the file their bytes are
            content = torch.load(path, weights_only=True, mmap=True)
    except UnpicklingError:
        raise InputError(
            f"{path}: holds something else than tensors, which is not opened; ask for safetensors"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a whole file of weights, or an old torch's ({reason}); get it again, or as safetensors"
        ) from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: should hold tensors by name")
    weights = {}
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, but should be a tensor")
        if tensor.dtype not in CODES or not tensor.is_contiguous():
            raise InputError(f"{path}: tensor {name!r} is {tensor.dtype}, or not row by row; save it as safetensors")
        begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
        weights[name] = StoredTensor(tensor.dtype, tuple(tensor.shape), path, begin)
    return weights


def prefetch(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """The same items (none of them None), made by another thread up to `count` before they are asked for."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(count))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


class Piece(NamedTuple):
    """Elements of two tensors of one name, from element `start` on; None where one of them has no more."""

    name: str
    start: int
    base: torch.Tensor | None
    other: torch.Tensor | None
    checksum: str | None  # with a tensor's last piece: XXH3 of the base's dtype, shape and bytes


def paired_chunks(pairs: Mapping[str, tuple[StoredTensor | None, StoredTensor]]) -> Iterator[Piece]:
    """The tensors of a base and of another model a piece at a time, read and summed up by threads of their own.

    Torch is left with one thread: more of them would wait for each other, and for these.
    """
    torch.set_num_threads(1)

    def read() -> Iterator[Piece]:
        for name, pair in pairs.items():
            longest = max(tensor.numel for tensor in pair if tensor)
            for start in range(0, max(1, longest), PIECE):
                found = (t.read(start, start + PIECE) if t and start < max(1, t.numel) else None for t in pair)
                yield Piece(name, start, *found, "last" if start + PIECE >= longest else None)

    def summed() -> Iterator[Piece]:
        for piece in prefetch(read()):
            base = pairs[piece.name][0]
            if piece.start == 0:
                digest = xxh3_128(str(base).encode())
            if piece.base is not None:
                digest.update(piece.base.view(torch.uint8).numpy())
            yield piece._replace(checksum=digest.hexdigest()) if piece.checksum else piece

    size = sum(tensor.nbytes for pair in pairs.values() for tensor in pair if tensor)
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:  # on a terminal
        for piece in prefetch(summed()):
            yield piece
            bar.update(sum(part.nbytes for part in (piece.base, piece.other) if part is not None))


# ---- Writing ----


def plan(tensors: Mapping[str, Spec], shard_bytes: int = 5 * 10**9) -> dict[str, dict[str, Spec]]:
    """File -> name -> tensor: in order, as many as a file of `shard_bytes` holds, one at least."""
    shards: list[dict[str, Spec]] = []
    size = 0
    for name, tensor in tensors.items():
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def shard_layout_like(weights: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """File -> name -> tensor, as another folder has them."""
    files = list(dict.fromkeys(tensor.file for tensor in weights.values()))
    return {
        name: {key: tensor for key, tensor in weights.items() if tensor.file == file}
        for name, file in zip(shard_names(len(files)), files, strict=True)
    }


def shard_names(count: int) -> list[str]:
    return [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] if count > 1 else [SINGLE]


class Writer:
    """`with Writer(folder, files) as writer: writer.put(name, tensor)`, in any order, each tensor whole or in pieces.

    Args:
        files: file -> name -> tensor, as `plan` and `shard_layout_like` give it; several files get an index.

    Raises:
        OSError: as writing does.
        ValueError: a tensor of `files` has not come.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Spec]]):
        self.folder, self.files = folder, files
        self.place: dict[str, tuple] = {}  # name -> file, where the tensor begins, what it is
        self.missing = {name: tensor.numel for tensors in files.values() for name, tensor in tensors.items()}
        self.open = ExitStack()

    def __enter__(self) -> "Writer":
        for name, tensors in self.files.items():
            file = self.open.enter_context((self.folder / name).open("wb", buffering=0))
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for key, tensor in tensors.items():
                begin, end = end, end + tensor.nbytes
                header[key] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            _write(file, struct.pack("<Q", len(text)) + text)
            for key, tensor in tensors.items():
                self.place[key] = file, 8 + len(text) + header[key]["data_offsets"][0], tensor
        return self

    def put(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write elements from `start` on; a dtype that is not the planned one is converted."""
        file, begin, planned = self.place[name]
        tensor = tensor.detach().to(planned.dtype).contiguous().flatten()
        file.seek(begin + start * planned.dtype.itemsize)
        _write(file, tensor.view(torch.uint8).numpy())
        self.missing[name] -= len(tensor)

    def __exit__(self, kind, error, trace) -> None:
        self.open.close()
        if kind is not None:
            return
        if wrong := next((name for name, left in self.missing.items() if left), None):
            raise ValueError(f"{wrong}: {self.missing[wrong]} of its elements have not been written")
        if len(self.files) > 1:
            sizes = [tensor.nbytes for tensors in self.files.values() for tensor in tensors.values()]
            file_of = {name: file for file, tensors in self.files.items() for name in tensors}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(file_of.items()))}
            write_json(self.folder / INDEX, index, indent=2)


def _write(file, content: Sequence) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
