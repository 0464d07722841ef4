"""Every file that may hold weights is read as what it is, and no file runs code or fills the memory.

The files that must be refused are made here and stored nowhere.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdit.testing import assert_same_bits
from fastdit.weights import reading
from fastdit.weights.reading import load_tensors, load_weights, read_checkpoint

Write = Callable[[Path], Any]


def state_dict(dtype: torch.dtype = torch.float32) -> OrderedDict[str, Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).to(dtype)
    return model.state_dict()


def training_checkpoint(**changes: Any) -> dict[str, Any]:
    """As the original's train.py writes it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, lr=1e-4, tf32=True, ckpt=None)
    return {
        "model": model.state_dict(),
        "ema": state_dict(),
        "opt": optimizer.state_dict(),
        "args": args,
    } | changes


class Call:
    """Pickled, it calls `function` on `arguments` when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


class OrderedDictWith:
    """Pickled, it is an OrderedDict of `entries` with attributes."""

    def __init__(self, entries: Any, /, **attributes: Any) -> None:
        self.what = OrderedDict, (), attributes, None, iter(entries)

    def __reduce__(self) -> Any:
        return self.what


def assert_same_state(out: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(out) == sorted(expected)
    for key in expected:
        assert out[key].dtype == expected[key].dtype
        assert type(out[key]) is Tensor
        assert out[key].is_contiguous()
        assert not out[key].requires_grad
        assert_same_bits(key, out[key], expected[key])


def assert_refused(file: Path, reason: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        read_checkpoint(file, **options)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    assert len(message) < len(str(file)) + 1010


# ------------------------------------------------------------------ files that are read


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.ckpt", "x.bin", "x"])
@pytest.mark.parametrize("which", ["ema", "model"])
def test_a_bare_state_dict(tmp_path: Path, name: str, which: str) -> None:
    state = state_dict()
    torch.save(state, tmp_path / name)
    found = read_checkpoint(tmp_path / name, which=which, optimizer=True)
    assert_same_state(found.tensors, state)
    assert found.metadata == {}
    assert found.optimizer is None
    assert (found.entry, found.notes) == ("", [])
    assert_same_state(load_weights(tmp_path / name), state)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_safetensors_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    state = dict(state_dict())
    save_file(state, tmp_path / name, metadata={"format": "pt", "model": "DiT-S/2"})
    found = read_checkpoint(tmp_path / name, optimizer=True)
    assert_same_state(found.tensors, state)
    assert found.metadata == {"format": "pt", "model": "DiT-S/2"}
    assert found.optimizer is None
    assert found.notes == []


@pytest.mark.parametrize("which", ["ema", "model"])
def test_the_originals_training_checkpoint(tmp_path: Path, which: str) -> None:
    checkpoint = training_checkpoint()
    torch.save(checkpoint, tmp_path / "0050000.pt")
    found = read_checkpoint(tmp_path / "0050000.pt", which=which, optimizer=True)
    assert_same_state(found.tensors, checkpoint[which])
    assert found.metadata == vars(checkpoint["args"])
    assert (found.entry, found.notes) == (which, [])
    assert found.optimizer is not None
    assert found.optimizer["param_groups"] == checkpoint["opt"]["param_groups"]
    for index, moments in checkpoint["opt"]["state"].items():
        assert_same_state(found.optimizer["state"][index], moments)
    assert read_checkpoint(tmp_path / "0050000.pt", which=which).optimizer is None


@pytest.mark.parametrize("spelling", ["ema:0.9999", "ema_0.9999", "ema-0.9999"])
def test_one_of_several_averages(tmp_path: Path, spelling: str) -> None:
    state = state_dict()
    torch.save({"model": state_dict(), spelling: state, "ema:0.99": state_dict()}, tmp_path / "x")
    found = read_checkpoint(tmp_path / "x", which="ema:0.9999")
    assert_same_state(found.tensors, state)
    assert found.entry == spelling
    assert_refused(tmp_path / "x", rf"no entry ema; there are: model, {spelling}, ema:0\.99$")


def test_an_average_in_a_file_of_its_name(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "ema-0.9999.pt")
    assert len(load_weights(tmp_path / "ema-0.9999.pt", which="ema:0.9999")) == 4
    torch.save(state_dict(), tmp_path / "x.pt")
    assert_refused(
        tmp_path / "x.pt", r"no entry ema:0\.9999: the file holds one set", which="ema:0.9999"
    )


def test_entries_that_are_not_there(tmp_path: Path) -> None:
    torch.save({"model": state_dict(), "args": None}, tmp_path / "x")
    assert_refused(tmp_path / "x", "no entry ema; there are: model; pass which='model' to read it$")
    assert read_checkpoint(tmp_path / "x", which="model", optimizer=True).optimizer is None
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "x")
    assert_refused(tmp_path / "x", "no weights among its entries: epoch, lr$")


@pytest.mark.parametrize("which", ["em", "opt", "", None])
def test_which_must_be_known(tmp_path: Path, which: Any) -> None:
    with pytest.raises(ValueError, match=f"which={which!r}: allowed are 'ema', 'model'"):
        read_checkpoint(tmp_path / "x", which=which)


def test_prefixes_of_wrappers(tmp_path: Path) -> None:
    state = state_dict()
    wrapped = {f"module._orig_mod.{key.replace('.', '._orig_mod.')}": state[key] for key in state}
    for save in (torch.save, save_file):
        save(wrapped, tmp_path / "x")
        found = read_checkpoint(tmp_path / "x")
        assert_same_state(found.tensors, state)
        assert found.notes[-2:] == [
            "the prefix _orig_mod. was taken off 4 of 4 names",
            "the prefix module. was taken off 4 of 4 names",
        ]
    torch.save({"0.bias": torch.ones(1), "module.0.bias": torch.ones(1)}, tmp_path / "x")
    assert_refused(tmp_path / "x", r"0\.bias is there twice")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_other_floats_are_kept_and_named(tmp_path: Path, dtype: torch.dtype, save: Any) -> None:
    state = dict(state_dict(dtype))
    save(state, tmp_path / "x")
    found = read_checkpoint(tmp_path / "x")
    assert_same_state(found.tensors, state)
    assert found.notes[-1] == f"4 of 4 tensors are stored in {str(dtype)[6:]}"


def test_tensors_of_any_layout(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    state = {
        "whole": whole,
        "tied": whole,
        "part": whole[2:4],
        "transposed": whole.T,
        "strided": whole[::2],
        "empty": whole[:0],
        "scalar": whole[1, 1],
        "parameter": nn.Parameter(torch.randn(2)),
        "graph": torch.randn(2, requires_grad=True),
    }
    torch.save(state, tmp_path / "x")
    expected = {key: value.detach() for key, value in state.items()}
    out = read_checkpoint(tmp_path / "x", max_bytes=10**6).tensors
    assert_same_state(out, expected)


def test_both_formats_are_mapped_and_private(tmp_path: Path) -> None:
    """The tensors are the file's pages, and writing to one does not change the file."""
    for save in (torch.save, save_file):
        save({"x": torch.arange(1e5)}, tmp_path / "x")
        before = (tmp_path / "x").read_bytes()
        tensor = load_weights(tmp_path / "x")["x"]
        address = tensor.data_ptr()
        mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        (name,) = (
            fields[-1]
            for fields in mappings
            if int(fields[0].split("-")[0], 16) <= address < int(fields[0].split("-")[1], 16)
        )
        assert name == str(tmp_path / "x")
        tensor.zero_()
        assert (tmp_path / "x").read_bytes() == before


