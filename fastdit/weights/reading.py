"""Reading files of weights, so that no file can run code, fill the memory, or be taken for what it is not.

Two formats are read, told apart by their content: safetensors, and the zip files of `torch.save`. In the second the
structure is a pickle, a program. It is read by torch's restricted reader, `torch.load(weights_only=True)`, and only
after `_check_pickle` has gone through it without running it: that reader keeps code from running, but a few bytes can
make it fill the memory or work for ever. There is no other way in when either refuses.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import pickle
import pickletools
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import PathLike

# What weights may be stored as. float64 is the average of somebody who was careful; integers, 8-bit floats and
# complex numbers are no DiT's.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# DiT-XL/2's training checkpoint has a pickle of 160 KB and 50 thousand operations, and 1500 records; a header of its
# weights has 30 KB.
MAX_HEADER = 8 * 2**20  # bytes of JSON, which becomes objects of thirty times that at worst
MAX_DIRECTORY = 16 * 2**20  # bytes of a zip file's directory
MAX_PICKLE = 16 * 2**20  # bytes
MAX_OPERATIONS = 10**6  # of a pickle; each makes an object of about 100 bytes
MAX_EXPANDED = 2**24  # items and characters that a pickle's references lead to, counted each time
MAX_DEPTH = 32  # containers within containers
MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class Checkpoint:
    """What was read of a file of weights.

    tensors: on the CPU, dense and contiguous, under the file's names without `module.` and `_orig_mod.`.
    metadata: plain data: the texts in a safetensors header, or `vars(args)` of a training checkpoint.
    optimizer: the entry "opt" of a training checkpoint, if it was asked for and is there.
    notes: what a user should know, one line each.
    entry: of a training checkpoint, the set of weights that was taken; "" where the file is one set.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    optimizer: dict[str, Any] | None
    notes: list[str]
    entry: str = ""


def read_checkpoint(
    path: PathLike,
    *,
    which: str = "ema",
    optimizer: bool = False,
    check_finite: bool = True,
    max_bytes: int | None = None,
) -> Checkpoint:
    """The weights in a file of safetensors or of `torch.save` (a state dict, or the original's training checkpoint).

    Tensors are parts of the file, mapped into memory: reading takes no memory of their size, and the file must not be
    written to while they are in use (replacing it, as every writer here does, is no harm).

    Args:
        path: the file; its content decides how it is read. Only a file that calls itself .safetensors has to be one.
        which: of a training checkpoint, {"model", "ema", "opt", "args"}: "ema" or "model", or "ema:0.9999" for the
            entry `ema:0.9999`, `ema_0.9999` or `ema-0.9999`. A file with one set of weights has it under "ema" and
            "model" alike, and under what the file is named after.
        optimizer: also read the entry "opt".
        check_finite: refuse NaN and infinities.
        max_bytes: the most that the file, and the tensors in it, may take; by default four times the file.

    Raises FileNotFoundError, and ValueError in one line that names the file and the reason: truncated, a web page,
    another format, a pickle that calls for more than tensors, a tensor that is not dense, finite and of
    `WEIGHT_DTYPES`, or no such entry.
    """
    _require_which(which)
    with _naming(path):
        file = _require_file(path)
        size = file.stat().st_size
        limit = 4 * size if max_bytes is None else max_bytes
        if size > limit:
            raise ValueError(f"{size} bytes, more than max_bytes={limit}")
        accept = _Acceptance(limit, check_finite)
        if _format_of(file, size) == "safetensors":
            tensors, metadata = _read_safetensors(file, size, _WEIGHTS)
            state, notes = _named_tensors(tensors, "", accept)
            return Checkpoint(state, metadata, None, notes + _dtype_notes(state))
        content = _read_torch(file, size)
        entry, weights = _choose(content, which, file.stem)
        state, notes = _named_tensors(weights, entry, accept)
        notes += _dtype_notes(state)
        metadata, dropped = _arguments_of_training(content) if entry else ({}, [])
        opt = None
        if optimizer and entry and "opt" in content:
            opt = _optimizer_state(content["opt"], "opt", accept)
            if not isinstance(opt, dict):
                raise ValueError(f"opt is a {type(opt).__name__}, expected a dict")
        return Checkpoint(state, metadata, opt, notes + dropped, entry)


