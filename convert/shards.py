"""Streaming reader and writer of the tensors of a Hugging Face folder, in constant memory.

Tensors are read and written in chunks of CHUNK_SIZE elements, of which a few are in memory. Files are read instead of
mapped: pages of a mapped file would count as memory of the process.
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
from typing import BinaryIO, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from xxhash import xxh3_128

from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json, write_json

CHUNK_SIZE = 2**19  # elements: a chunk stays in the processor's cache from one step to the next
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CODES = {  # names of dtypes in safetensors files
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
    """Dtype and shape of a tensor."""

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
    """Tensor in a file, stored contiguously in row-major order from byte `begin` on."""

    file: Path
    begin: int

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements `start` to `stop` (default: all) as a flat tensor; InputError if the file has fewer."""
        stop = self.numel if stop is None else min(stop, self.numel)
        buffer = torch.empty((stop - start) * self.dtype.itemsize, dtype=torch.uint8)
        unread = memoryview(buffer.numpy())
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.begin + start * self.dtype.itemsize)
                while unread:
                    if not (count := file.readinto(unread)):
                        raise InputError(f"{self.file}: ends within a tensor; download the file again")
                    unread = unread[count:]
        except OSError as error:
            raise InputError(f"{self.file}: cannot be read ({error.strerror})") from None
        return buffer.view(self.dtype)


# ---- Reading ----


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of the safetensors files in a folder, or else of its `pytorch_model.bin` files.

    Raises:
        InputError: a file is missing, incomplete, or does not match the index of the folder.
    """
    for single, index, read in ((SINGLE, INDEX, read_safetensors), (PICKLED, PICKLED_INDEX, read_pickled)):
        if (folder / single).exists():
            return read(folder / single)
        if (folder / index).exists():
            return _read_shards(folder / index, read)
    raise InputError(f"{folder}: has no weights: neither {SINGLE} nor {PICKLED}, nor an index of several such files")


def _read_shards(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    file_of = read_json(index, "the file of each tensor").get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise InputError(f"{index}: should have a weight_map, tensor -> file")
    weights: dict[str, StoredTensor] = {}
    for name, file in file_of.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index}: tensor {name!r} should be in a file of the same folder, not in {file!r}")
        if not (index.parent / file).is_file():
            raise InputError(f"{index.parent / file}: no such file, but {index.name} names it; download it again")
    for file in sorted(set(file_of.values())):
        shard = read(index.parent / file)
        expected = {name for name in file_of if file_of[name] == file}
        if wrong := sorted(expected ^ shard.keys()):
            has = "has no" if wrong[0] in expected else "has the"
            raise InputError(
                f"{index.parent / file}: {has} tensor {wrong[0]!r}, unlike {index.name}; download both again"
            )
        weights |= shard
    return weights


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of one file, in file order; InputError if it is no complete safetensors file."""
    try:
        with safe_open(path, "pt") as file:  # checks that the file is complete, and that its tensors leave no gaps
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            specs = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
        begin = 8 + struct.unpack("<Q", path.open("rb").read(8))[0]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); download it again") from None
    weights = {}
    for name, (code, shape) in specs.items():
        if code not in DTYPES:
            raise InputError(f"{path}: tensor {name!r} has the unsupported dtype {code}; save it in another one")
        weights[name] = StoredTensor(DTYPES[code], shape, path, begin)
        begin += weights[name].nbytes
    return weights