def test_arguments_become_plain_data(tmp_path: Path) -> None:
    args = argparse.Namespace(a=(1, [2.5, None]), b={"x": 1}, c=torch.ones(1), d="text")
    for given in (args, vars(args)):
        torch.save({"ema": state_dict(), "args": given}, tmp_path / "x")
        found = read_checkpoint(tmp_path / "x")
        assert found.metadata == {"a": [1, [2.5, None]], "d": "text"}
        assert found.notes[-1] == "args: left away b, c"


def test_a_safe_global_of_the_user_stays_one(tmp_path: Path) -> None:
    torch.save(training_checkpoint(), tmp_path / "x")
    read_checkpoint(tmp_path / "x")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(tmp_path / "x")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


class Watched:
    """A lock that tells when a thread finds it taken."""

    def __init__(self, found_taken: threading.Event) -> None:
        self.lock, self.found_taken = threading.Lock(), found_taken

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.found_taken.set()
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_threads_do_not_take_each_others_safe_globals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second thread comes while the first is in torch.load, and goes on when the first has left."""
    torch.save(training_checkpoint(), tmp_path / "x")
    load, refusals = torch.load, []
    second_came, first_left = threading.Event(), threading.Event()
    monkeypatch.setattr(reading, "_SAFE_GLOBALS", Watched(second_came))

    def read() -> None:
        try:
            read_checkpoint(tmp_path / "x")
        except ValueError as error:
            refusals.append(str(error))

    second = threading.Thread(target=read)

    def loading(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is second:
            second_came.set()
            assert first_left.wait(600)
        else:
            second.start()
            assert second_came.wait(600)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", loading)
    read_checkpoint(tmp_path / "x")
    first_left.set()
    second.join()
    assert refusals == []


def test_the_warnings_of_other_threads_stay_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(training_checkpoint(), tmp_path / "x")
    check, raised = reading._check_pickle, []

    def warn() -> None:
        try:
            warnings.warn("of somebody else", UserWarning, stacklevel=1)
        except UserWarning as warning:
            raised.append(warning)

    def checking(*arguments: Any) -> None:
        other = threading.Thread(target=warn)
        other.start()
        other.join()
        check(*arguments)

    monkeypatch.setattr(reading, "_check_pickle", checking)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_checkpoint(tmp_path / "x")
    assert raised == []


def test_states_that_are_no_weights(tmp_path: Path) -> None:
    state = {"rng": torch.arange(5, dtype=torch.uint8), "x": torch.tensor([float("nan")])}
    save_file(state, tmp_path / "x.safetensors")
    out = load_tensors(tmp_path / "x.safetensors")
    assert out["rng"].tolist() == [0, 1, 2, 3, 4]
    assert out["x"].isnan().all()
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: not a safetensors file"):
        load_tensors(tmp_path / "x.pt")


# ------------------------------------------------------------------ files of other kinds


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x/data.pkl", "x/constants.pkl", "x/code/__torch__.py"):
            archive.writestr(name, b"")


OTHERS: dict[str, tuple[str, bytes | Write, str]] = {
    "empty": ("x.safetensors", b"", "the file is empty$"),
    "empty .pt": ("x.pt", b"", "the file is empty$"),
    "web page": ("x.safetensors", b"\n <!DOCTYPE html><html>404</html>", "this is a web page"),
    "web page .pt": ("x.pt", b"\xef\xbb\xbf<html><body>", "this is a web page"),
    "LFS": (
        "x.pt",
        b"version https://git-lfs.github.com/spec/v1\noid",
        "this is a Git LFS pointer",
    ),
    "JSON": ("x.pt", b'{"error": "Access denied"}', 'JSON text.*: {"error": "Access denied"}$'),
    "gzip": ("x.pt.gz", gzip.compress(b"x" * 99), "compressed by gzip"),
    "NumPy": ("x.npy", b"\x93NUMPY\x01\x00", "this is a NumPy array"),
    "npz": ("x.npz", lambda path: np.savez(path, x=np.ones(3)), "a zip file without data.pkl"),
    "ONNX": ("x.onnx", b"\x08\x07\x12\x07pytorch\x1a\x052.0.0", "this is an ONNX file"),
    "HDF5": ("x.h5", b"\x89HDF\r\n\x1a\n", "this is an HDF5 file"),
    "text": (
        "x.safetensors",
        b"some text that is long enough",
        "truncated or not a safetensors file",
    ),
    "text .pt": ("x.pt", b"some text that is long enough", "neither a safetensors file nor a zip"),
    "zip as safetensors": (
        "x.safetensors",
        lambda path: torch.save(state_dict(), path),
        "named .safetensors, but a zip file of torch.save",
    ),
    "legacy": (
        "x.pt",
        lambda path: torch.save(state_dict(), path, _use_new_zipfile_serialization=False),
        "this is a bare pickle",
    ),
    "TAR": ("x.pt", tar, "this is a TAR file"),
    "TorchScript": ("x.pt", torchscript, "this is a TorchScript archive"),
    "empty zip": (
        "x.pt",
        lambda path: zipfile.ZipFile(path, "w").close(),
        "zip file without entries",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_named(tmp_path: Path, what: str) -> None:
    name, content, reason = OTHERS[what]
    file = tmp_path / name
    content(file) if callable(content) else file.write_bytes(content)
    assert_refused(file, reason)


def test_missing_files_folders_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors: no such file"):
        load_weights(tmp_path / "x.safetensors")
    assert_refused(tmp_path, "this is a folder")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "this is a device or a pipe")


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_truncated_files_are_named(tmp_path: Path, save: Any) -> None:
    save(dict(state_dict()), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    lengths = [*range(1, 200), *range(200, len(whole), 37), *range(len(whole) - 120, len(whole))]
    for kept in lengths:
        (tmp_path / "x").write_bytes(whole[:kept])
        assert_refused(tmp_path / "x", "truncated|neither a safetensors|without entries|ONNX")
    (tmp_path / "x").write_bytes(whole + b"\0")
    assert_refused(tmp_path / "x", "truncated|bytes after the header")


def test_an_old_torch_reads_safetensors_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state_dict(), tmp_path / "x.pt")
    save_file(dict(state_dict()), tmp_path / "x.safetensors")
    for version in ("2.9.1+cu128", "2.5.1"):
        monkeypatch.setattr(torch, "__version__", version)
        assert_refused(tmp_path / "x.pt", rf"torch 2\.10 and later.*this is {re.escape(version)}")
        load_weights(tmp_path / "x.safetensors")
    for version in ("2.10.0a0+git", "2.13.0", "3.0"):
        monkeypatch.setattr(torch, "__version__", version)
        load_weights(tmp_path / "x.pt")


# ------------------------------------------------------------------ values that are no weights


class OwnTensor(Tensor):
    pass


def expanded(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    return torch.ones(1).as_strided(shape, strides)


VALUES: dict[str, tuple[Any, str]] = {
    "NaN": (torch.tensor([1.0, float("nan")]), r"holds NaN or infinite.*check_finite=False"),
    "infinity": (torch.tensor([1.0, float("inf")]).half(), r"holds NaN or infinite"),
    "-infinity": (torch.tensor([-float("inf"), 1.0]).bfloat16(), r"holds NaN or infinite"),
    "int64": (torch.ones(2, dtype=torch.int64), "is of dtype int64; read are float32, bfloat16"),
    "uint16": (torch.ones(2, dtype=torch.uint16), "is of dtype uint16"),
    "bool": (torch.ones(2, dtype=torch.bool), "is of dtype bool"),
    "complex": (torch.ones(2, dtype=torch.complex64), "is of dtype complex64"),
    "fp8": (torch.ones(2).to(torch.float8_e4m3fn), "is of dtype float8_e4m3fn"),
    "sparse": (torch.eye(2).to_sparse(), "calls for torch._utils._rebuild_sparse_tensor"),
    "quantised": (
        Call(torch._utils._rebuild_qtensor),
        "calls for torch._utils._rebuild_qtensor",
    ),
    "meta": (
        torch.ones(2, device="meta"),
        "calls for torch._utils._rebuild_meta_tensor_no_storage",
    ),
    "subclass": (
        torch.ones(2).as_subclass(OwnTensor),
        r"calls for torch\._tensor\._rebuild_from_type_v2, .*OwnTensor",
    ),
    "negated view": (torch.ones(2, dtype=torch.complex64).conj().imag, "is a lazy view"),
    "expanded": (
        expanded((10**6, 10**6), (0, 0)),
        r"is expanded: 4 bytes are stored for 4000000000000",
    ),
    "dimensions": (torch.ones([1] * 17), "of more than 16 dimensions"),
    "number": (3, "w is a int, expected a tensor"),
    "text": ("x", "w is a str, expected a tensor"),
    "list": ([torch.ones(2)], "w is a list, expected a tensor"),
    "dict": ({"a": torch.ones(2)}, "no entry ema; there are: w$"),
}


@pytest.mark.parametrize("what", VALUES)
def test_values_that_are_no_weights(tmp_path: Path, what: str) -> None:
    value, reason = VALUES[what]
    torch.save({"a": torch.ones(2), "w": value}, tmp_path / "x")
    assert_refused(tmp_path / "x", reason)
    if what in ("dict", "sparse", "quantised", "meta", "subclass"):
        return
    torch.save({"ema": {"a": torch.ones(2), "w": value}}, tmp_path / "x")
    assert_refused(tmp_path / "x", reason)
    torch.save({"ema": {"a": torch.ones(2)}, "opt": {"state": {0: {"w": value}}}}, tmp_path / "x")
    load_weights(tmp_path / "x")  # an entry that is not asked for is not looked at
    if isinstance(value, Tensor):
        assert_refused(tmp_path / "x", reason.replace("w is", "opt.state.0.w is"), optimizer=True)


def test_values_that_are_not_finite_are_read_on_request(tmp_path: Path) -> None:
    for save in (torch.save, save_file):
        save({"w": torch.tensor([float("nan"), float("inf")])}, tmp_path / "x")
        assert_refused(tmp_path / "x", "w holds NaN or infinite values; check_finite=False reads")
        assert load_weights(tmp_path / "x", check_finite=False)["w"].isnan()[0]


def test_values_in_safetensors(tmp_path: Path) -> None:
    for dtype, name in [(torch.int64, "I64"), (torch.uint8, "U8"), (torch.float8_e5m2, "F8_E5M2")]:
        save_file({"w": torch.ones(2).to(dtype)}, tmp_path / "x")
        assert_refused(tmp_path / "x", f"w is of dtype {name}; read are F64, F32, F16, BF16")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(2)], "holds a list, expected a dict"),
        (torch.ones(2), "holds a Tensor, expected a dict"),
        ({0: torch.ones(2)}, "has the key 0, expected names of tensors"),
        ({"a": torch.ones(2), 3: torch.ones(2)}, "has the key 3"),
        ({"ema": {0: torch.ones(2)}}, "ema has the key 0"),
        ({("a", "b"): torch.ones(2)}, "has a tuple for a key"),
        ({None: torch.ones(2)}, "has a constant for a key"),
        ({}, "holds no tensors"),
        ({"ema": {}}, "holds no tensors"),
    ],
)
def test_containers_that_are_no_state_dict(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "x")
    assert_refused(tmp_path / "x", reason)


def test_the_size_is_bounded(tmp_path: Path) -> None:
    whole = torch.randn(1000)
    torch.save({str(n): whole for n in range(20)}, tmp_path / "x")
    assert_refused(tmp_path / "x", r"its tensors take more than max_bytes=\d+$")
    assert len(read_checkpoint(tmp_path / "x", max_bytes=20 * 4000).tensors) == 20
    for save in (torch.save, save_file):
        save({"x": whole}, tmp_path / "x")
        assert_refused(tmp_path / "x", r"\d+ bytes, more than max_bytes=4000", max_bytes=4000)


def test_names_in_messages_are_short_and_in_one_line(tmp_path: Path) -> None:
    for name in ("\x1b[31m\n" * 9, "x" * 10**5):
        torch.save({name: torch.ones(2).int()}, tmp_path / "x")
        assert_refused(tmp_path / "x", r"^[^\x1b]*is of dtype int32")


def test_attributes_of_a_dict_hide_nothing(tmp_path: Path) -> None:
    state = state_dict()
    for file in (tmp_path / "x", tmp_path / "y"):
        hidden = OrderedDictWith(state.items(), items=1, keys=2, values=3, get=4, __iter__=5)
        torch.save(hidden if file.name == "x" else {"ema": hidden}, file)
        assert_same_state(load_weights(file), state)


# ------------------------------------------------------------------ pickles that are programs


def torch_zip(path: Path, content: bytes, **storages: bytes) -> None:
    """A file as of torch.save with `content` for a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/version", b"3\n")
        for key, data in storages.items():
            archive.writestr(f"x/data/{key}", data)