def load_weights(
    path: PathLike, *, which: str = "ema", check_finite: bool = True
) -> dict[str, Tensor]:
    """The tensors of a file of weights, on the CPU: `read_checkpoint(...).tensors`, its arguments and errors."""
    return read_checkpoint(path, which=which, check_finite=check_finite).tensors


def load_tensors(path: PathLike) -> dict[str, Tensor]:
    """All tensors of a safetensors file, of any dtype and any value, on the CPU: for states that are no weights.

    Raises FileNotFoundError, and ValueError in one line that names the file and the reason.
    """
    with _naming(path):
        file = _require_file(path)
        size = file.stat().st_size
        if _format_of(file, size) != "safetensors":
            raise ValueError("not a safetensors file")
        return _read_safetensors(file, size, _ITEM_SIZES)[0]


def require_safetensors_ending(path: PathLike) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors files are written")


# ------------------------------------------------------------------ which file it is


@contextlib.contextmanager
def _naming(path: PathLike) -> Iterator[None]:
    """Puts the file's name before every refusal, and the refusal into one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {_clipped(str(error), 1000)}") from None


def _require_file(path: PathLike) -> Path:
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if file.is_dir():
        raise ValueError("expected a file of weights, this is a folder")
    if not file.is_file():
        raise ValueError("expected a file of weights, this is a device or a pipe")
    return file


_ZIP = b"PK\x03\x04"

# What other files begin with.
_SIGNATURES = {
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"PK": "a zip file without entries, or a part of one",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
}


def _format_of(file: Path, size: int) -> str:
    """ "safetensors" or "torch"; raises ValueError saying what else the file is."""
    with open(file, "rb") as opened:
        start = opened.read(512)
    if not start:
        raise ValueError("the file is empty")
    # The length of the header, 8 bytes, and the header, a JSON object. This comes first because a length can look like
    # the beginning of anything.
    if len(start) >= 8 and start[5:8] == b"\0\0\0" and start[8:9] in (b"{", b""):
        return "safetensors"
    if start.startswith(_ZIP):
        if file.suffix == ".safetensors":
            raise ValueError(
                "named .safetensors, but a zip file of torch.save, which holds a pickle; name it .pt to read it as that"
            )
        return "torch"
    for signature, reason in _SIGNATURES.items():
        if start.startswith(signature):
            raise ValueError(f"this is {reason}")
    if start[257:262] == b"ustar":
        raise ValueError(
            "this is a TAR file; torch.save wrote them before 0.4, and torch.load can run code in them"
        )
    if start[0] == 0x80 and len(start) > 1 and start[1] <= pickle.HIGHEST_PROTOCOL:
        raise ValueError(
            "this is a bare pickle (torch.save wrote them before 1.6), which can run code when it is read; load it in "
            "a sandbox and save its state dict with a newer torch.save"
        )
    if start[0] == 0x08 and start[2:3] == b"\x12":
        raise ValueError("this is an ONNX file")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise ValueError("this is a web page; the download did not give the file itself")
    if text.startswith((b"{", b"[")) and b"\0" not in start:
        said = _clipped(start.decode("utf-8", "replace"), 80)
        raise ValueError(
            f"this is JSON text, perhaps the answer of a server, and no weights: {said}"
        )
    if size < 8 or file.suffix == ".safetensors":
        raise ValueError("truncated or not a safetensors file")
    raise ValueError("neither a safetensors file nor a zip file of torch.save")


# ------------------------------------------------------------------ safetensors

_WEIGHTS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ITEM_SIZES = {**_WEIGHTS, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2}
_ITEM_SIZES |= {"U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


def _read_safetensors(
    file: Path, size: int, dtypes: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the texts of the header's `__metadata__`.

    The header is checked here because the library's reader takes 100 MB of it and lets the last of two equal keys win.
    """
    with open(file, "rb") as opened:
        prefix = opened.read(8)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise ValueError(f"its header is said to have {length} bytes, allowed are {MAX_HEADER}")
        if 8 + length > size:
            raise ValueError(f"truncated: {size} bytes, the header alone is said to have {length}")
        text = opened.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"truncated or not a safetensors file: its header is not JSON: {error}"
        ) from None
    if not isinstance(header, dict):
        raise ValueError(f"its header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ in its header holds more than texts")
    _check_layout(header, size - 8 - length, dtypes)
    try:
        return load_file(file), metadata
    except SafetensorError as error:
        raise ValueError(f"truncated or not a safetensors file ({error})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"its header has {_quoted(name)} twice")
    return found


def _check_layout(header: Mapping[str, Any], size: int, dtypes: Mapping[str, int]) -> None:
    """Raises ValueError unless the tensors in `header` fill the `size` bytes after it, without gaps and overlaps."""
    places = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{_quoted(name)}: its header entry is not dtype, shape, data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in dtypes:
            allowed = ", ".join(dtypes)
            raise ValueError(f"{_quoted(name)} is of dtype {_quoted(dtype)}; read are {allowed}")
        if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{_quoted(name)}: shape {_quoted(shape)} is no shape")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{_quoted(name)}: data_offsets {_quoted(offsets)} are no two offsets")
        if offsets[1] - offsets[0] != math.prod(shape) * dtypes[dtype]:
            raise ValueError(
                f"{_quoted(name)}: data_offsets {offsets} do not fit {dtype} of shape {shape}"
            )
        places.append((*offsets, name))
    end = 0
    for start, stop, name in sorted(places):
        if start != end:
            raise ValueError(
                f"{_quoted(name)} begins at byte {start}, what is before it ends at {end}"
            )
        end = stop
    if end != size:
        why = "truncated: " if end > size else ""
        raise ValueError(f"{why}{size} bytes after the header, which tells of {end}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


# ------------------------------------------------------------------ zip files of torch.save

# What torch.load raises when a file is not what it should be.
_TORCH_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    OverflowError,
    struct.error,
)


