"""Folders of safetensors files: what they hold, checked before a byte of payload is read.

Knows the file format (8-byte length, JSON header, payload) and the index of shards; must not know any model.
Nothing else is loaded: pickle files can run code.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from kvkeye.errors import ConfigError, WeightError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 100 << 20  # the limit of the reference implementation
MAX_SHARD_BYTES = 5_000_000_000
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; `start` and `stop` are byte offsets into the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def list_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name; reads headers only.

    Raises
        ConfigError  no such folder
        WeightError  no safetensors, only pickles, a damaged file, or shards that disagree with their index
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"model folder: {str(folder)!r} is not a folder; required is one with config.json and *.safetensors. "
            "Check the path, or download the checkpoint first."
        )
    if (folder / INDEX).is_file():
        return _sharded(folder)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    if len(files) != 1:
        raise WeightError(_no_weights(folder, files))
    return read_header(files[0])


def _no_weights(folder: Path, files: list[Path]) -> str:
    if files:
        return (
            f"{folder}: {len(files)} safetensors files and no {INDEX}; required is {SINGLE}, or shards with their "
            "index. Download the index too."
        )
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        return (
            f"{folder}: weights are in {', '.join(pickles[:4])}; pickle files can run code and are never loaded. "
            "Use the safetensors version of this checkpoint, or convert it where you trust it."
        )
    return (
        f"{folder}: no {INDEX} and no {SINGLE}; the weights are required there. "
        "Download the checkpoint's safetensors files."
    )


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    path = folder / INDEX
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise WeightError(
            f"{path}: {path.stat().st_size} bytes; at most {MAX_HEADER_BYTES} are read. Download it again."
        )
    weight_map = _load_json(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{path}: weight_map is missing; required is one file name per tensor. Download it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise WeightError(
                f"{path}: {name} is in {file!r}; required is the name of a .safetensors file beside the index. "
                "Do not use this checkpoint if you do not know where it comes from."
            )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            wanted = [name for name, where in weight_map.items() if where == file]
            raise WeightError(
                f"{folder / file}: no such file; {INDEX} places {_some(wanted)} there. Download the missing shard."
            )
        for name, stored in read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise WeightError(
                    f"{folder / file}: holds {name}, which {INDEX} places in {weight_map.get(name)!r}; shards and "
                    "index must agree. Download both from the same revision."
                )
            tensors[name] = stored
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise WeightError(
            f"{path}: {_some(absent)} absent from {weight_map[absent[0]]}; shards and index must agree. "
            "Download both from the same revision."
        )
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises WeightError that names the file and the tensor."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise WeightError(
                f"{path}: {size} bytes with a header of {length}; not a safetensors file, or truncated. "
                "Download it again."
            )
        header = _load_json(path, stream.read(length))
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors.values(), 8 + length, size)
    return tensors


def _load_json(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise WeightError(f"{path}: {twice} appears twice in the header; names must differ. Download it again.")
        return found

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except WeightError:
        raise
    except (ValueError, RecursionError) as error:  # also an integer of more digits than Python reads
        raise WeightError(f"{path}: the header is not JSON ({error}). Download the file again.") from None
    if not isinstance(header, dict):
        raise WeightError(f"{path}: the header is a JSON {type(header).__name__}; an object is required.")
    return header


def _stored(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightError(f"{path}: {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}. Convert the checkpoint.")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise WeightError(
            f"{path}: {name} has shape {shape!r} and data_offsets {offsets!r}; required are a list of sizes and "
            "[start, stop]. Download the file again."
        )
    stored = StoredTensor(name, DTYPES[dtype], tuple(shape), path, base + offsets[0], base + offsets[1])
    required = stored.num_elements * stored.dtype.itemsize
    if stored.num_bytes != required:
        raise WeightError(
            f"{path}: {name} {dtype} {list(shape)} requires {required} bytes; data_offsets {offsets} give "
            f"{stored.num_bytes}. Download the file again."
        )
    return stored


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _check_layout(path: Path, tensors: Iterable[StoredTensor], base: int, size: int) -> None:
    """The payload must be covered once, without a gap, up to the end of the file."""
    end = base
    previous = "the header"
    for stored in sorted(tensors, key=lambda s: (s.start, s.stop)):
        if stored.start != end:
            relation = "overlaps" if stored.start < end else "leaves a gap after"
            raise WeightError(f"{path}: {stored.name} {relation} {previous}. Download the file again.")
        if stored.stop > size:
            raise WeightError(
                f"{path}: truncated; {stored.name} ends at byte {stored.stop}, the file at {size}. Download it again."
            )
        end, previous = stored.stop, stored.name
    if end != size:
        raise WeightError(f"{path}: {size - end} bytes follow the last tensor. Download the file again.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def map_tensors(tensors: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Each stored tensor with a view of its mapped file, file by file; pages are read when they are used."""
    by_file: dict[Path, list[StoredTensor]] = {}
    for stored in tensors:
        by_file.setdefault(stored.file, []).append(stored)
    for file, group in by_file.items():
        raw = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
        for stored in sorted(group, key=lambda s: s.start):
            data = raw[stored.start : stored.stop]
            if stored.start % stored.dtype.itemsize:
                data = data.clone()  # the format asks for alignment but does not require it
            yield stored, data.view(stored.dtype).view(stored.shape)


def save_tensors(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Writes named tensors as one file, or as shards with an index; those of floats are converted when written.

    Every file appears under its name only when it is complete.
    """
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * _written(tensor, dtype).itemsize
        if shards[-1] and used + num_bytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += num_bytes
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0], dtype)
        (folder / INDEX).unlink(missing_ok=True)  # of an earlier save in shards
        return [folder / SINGLE]
    files = [folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        _write(file, shard, dtype)
    total = sum(tensor.numel() * _written(tensor, dtype).itemsize for tensor in tensors.values())
    weight_map = {name: file.name for file, shard in zip(files, shards) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def _write(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        entries = {name: (_written(tensor, dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        stream.write(header_bytes(entries))
        for tensor in tensors.values():
            data = tensor.detach().to("cpu", _written(tensor, dtype)).contiguous().flatten().view(torch.uint8)
            stream.write(data.numpy().data)
    os.replace(partial, path)


def _written(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def header_bytes(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Length and header of a file whose tensors follow each other in this order; padded so that payload aligns."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in entries.items():
        stop = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