def with_hooks(call: Call) -> Call:
    tensor = torch.ones(2)
    arguments = list(tensor.__reduce_ex__(2)[1])
    arguments[5] = OrderedDict(hook=call)
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


def malicious(sentinel: Path) -> dict[str, Any]:
    """Objects that make `sentinel` when they are unpickled, and the function that the refusal names."""
    command = f"touch {sentinel}"
    system = Call(os.system, command)
    by_eval = Call(eval, f"__import__('os').system({command!r})")
    return {
        "alone": (system, "system"),
        "eval": (by_eval, "eval"),
        "exec": (Call(exec, f"import os; os.system({command!r})"), "exec"),
        "process": (Call(subprocess.check_call, ["touch", str(sentinel)]), "check_call"),
        "among tensors": ({"a": torch.ones(2), "b": system}, "system"),
        "in opt, unasked for": (training_checkpoint(opt=system), "system"),
        "in args": (training_checkpoint(args=argparse.Namespace(a=[{"b": by_eval}])), "eval"),
        "as an argument": ({"a": Call(OrderedDict, [("x", system)])}, "system"),
        "as a state": ({"a": OrderedDictWith([], x=system)}, "system"),
        "as a hook": ({"a": with_hooks(system)}, "system"),
        "through torch": (
            {"a": Call(torch._tensor._rebuild_from_type_v2, os.system, Tensor, (command,), {})},
            "_rebuild_from_type_v2",
        ),
    }