# Of all threads: torch's list of safe globals is the process's, and leaving a block takes away what another relies on.
_SAFE_GLOBALS = threading.Lock()


def _read_torch(file: Path, size: int) -> Any:
    """What `torch.save` wrote: plain containers, tensors in the mapped file, and argparse.Namespace."""
    # Before 2.10 its reader can be made to corrupt memory (CVE-2026-24747), before 2.6 to run code (CVE-2025-32434).
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise ValueError(
            f"files of torch.save are read by torch 2.10 and later, whose reader is safe; this is {torch.__version__}"
        )
    _check_pickle(*_records(file, size))
    with _SAFE_GLOBALS, _namespace_allowed():
        try:
            return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        except _TORCH_ERRORS as error:
            raise ValueError(f"torch.load refuses it: {type(error).__name__}: {error}") from error


def _namespace_allowed() -> contextlib.AbstractContextManager[None]:
    """Lets torch.load make an argparse.Namespace, for a block and not for the process."""
    if argparse.Namespace in torch.serialization.get_safe_globals():
        return contextlib.nullcontext()  # by the user, and leaving the block would take it away
    return torch.serialization.safe_globals([argparse.Namespace])


def _records(file: Path, size: int) -> tuple[bytes, dict[str, int]]:
    """The pickle in a zip file of `torch.save`, and the sizes of its storages by their keys."""
    try:
        with open(file, "rb") as opened:
            _check_directory(opened, size)
            with zipfile.ZipFile(opened) as archive:
                records = _checked_records(archive.infolist(), size)
                root = next(iter(records)).split("/")[0]
                if f"{root}/constants.pkl" in records:
                    raise ValueError(
                        "this is a TorchScript archive, a program; save its state dict instead"
                    )
                if f"{root}/data.pkl" not in records:
                    raise ValueError("a zip file without data.pkl, so not one of torch.save")
                if any(not name.startswith(f"{root}/") for name in records):
                    raise ValueError(
                        "a zip file with more than one folder, so not one of torch.save"
                    )
                if records[f"{root}/data.pkl"] > MAX_PICKLE:
                    raise ValueError(
                        f"its pickle has {records[f'{root}/data.pkl']} bytes, allowed are {MAX_PICKLE}"
                    )
                content = archive.read(f"{root}/data.pkl")
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        EOFError,
        struct.error,
        UnicodeError,
    ) as error:
        raise ValueError(f"a truncated or damaged zip file: {error}") from error
    folder = f"{root}/data/"
    return content, {
        name.removeprefix(folder): length
        for name, length in records.items()
        if name.startswith(folder)
    }