def read_pickled(path: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of a file by `torch.save`; InputError for objects other than tensors, never unpickled."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imported here: takes a second

    try:
        with FakeTensorMode():  # tensors without data, with the offset of their bytes in the file
            content = torch.load(path, weights_only=True, mmap=True)
    except UnpicklingError:
        raise InputError(
            f"{path}: contains objects other than tensors, which are not loaded; get safetensors files"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a complete file of weights, or of an old torch version ({reason}); download it again, or "
            "get safetensors files"
        ) from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: should contain tensors by name; get safetensors files")
    weights = {}
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, but should be a tensor")
        if tensor.dtype not in CODES or not tensor.is_contiguous():
            raise InputError(f"{path}: tensor {name!r} is {tensor.dtype}, or not contiguous; save it as safetensors")
        begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
        weights[name] = StoredTensor(tensor.dtype, tuple(tensor.shape), path, begin)
    return weights


def prefetch(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """Yield the same items (none of them None), computed by another thread up to `count` items ahead."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        futures = deque(thread.submit(next, items, None) for _ in range(count))
        while (item := futures.popleft().result()) is not None:
            futures.append(thread.submit(next, items, None))
            yield item


class Chunk(NamedTuple):
    """Elements of two tensors of one name, from element `start` on; None where a tensor has ended."""

    name: str
    start: int
    base: torch.Tensor | None
    other: torch.Tensor | None
    checksum: str | None  # in the last chunk of a tensor: XXH3 of dtype, shape and bytes of the base


def paired_chunks(pairs: Mapping[str, tuple[StoredTensor | None, StoredTensor]]) -> Iterator[Chunk]:
    """Yield the tensors of a base and of another model in chunks, as a pipeline of threads.

    One thread reads, one computes checksums, and the caller computes. Torch is limited to one thread: more of them
    would compete with the pipeline.
    """
    torch.set_num_threads(1)

    def read_chunks() -> Iterator[Chunk]:
        for name, pair in pairs.items():
            longest = max(tensor.numel for tensor in pair if tensor)
            for start in range(0, max(1, longest), CHUNK_SIZE):
                stop = start + CHUNK_SIZE
                base, other = (t.read(start, stop) if t and start < max(1, t.numel) else None for t in pair)
                yield Chunk(name, start, base, other, "last" if stop >= longest else None)

    def add_checksums() -> Iterator[Chunk]:
        for chunk in prefetch(read_chunks()):
            if chunk.start == 0:
                digest = xxh3_128(str(pairs[chunk.name][0]).encode())
            if chunk.base is not None:
                digest.update(chunk.base.view(torch.uint8).numpy())
            yield chunk._replace(checksum=digest.hexdigest()) if chunk.checksum else chunk

    size = sum(tensor.nbytes for pair in pairs.values() for tensor in pair if tensor)
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:  # on a terminal
        for chunk in prefetch(add_checksums()):
            yield chunk
            bar.update(sum(values.nbytes for values in (chunk.base, chunk.other) if values is not None))


# ---- Writing ----


def plan_shards(tensors: Mapping[str, Spec], shard_bytes: int = 5 * 10**9) -> dict[str, dict[str, Spec]]:
    """Distribute tensors in order over files of at most `shard_bytes`, at least one each: file -> name -> tensor."""
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
    """Distribute tensors over files as in the folder they were read from: file -> name -> tensor."""
    files = list(dict.fromkeys(tensor.file for tensor in weights.values()))
    return {
        name: {key: tensor for key, tensor in weights.items() if tensor.file == file}
        for name, file in zip(shard_names(len(files)), files, strict=True)
    }


def shard_names(count: int) -> list[str]:
    return [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] if count > 1 else [SINGLE]


class Writer:
    """Writer of safetensors files: `with Writer(folder, files) as writer: writer.put(name, tensor)`, in any order.

    The headers are written first, so that tensors can be put whole or in chunks without being held in memory.

    Args:
        files: file -> name -> tensor, by `plan_shards` or `shard_layout_like`; several files get an index.

    Raises:
        OSError: a file cannot be written.
        ValueError: on exit, if a tensor of `files` is incomplete.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Spec]]):
        self.folder, self.files = folder, files
        self.locations: dict[str, tuple[BinaryIO, int, Spec]] = {}  # name -> (file, first byte, dtype and shape)
        self.num_missing = {name: tensor.numel for tensors in files.values() for name, tensor in tensors.items()}
        self.open_files = ExitStack()

    def __enter__(self) -> "Writer":
        for name, tensors in self.files.items():
            file = self.open_files.enter_context((self.folder / name).open("wb", buffering=0))
            header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
            end = 0
            for key, tensor in tensors.items():
                begin, end = end, end + tensor.nbytes
                header[key] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            _write(file, struct.pack("<Q", len(text)) + text)
            for key, tensor in tensors.items():
                self.locations[key] = file, 8 + len(text) + header[key]["data_offsets"][0], tensor
        return self

    def put(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write the elements from `start` on, converted to the planned dtype."""
        file, begin, spec = self.locations[name]
        tensor = tensor.detach().to(spec.dtype).contiguous().flatten()
        file.seek(begin + start * spec.dtype.itemsize)
        _write(file, tensor.view(torch.uint8).numpy())
        self.num_missing[name] -= len(tensor)

    def __exit__(self, kind, error, trace) -> None:
        self.open_files.close()
        if kind is not None:
            return
        if incomplete := next((name for name, count in self.num_missing.items() if count), None):
            raise ValueError(f"{incomplete}: {self.num_missing[incomplete]} of its elements have not been written")
        if len(self.files) > 1:
            sizes = [tensor.nbytes for tensors in self.files.values() for tensor in tensors.values()]
            file_of = {name: file for file, tensors in self.files.items() for name in tensors}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(file_of.items()))}
            write_json(self.folder / INDEX, index, indent=2)


def _write(file: BinaryIO, content: Sequence[int]) -> None:
    unwritten = memoryview(content)
    while unwritten:  # an unbuffered file can write a part
        unwritten = unwritten[file.write(unwritten) :]