CASES = list(malicious(Path("x")))


@pytest.mark.parametrize("case", CASES)
def test_no_pickle_runs_code(tmp_path: Path, case: str) -> None:
    sentinel = tmp_path / "sentinel"
    content, named = malicious(sentinel)[case]
    for protocol in (2, 4):
        torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
        assert_refused(tmp_path / "x.pt", rf"its pickle calls for .*\.{named},.*nothing was run")
        assert_refused(
            tmp_path / "x.pt", "its pickle calls for", optimizer=True, check_finite=False
        )
    for protocol in range(6):
        for name in ("y.pt", "y.safetensors", "y.bin"):
            try:
                (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
            except pickle.PicklingError:  # tensors in protocol 0 and 1
                continue
            assert_refused(tmp_path / name, "bare pickle|neither a safetensors|not a safetensors")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"(S'touch SENTINEL'\niposix\nsystem\n.",
        b"cposix\nsystem\n(S'touch SENTINEL'\ntR.",
        b"(cposix\nsystem\nS'touch SENTINEL'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch SENTINEL\x85R.",
        b"\x80\x02\x8c\x05posixq\x00\x8c\x06systemq\x01h\x00h\x01\x93X\x0e\0\0\0touch SENTINEL\x85R.",
    ],
)
def test_no_operation_runs_code(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(content)
    assert_refused(tmp_path / "x.pt", "bare pickle|neither a safetensors")
    torch_zip(tmp_path / "x.pt", content)
    assert_refused(tmp_path / "x.pt", "its pickle calls for posix.system")
    assert not (tmp_path / "SENTINEL").exists()


def test_these_pickles_would_run(tmp_path: Path) -> None:
    """If they did not, the tests above could not fail."""
    sentinel = tmp_path / "sentinel"
    for case, (content, _) in malicious(sentinel).items():
        data = pickle.dumps(content)
        with contextlib.suppress(TypeError, AttributeError):  # after the call
            pickle.loads(data)  # noqa: S301
        assert sentinel.exists(), case
        sentinel.unlink()


def test_a_class_of_somebody_else_is_named(tmp_path: Path) -> None:
    args = argparse.Namespace(path=Path("x"), counter=Counter("x"))
    torch.save(training_checkpoint(args=args), tmp_path / "x")
    assert_refused(
        tmp_path / "x", r"calls for pathlib\.\w+, collections.Counter, which weights do not need"
    )


# ------------------------------------------------------------------ pickles that torch.save does not write

PROTO, STOP = b"\x80\x02", b"."
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
NO_HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return (
        b"J" + struct.pack("<i", value)
        if value < 2**31
        else b"\x8a\x09" + value.to_bytes(9, "little")
    )


def storage(key: bytes = text("0"), count: bytes = number(4), tag: str = "storage") -> bytes:
    return b"(" + text(tag) + b"ctorch\nFloatStorage\n" + key + text("cpu") + count + b"tQ"


def tensor(source: bytes, size: bytes, stride: bytes, offset: int = 0) -> bytes:
    return TENSOR + b"(" + source + number(offset) + size + stride + b"\x89" + NO_HOOKS + b"tR"


def entry(value: bytes, key: bytes = text("w")) -> bytes:
    return PROTO + b"}" + key + value + b"s" + STOP


def nested(levels: int, copies: int = 9) -> bytes:
    """A tuple of tuples of tuples that refer to each other: copies ** levels items in a few bytes each."""
    content = b"(" * levels + text("x") + b"\x85q\x00"
    for level in range(levels):
        content += bytes([ord("h"), level]) * (copies - 1) + b"tq" + bytes([level + 1])
    return content


ONE = number(4) + b"\x85"  # (4,)
UNIT = number(1) + b"\x85"

PICKLES: dict[str, tuple[bytes, str]] = {
    "no dict": (PROTO + b"N" + STOP, "holds a NoneType"),
    "nothing": (b"", "its pickle is damaged"),
    "escape": (PROTO + b"cargparse\nNamesp\\x61ce\n" + STOP, "damaged: an escape in GLOBAL"),
    "no end": (PROTO + b"}", "its pickle is damaged"),
    "nothing to take": (PROTO + b"t" + STOP, "takes more than it made"),
    "nothing to call": (PROTO + b"R" + STOP, "takes more than it made"),
    "nothing left": (PROTO + STOP, "takes more than it made"),
    "over a mark": (PROTO + b"})(\x85" + STOP, "takes more than it made"),
    "unknown reference": (PROTO + b"h\x05" + STOP, "refers to what it did not make"),
    "extension": (PROTO + b"\x82\x01" + STOP, "has EXT1, which torch.save does not write"),
    "duplicate": (PROTO + b"}2" + STOP, "has DUP"),
    "protocol 5": (b"\x80\x05}" + STOP, "has protocol 5"),
    "call of a text": (PROTO + text("x") + b")R" + STOP, "has a text for a call"),
    "call of a dtype": (PROTO + b"ctorch\nfloat32\n)R" + STOP, "calls torch.float32 in a way"),
    "call of a storage": (
        PROTO + b"ctorch.storage\nUntypedStorage\n" + number(10**10) + b"\x85R" + STOP,
        "calls torch.storage.UntypedStorage in a way",
    ),
    "call without a tuple": (
        PROTO + b"ccollections\nOrderedDict\n]R" + STOP,
        "has a list for arguments",
    ),
    "dict of arguments": (
        PROTO + b"ccollections\nOrderedDict\n]\x85R" + STOP,
        "calls collections.Ord",
    ),
    "namespace of arguments": (
        PROTO + b"cargparse\nNamespace\n}\x85\x81" + STOP,
        "calls argparse.Name",
    ),
    "new dict": (
        PROTO + b"ccollections\nOrderedDict\n)\x81" + STOP,
        "calls collections.OrderedDict in a",
    ),
    "state of a list": (PROTO + b"]}b" + STOP, "has a list for BUILD"),
    "state of a tensor": (
        entry(tensor(storage(), ONE, UNIT) + b"}b"),
        "has a tensor for BUILD",
    ),
    "list as a state": (PROTO + b"cargparse\nNamespace\n)\x81]b" + STOP, "has a list for a state"),
    "item of a list": (PROTO + b"]NNs" + STOP, "has a list for SETITEM"),
    "append to a dict": (PROTO + b"}Na" + STOP, "has a dict for APPEND"),
    "key without a value": (PROTO + b"}(" + text("a") + b"u" + STOP, "a key without a value"),
    "itself": (PROTO + b"]q\x00h\x00a" + STOP, "refers to a list before that is complete"),
    "other reference": (entry(storage(tag="module")), "refers to a storage in a way"),
    "reference to a text": (
        PROTO + text("0") + b"Q" + STOP,
        "has a text for a reference to a storage",
    ),
    "no record": (entry(storage(text("7"))), "storage 7 has no record"),
    "leaving the folder": (entry(storage(text("../data.pkl"))), "has no record"),
    "too much of a record": (
        entry(storage(count=number(5))),
        "should have 20 bytes, its record has 16",
    ),
    "negative": (entry(storage(count=number(-1))), "refers to a storage in a way"),
    "fraction": (
        entry(storage(count=b"G" + struct.pack(">d", 4.0))),
        "storage 0 should|refers to a storage",
    ),
    "tensor of a text": (entry(TENSOR + b"(" + text("x") + b"tR"), "_rebuild_tensor_v2 in a way"),
    "too few arguments": (entry(TENSOR + storage() + b"\x85R"), "torch.load refuses it: TypeError"),
    "beyond its storage": (
        entry(tensor(storage(), number(5) + b"\x85", UNIT)),
        "torch.load refuses it: RuntimeError",
    ),
    "begins beyond it": (entry(tensor(storage(), ONE, UNIT, offset=1)), "torch.load refuses it"),
    "begins before it": (entry(tensor(storage(), ONE, UNIT, offset=-1)), "torch.load refuses it"),
    "negative size": (
        entry(tensor(storage(), number(-4) + b"\x85", UNIT)),
        "torch.load refuses it",
    ),
    "negative stride": (
        entry(tensor(storage(), ONE, number(-1) + b"\x85")),
        "torch.load refuses it",
    ),
    "size past 64 bits": (
        entry(tensor(storage(), number(2**62) + number(8) + b"\x86", b"K\x00K\x00\x86")),
        "torch.load refuses it|is expanded",
    ),
    "size of texts": (entry(tensor(storage(), text("x") + b"\x85", UNIT)), "torch.load refuses it"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_torch_does_not_write(tmp_path: Path, what: str) -> None:
    content, reason = PICKLES[what]
    torch_zip(tmp_path / "x", content, **{"0": bytes(16)})
    assert_refused(tmp_path / "x", reason)


@pytest.mark.parametrize("action", ["ignore", "always", "error"])
@pytest.mark.parametrize(
    "operation",
    [b"cargparse\nName\\(space\n", b"(iargparse\nName\\(space\n", b"S'\\('\n", b"P\\(\n"],
)
def test_unknown_escapes_are_refused_whatever_is_done_with_warnings(
    tmp_path: Path, operation: bytes, action: Any
) -> None:
    """At the first, for every one may be a warning, and a file could hold a million."""
    torch_zip(tmp_path / "x", PROTO + 9 * operation + STOP)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter(action)
        assert_refused(tmp_path / "x", "its pickle is damaged: .*escape")
    assert len(said) == (action == "always")


def test_a_pickle_by_hand_is_read(tmp_path: Path) -> None:
    """The pickles above are refused for what they are about, and not for how they are made here."""
    content = entry(tensor(storage(), ONE, UNIT))
    torch_zip(tmp_path / "x", content, **{"0": torch.arange(4.0).numpy().tobytes()})
    assert load_weights(tmp_path / "x")["w"].tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------ zip files


def rewritten(path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
    """A good file, packed anew by `change(archive, name, content)`."""
    torch.save({"w": torch.zeros(50_000)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            change(archive, name, content)


def adding(extra: str) -> Write:
    def change(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
        archive.writestr(name, content)
        if name.endswith("/version"):
            archive.writestr(zipfile.ZipInfo(extra), b"x")

    return lambda path: rewritten(path, change)


def deflated(path: Path) -> None:
    rewritten(path, lambda archive, *record: archive.writestr(*record, zipfile.ZIP_DEFLATED))


def patched(offset_in_entry: int, value: bytes) -> Write:
    """A good file with `value` in the directory's first entry."""

    def write(path: Path) -> None:
        torch.save(state_dict(), path)
        content = bytearray(path.read_bytes())
        place = content.index(b"PK\x01\x02") + offset_in_entry
        content[place : place + len(value)] = value
        path.write_bytes(content)

    return write


def with_two_directories(path: Path) -> None:
    """Python reads what is before the end, torch what the end refers to."""
    torch.save({"w": torch.zeros(2)}, path)
    first = path.read_bytes()
    torch.save({"w": torch.ones(2)}, path)
    path.write_bytes(first + path.read_bytes())


def with_comment(path: Path) -> None:
    torch.save(state_dict(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x"


def with_another_locator(path: Path) -> None:
    torch.save(state_dict(), path)
    content = bytearray(path.read_bytes())
    content[-34:-26] = struct.pack("<Q", 0)
    path.write_bytes(content)


ZIPS: dict[str, tuple[Write, str]] = {
    "compressed": (deflated, r"data\.pkl is compressed"),
    "absolute": (adding("/etc/passwd"), "/etc/passwd: a path that leaves the zip file"),
    "parent": (adding("x/../../y"), "x/../../y: a path that leaves"),
    "backslash": (adding("x/..\\y"), "a path that leaves"),
    "drive": (adding("C:/y"), "a path that leaves"),
    "unprintable": (adding("x/\ny"), "a name that torch.save does not write"),
    "beyond ASCII": (adding("x/ä"), "a name that torch.save does not write"),
    "other folder": (adding("y/data.pkl"), "more than one folder"),
    "twice but for case": (adding("x/DATA.PKL"), "is there twice"),
    "encrypted": (patched(8, b"\x01\x08"), "is encrypted"),
    "other method": (patched(10, b"\x63\x00"), "is compressed"),
    "two directories": (
        with_two_directories,
        "directory is not where its end says|64-bit directory",
    ),
    "comment": (with_comment, "directory is not at its end"),
    "locator": (with_another_locator, "64-bit directory is not at its end"),
}


@pytest.mark.parametrize("what", ZIPS)
def test_zip_files_that_torch_does_not_write(tmp_path: Path, what: str) -> None:
    write, reason = ZIPS[what]
    write(tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", reason)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_duplicate_records(tmp_path: Path) -> None:
    adding("x/data.pkl")(tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", "x/data.pkl is there twice")


def test_damage_to_the_structure_is_found(tmp_path: Path) -> None:
    """The pickle's checksum is compared, since another byte in it can be another name."""
    torch.save(state_dict(), tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(b"0.weight")] = ord("9")
    (tmp_path / "x.pt").write_bytes(content)
    assert_refused(tmp_path / "x.pt", "damaged zip file: Bad CRC-32")


# ------------------------------------------------------------------ headers of safetensors


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def whole(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


def two(first: list[int], second: list[int]) -> dict[str, Any]:
    return {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in {"a": first, "b": second}.items()
    }


HEADERS: dict[str, tuple[bytes, str]] = {
    "length past the file": (
        safetensors(whole(), length=1000),
        "truncated: .* is said to have 1000",
    ),
    "length past the limit": (
        safetensors(whole(), length=2**39),
        "header is said to have 549755813888",
    ),
    "length of 64 bits": (
        safetensors(whole(), length=2**64 - 1),
        "truncated or not a safetensors file",
    ),
    "length too short": (safetensors(whole(), length=20), "its header is not JSON"),
    "length 0": (safetensors(whole(), length=0), "its header is not JSON"),
    "other encoding": (safetensors(b'{"\xff": 1}'), "its header is not JSON"),
    "deep": (safetensors(b'{"a":' * 10**5), "nested too deeply"),
    "equal keys": (
        safetensors(
            json.dumps(whole()).encode()[:-1]
            + b', "w": '
            + json.dumps(whole()["w"]).encode()
            + b"}"
        ),
        "its header has w twice",
    ),
    "equal keys inside": (
        safetensors(b'{"w":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        "its header has dtype twice",
    ),
    "metadata": (safetensors({"__metadata__": {"a": 1}, **whole()}), "more than texts"),
    "metadata list": (safetensors({"__metadata__": [], **whole()}), "more than texts"),
    "no entry": (safetensors({"w": [1]}), "w: its header entry is not dtype, shape, data_offsets"),
    "more in an entry": (safetensors(whole(code="x")), "w: its header entry is not dtype"),
    "unknown dtype": (safetensors(whole(dtype="F31")), "w is of dtype F31"),
    "dtype list": (safetensors(whole(dtype=["F32"])), "w is of dtype"),
    "negative shape": (safetensors(whole(shape=[-2, -2])), "is no shape"),
    "shape of truths": (safetensors(whole(shape=[True, 4])), "is no shape"),
    "shape of fractions": (safetensors(whole(shape=[4.0])), "is no shape"),
    "many dimensions": (safetensors(whole(shape=[1] * 17 + [4])), "is no shape"),
    "other shape": (safetensors(whole(shape=[5])), "do not fit F32 of shape"),
    "huge shape": (safetensors(whole(shape=[2**62, 2**62])), "do not fit F32 of shape"),
    "one offset": (safetensors(whole(data_offsets=[16])), "are no two offsets"),
    "outside": (
        safetensors(whole(shape=[8], data_offsets=[0, 32])),
        "truncated: 16 bytes after the header",
    ),
    "backwards": (safetensors(whole(data_offsets=[16, 0])), "do not fit"),
    "late": (
        safetensors(whole(shape=[3], data_offsets=[4, 16])),
        "begins at byte 4, what is before it ends at 0",
    ),
    "overlap": (
        safetensors(two([0, 12], [8, 16])),
        "b begins at byte 8, what is before it ends at 12",
    ),
    "gap": (safetensors(two([0, 4], [8, 16])), "b begins at byte 8"),
    "rest": (safetensors(whole(), bytes(20)), "20 bytes after the header, which tells of 16"),
    "no tensors": (safetensors({}, b""), "holds no tensors"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_lie(tmp_path: Path, what: str) -> None:
    content, reason = HEADERS[what]
    (tmp_path / "x.safetensors").write_bytes(content)
    assert_refused(tmp_path / "x.safetensors", reason)


def test_a_header_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(safetensors(two([0, 4], [4, 16])))
    assert [len(value) for value in load_weights(tmp_path / "x").values()] == [1, 3]


# ------------------------------------------------------------------ memory


def bombs(folder: Path) -> dict[str, str]:
    """Files of at most some megabytes that would take gigabytes, and why they are refused."""
    byte_array = b"cbuiltins\nbytearray\n" + number(2 * 10**9) + b"\x85R"
    doubling = b"c_codecs\nencode\n"
    laughs = nested(20)
    wide = b"(" + b"K\x01" * 10**4 + b"tq\x00"
    views = b"".join(text(str(n)) + tensor(b"h\x01", b"h\x02", b"h\x03") for n in range(400))
    shapes = (
        b"("
        + text("a")
        + tensor(
            storage(count=number(2**20)) + b"q\x01",
            b"M\x00\x04M\x00\x04\x86q\x02",
            b"K\x01M\x00\x04\x86q\x03",
        )
    )
    mebi = {"0": bytes(2**22)}
    pickles = {
        "bytearray": (byte_array, "calls for builtins.bytearray"),
        "codecs": (doubling, "calls for _codecs.encode"),
        "laughs": (laughs, "expands to more than"),
        "laughs as a key": (b"}" + laughs + b"Ns", "expands to more than"),
        "laughs called": (laughs + b")R", "expands to more than"),
        "laughs as a storage": (storage(laughs), "expands to more than"),
        "dimensions": (b"]" + wide + b"h\x00" * 10**4, "expands to more than"),
        "deep": (b")" + b"\x85" * 10**5, "nested more than"),
        "operations": (b"}" * (10**6 + 1), "more than 1000000 operations"),
        "memory of references": (b"Nr\xff\xff\xff\xff", "holds a NoneType"),
        "text": (b"X\xff\xff\xff\x7f", "its pickle is damaged"),
        "large": (b"X" + struct.pack("<I", 17 * 2**20) + bytes(17 * 2**20), "allowed are 16777216"),
        "resized": (
            tensor(storage(count=number(2**20)), number(10**12) + b"\x85", UNIT),
            "torch.load refuses",
        ),
        "expanded": (
            b"}"
            + text("w")
            + tensor(storage(count=number(2**20)), number(2**40) + b"\x85", b"K\x00\x85")
            + b"s",
            "is expanded",
        ),
        "copies of one storage": (b"}" + shapes + views + b"u", "take more than max_bytes"),
    }
    reasons = {}
    for name, (content, reason) in pickles.items():
        torch_zip(folder / f"{name}.pt", PROTO + content + STOP, **mebi)
        reasons[f"{name}.pt"] = reason
    headers = {
        "long header": (safetensors(b"{" + b" " * 9 * 2**20), "allowed are 8388608"),
        "deep header": (safetensors(b'{"a":' * 10**6), "nested too deeply"),
        "empty objects": (
            safetensors(b'{"a":[' + b"{}," * 2 * 10**6 + b"{}]}"),
            "header entry is not",
        ),
    }
    for name, (content, reason) in headers.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        reasons[f"{name}.safetensors"] = reason
    return reasons


# The child may take 400 MiB beyond what torch takes, which the worst of the files above comes near to.
CHILD = """
import resource, sys
from pathlib import Path
import torch
from fastdit.weights.reading import read_checkpoint
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
try:
    torch.load(sys.argv[1], weights_only=True)
except MemoryError:
    print("torch fills the memory")
for path in sys.argv[1:]:
    try:
        read_checkpoint(path)
    except (ValueError, MemoryError) as error:
        print(type(error).__name__, error)
"""


def test_no_file_fills_the_memory(tmp_path: Path) -> None:
    reasons = bombs(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *(str(tmp_path / name) for name in reasons)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(reading.__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr[-2000:]
    filled, *lines = child.stdout.splitlines()
    assert filled == "torch fills the memory"
    assert len(lines) == len(reasons)
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"ValueError {tmp_path / name}: ")
        assert reason in line