def _check_directory(opened: BinaryIO, size: int) -> None:
    """Raises ValueError unless the directory is where every reader of zip files finds it.

    Python's and torch's look for it in different ways. In a file made for it they would see different records, and what
    was checked would not be what is loaded.
    """
    opened.seek(max(0, size - 98))
    tail = opened.read(98).rjust(98, b"\0")
    end = size - 22
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise ValueError("truncated: the zip file's directory is not at its end")
    length, start = struct.unpack("<LL", tail[-10:-2])
    if tail[-42:-38] == b"PK\x06\x07":
        end = size - 98
        (place,) = struct.unpack("<Q", tail[-34:-26])
        if place != end or tail[:4] != b"PK\x06\x06":
            raise ValueError("a damaged zip file: its 64-bit directory is not at its end")
        length, start = struct.unpack("<QQ", tail[40:56])
    if start + length != end:
        raise ValueError("truncated or damaged: the zip file's directory is not where its end says")
    if length > MAX_DIRECTORY:
        raise ValueError(f"its directory has {length} bytes, allowed are {MAX_DIRECTORY}")


def _checked_records(entries: list[zipfile.ZipInfo], size: int) -> dict[str, int]:
    """The sizes of the records by their names."""
    records: dict[str, int] = {}
    seen = set()
    for entry in entries:
        name = entry.orig_filename
        shown = _quoted(name)
        if not (name.isascii() and name.isprintable()):
            raise ValueError(f"record {shown}: a name that torch.save does not write")
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
            raise ValueError(f"record {shown}: a path that leaves the zip file")
        # Without regard to case, as torch looks for them.
        if name.lower() in seen:
            raise ValueError(f"record {shown} is there twice")
        if entry.flag_bits & 1:
            raise ValueError(f"record {shown} is encrypted")
        # torch.save never compresses, what is mapped cannot be, and what is compressed can unpack to anything.
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(
                f"record {shown} is compressed ({entry.compress_size} bytes become {entry.file_size}), which "
                "torch.save does not do; unpack the file and pack it without compression"
            )
        seen.add(name.lower())
        records[name] = entry.file_size
    if not records:
        raise ValueError("a zip file without entries")
    if sum(records.values()) > size:
        raise ValueError("a damaged zip file: its records overlap")
    return records


# ------------------------------------------------------------------ the pickle, gone through without running it

_CALLED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
}
_STORAGES = {
    f"torch.{kind}Storage": size
    for size, kinds in {
        1: ("Byte", "Char", "Bool"),
        2: ("Short", "Half", "BFloat16"),
        4: ("Int", "Float"),
        8: ("Long", "Double", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for kind in kinds
} | {"torch.storage.UntypedStorage": 1}
_DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
_KNOWN = {*_CALLED, *_STORAGES, *_DTYPES, "argparse.Namespace"}

_ESCAPED = {"STRING", "GLOBAL", "INST", "PERSID"}  # pickletools undoes escapes in their texts
_CONSTANTS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(slots=True)
class _Symbol:
    """What an operation of a pickle would make: its kind, its value or its items, and how big it is."""

    kind: str  # constant, text, global, tuple, list, dict, OrderedDict, Namespace, storage, tensor
    value: Any = None
    expanded: int = 1  # items and characters, as if nothing were shared
    depth: int = 0
    shared: bool = False

    def hold(self, *items: _Symbol) -> None:
        # Whoever refers to something that goes on growing can refer to itself, or has been counted too small.
        if self.shared:
            raise ValueError(f"its pickle refers to a {self.kind} before that is complete")
        self.expanded += sum(item.expanded for item in items)
        self.depth = max([self.depth, *(item.depth + 1 for item in items)])
        if self.depth > MAX_DEPTH:
            raise ValueError(f"its pickle is nested more than {MAX_DEPTH} deep")


def _check_pickle(content: bytes, storages: Mapping[str, int]) -> None:
    """Raises ValueError unless the pickle is what `torch.save` writes of containers, tensors and argparse.Namespace.

    Goes through its operations as torch's reader will, with symbols for the values. Known names only are called, on
    what they are meant for; keys are texts and integers; a reference counts as much as what it refers to, so that
    nothing is hashed, printed or copied into more than `MAX_EXPANDED`; and a tensor's storage is as long as the pickle
    says (`storages`: bytes by key).
    """
    foreign = _foreign_globals(content)
    if foreign:
        raise ValueError(
            f"its pickle calls for {_clipped(', '.join(foreign), 300)}, which weights do not need and which can run "
            "code; nothing was run. If you need the file, load it in a sandbox and save its state dict"
        )
    stack: list[_Symbol] = []
    marks: list[int] = []
    memo: dict[int, _Symbol] = {}
    referred = 0

    def pop(count: int) -> list[_Symbol]:
        if len(stack) - (marks[-1] if marks else 0) < count:
            raise ValueError("its pickle takes more than it made")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def pop_to_mark() -> list[_Symbol]:
        if not marks:
            raise ValueError("its pickle takes more than it made")
        taken = stack[marks[-1] :]
        del stack[marks.pop() :]
        return taken

    for name, argument in _operations(content):
        if name in _CONSTANTS:
            stack.append(_Symbol("constant", argument))
        elif name == "BINUNICODE":
            stack.append(_Symbol("text", argument, 1 + len(argument)))
        elif name == "GLOBAL":
            stack.append(_Symbol("global", argument.replace(" ", ".")))
        elif name in _EMPTY:
            stack.append(_Symbol(_EMPTY[name], ()))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE" or name in _TUPLES:
            items = pop(_TUPLES[name]) if name in _TUPLES else pop_to_mark()
            stack.append(_made("tuple", items))
        elif name in ("APPEND", "APPENDS"):
            items = pop(1) if name == "APPEND" else pop_to_mark()
            (target,) = pop(1)
            _require_kind(name, target, "list")
            target.hold(*items)
            stack.append(target)
        elif name in ("SETITEM", "SETITEMS"):
            items = pop(2) if name == "SETITEM" else pop_to_mark()
            (target,) = pop(1)
            _require_kind(name, target, "dict", "OrderedDict")
            for key in items[::2]:
                _require_kind("a key", key, "text", "constant")
            if len(items) % 2:
                raise ValueError("its pickle has a key without a value")
            target.hold(*items)
            stack.append(target)
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_called(name, *pop(2)))
        elif name == "BUILD":
            target, state = pop(2)
            _require_kind(name, target, "Namespace", "OrderedDict")
            _require_kind("a state", state, "dict")
            target.hold(state)
            stack.append(target)
        elif name == "BINPERSID":
            stack.append(_storage(pop(1)[0], storages))
        elif name in ("BINPUT", "LONG_BINPUT"):
            (symbol,) = pop(1)
            stack.append(symbol)
            memo[argument] = symbol
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise ValueError("its pickle refers to what it did not make")
            memo[argument].shared = True
            referred += memo[argument].expanded
            if referred > MAX_EXPANDED:
                raise ValueError(f"its pickle expands to more than {MAX_EXPANDED} items")
            stack.append(memo[argument])
        elif name == "STOP":
            pop(1)
        elif name != "PROTO" or argument != 2:
            what = f"protocol {argument}" if name == "PROTO" else name
            raise ValueError(f"its pickle has {what}, which torch.save does not write")


def _operations(content: bytes) -> Iterator[tuple[str, Any]]:
    """Names and arguments, up to the end of the pickle."""
    opened = io.BytesIO(content)
    operations = pickletools.genops(opened)
    for count in itertools.count(1):
        try:
            opcode, argument, start = next(operations)
        except StopIteration:
            return
        except (ValueError, Warning) as error:
            raise ValueError(f"its pickle is damaged: {error}") from None
        # torch.save writes none, and its reader does not undo them. Of unknown ones Python warns, or raises: that is
        # up to the filters of warnings, which are the process's and not changed here, where other threads may run.
        if opcode.name in _ESCAPED and b"\\" in content[start : opened.tell()]:
            raise ValueError(f"its pickle is damaged: an escape in {opcode.name}")
        if count > MAX_OPERATIONS:
            raise ValueError(f"its pickle has more than {MAX_OPERATIONS} operations")
        yield opcode.name, argument


def _foreign_globals(content: bytes) -> list[str]:
    """The functions and classes that the pickle names and weights do not need, by whatever operation."""
    found: dict[str, None] = {}  # a set in order
    texts = ["?", "?"]
    for name, argument in _operations(content):
        if name in ("GLOBAL", "INST"):
            found[argument.replace(" ", ".")] = None
        elif name == "STACK_GLOBAL":
            found[".".join(texts[-2:])] = None
        elif isinstance(argument, str):
            texts = [texts[-1], argument]
    return [_clipped(name, 80) for name in found if name not in _KNOWN]


def _made(kind: str, items: list[_Symbol]) -> _Symbol:
    symbol = _Symbol(kind, tuple(items))
    symbol.hold(*items)
    return symbol


def _called(operation: str, function: _Symbol, arguments: _Symbol) -> _Symbol:
    """What `function(*arguments)` is."""
    _require_kind("a call", function, "global")
    _require_kind("arguments", arguments, "tuple")
    if operation == "NEWOBJ":
        allowed = function.value == "argparse.Namespace" and not arguments.value
        kind = "Namespace"
    elif function.value == "collections.OrderedDict":
        allowed, kind = not arguments.value, "OrderedDict"
    else:
        first = "tensor" if function.value == "torch._utils._rebuild_parameter" else "storage"
        given = [item.kind for item in arguments.value[:1]]
        allowed, kind = function.value in _CALLED and given == [first], "tensor"
    if not allowed:
        raise ValueError(f"its pickle calls {function.value} in a way that torch.save does not")
    return _made(kind, [function, arguments])


def _storage(identity: _Symbol, storages: Mapping[str, int]) -> _Symbol:
    """The storage that ("storage", type, key, device, number of elements) refers to."""
    _require_kind("a reference to a storage", identity, "tuple")
    if [item.kind for item in identity.value] != ["text", "global", "text", "text", "constant"]:
        raise ValueError("its pickle refers to a storage in a way that torch.save does not")
    tag, storage_type, key, _, count = (item.value for item in identity.value)
    if tag != "storage" or storage_type not in _STORAGES or type(count) is not int or count < 0:
        raise ValueError("its pickle refers to a storage in a way that torch.save does not")
    if key not in storages:
        raise ValueError(f"storage {_quoted(key)} has no record")
    needed = count * _STORAGES[storage_type]
    if storages[key] != needed:
        raise ValueError(
            f"storage {_quoted(key)} should have {needed} bytes, its record has {storages[key]}"
        )
    return _made("storage", [identity])


def _require_kind(what: str, symbol: _Symbol, *kinds: str) -> None:
    wrong_key = what == "a key" and symbol.kind == "constant" and type(symbol.value) is not int
    if symbol.kind not in kinds or wrong_key:
        raise ValueError(
            f"its pickle has a {symbol.kind} for {what}, which torch.save does not write"
        )


# ------------------------------------------------------------------ which entry of it


def _require_which(which: str) -> None:
    if not isinstance(which, str) or (
        which not in ("ema", "model") and not which.startswith("ema:")
    ):
        raise ValueError(f"which={which!r}: allowed are 'ema', 'model' and 'ema:<decay>'")


def _choose(content: Any, which: str, stem: str) -> tuple[str, dict[str, Any]]:
    """The entry's key ("" if the file is one set of weights), and its items."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a dict of tensors")
    items = _items(content)
    decay = which.removeprefix("ema:")
    keys = [which] if decay == which else [f"ema{mark}{decay}" for mark in ":_-"]
    for key in keys:
        if isinstance(items.get(key), dict):
            return key, _items(items[key])
    entries = _weight_entries(items)
    if not entries and (not items or any(isinstance(value, Tensor) for value in items.values())):
        if which not in ("ema", "model") and stem not in keys:
            raise ValueError(f"no entry {which}: the file holds one set of weights, without a name")
        return "", items
    if not entries:
        raise ValueError(f"no weights among its entries: {_listed(items)}")
    hint = "; pass which='model' to read it" if entries == ["model"] else ""
    raise ValueError(f"no entry {which}; there are: {', '.join(entries)}{hint}")


def _weight_entries(items: Mapping[Any, Any]) -> list[str]:
    """The keys of sets of weights: dicts that hold tensors, and texts for keys only."""
    return [
        key
        for key, value in items.items()
        if isinstance(key, str)
        and isinstance(value, dict)
        and value
        and all(isinstance(name, str) for name in dict.keys(value))
        and any(isinstance(tensor, Tensor) for tensor in dict.values(value))
    ]


def _items(value: dict[Any, Any]) -> dict[Any, Any]:
    """`value` as a plain dict. Not by its own methods, which a file can cover with attributes of an OrderedDict."""
    return dict(dict.items(value))


def _listed(items: Mapping[Any, Any]) -> str:
    names = [_quoted(key) for key in itertools.islice(items, 8)]
    return ", ".join(names) + (", …" if len(items) > 8 else "")


def _arguments_of_training(content: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entry "args", a Namespace or a dict, as plain data; and a note of what else it held."""
    args = _items(content).get("args", {})
    found = _items(vars(args)) if isinstance(args, argparse.Namespace) else args
    if not isinstance(found, dict):
        return {}, [f"args is a {type(found).__name__} and was left away"]
    plain = {k: _plain(v) for k, v in _items(found).items() if isinstance(k, str) and _is_plain(v)}
    dropped = [key for key in dict.keys(found) if key not in plain]
    return plain, [f"args: left away {_listed(dict.fromkeys(dropped))}"] if dropped else []


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------ the tensors


class _Acceptance:
    """Which tensors are accepted, and how many bytes of them."""

    def __init__(self, max_bytes: int, check_finite: bool) -> None:
        self.max_bytes = max_bytes
        self.check_finite = check_finite
        self.taken = 0

    def __call__(self, name: str, value: Any) -> Tensor:
        """`value`, contiguous and without a graph. Nothing is copied or computed before its size is known."""
        if type(value) not in (Tensor, nn.Parameter):
            raise ValueError(f"{_quoted(name)} is a {type(value).__name__}, expected a tensor")
        tensor: Tensor = value.detach()
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(
                f"{_quoted(name)} is not a dense tensor with values, but {tensor.layout}"
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            allowed = ", ".join(_short(dtype) for dtype in WEIGHT_DTYPES)
            raise ValueError(
                f"{_quoted(name)} is of dtype {_short(tensor.dtype)}; read are {allowed}"
            )
        if tensor.is_neg() or tensor.dim() > MAX_DIMENSIONS:
            raise ValueError(
                f"{_quoted(name)} is a lazy view, or of more than {MAX_DIMENSIONS} dimensions"
            )
        size = tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().nbytes() < size:
            stored = tensor.untyped_storage().nbytes()
            raise ValueError(f"{_quoted(name)} is expanded: {stored} bytes are stored for {size}")
        self.taken += size
        if self.taken > self.max_bytes:
            raise ValueError(f"its tensors take more than max_bytes={self.max_bytes}")
        tensor = tensor.contiguous()
        if self.check_finite and tensor.numel() and not _is_finite(tensor):
            raise ValueError(
                f"{_quoted(name)} holds NaN or infinite values; check_finite=False reads it nevertheless"
            )
        return tensor


def _is_finite(tensor: Tensor) -> bool:
    # One pass without temporaries, a hundred times faster than isfinite().all(); the extremes of a NaN are NaN.
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _named_tensors(
    weights: Mapping[Any, Any], entry: str, accept: _Acceptance
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a state dict, under names without the prefixes of wrappers; and notes."""
    if not weights:
        raise ValueError("it holds no tensors")
    found: dict[str, Tensor] = {}
    stripped: Counter[str] = Counter()
    for key, value in weights.items():
        if not isinstance(key, str):
            raise ValueError(
                f"{entry or 'it'} has the key {_quoted(key)}, expected names of tensors"
            )
        name = key.replace("_orig_mod.", "")
        stripped["_orig_mod."] += name != key
        stripped["module."] += name.startswith("module.")
        name = name.removeprefix("module.")
        if name in found:
            raise ValueError(
                f"{_quoted(name)} is there twice, with and without the prefix of a wrapper"
            )
        found[name] = accept(key, value)
    return found, [
        f"the prefix {prefix} was taken off {count} of {len(weights)} names"
        for prefix, count in stripped.items()
        if count
    ]


def _dtype_notes(state: Mapping[str, Tensor]) -> list[str]:
    counts = Counter(_short(value.dtype) for value in state.values())
    return [
        f"{count} of {len(state)} tensors are stored in {dtype}"
        for dtype, count in sorted(counts.items())
        if dtype != "float32"
    ]


def _optimizer_state(value: Any, name: str, accept: _Acceptance) -> Any:
    """`value` with every tensor in it accepted, and plain data besides."""
    if isinstance(value, dict):
        return {
            key: _optimizer_state(item, f"{name}.{key}", accept) for key, item in dict.items(value)
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_optimizer_state(item, name, accept) for item in value)
    return value if _is_plain(value) else accept(name, value)


# ------------------------------------------------------------------ what is said of it


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quoted(value: Any) -> str:
    """A name out of a file, which may be long or hold line breaks."""
    return _clipped(
        repr(value) if not isinstance(value, str) or not value.isprintable() else value, 80
    )


def _clipped(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
