"""Every kernel is compiled for GPUs that need not be there: nothing spills, no load is scalar, and limits.json holds.

In a child process, for the kernels of this one are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fastdit.kernels import ahead_of_time, shipped

ROOT = Path(__file__).parents[2]
# By kernel and class (a dtype at the sizes of a DiT, with heads of 128 too, or the D of wider rows), whatever the
# capability. At most so many registers a thread (rounded up to the 8 in which they are given out), bytes of shared
# memory a program, bytes of stack a thread (0 where it is not said), barriers, narrow loads and stores; at least so
# many bits in the widest load and store, and instructions for the tensor cores.
_FILE = json.loads((Path(__file__).parent / "limits.json").read_text())
LIMITS = _FILE["limits"]
MORE = _FILE["more in triton 3.6"] if triton.__version__.startswith("3.6.") else {}
REGISTERS = 65536  # of an SM


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a child whose kernels are compiled, and nothing of it was before."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )


def printed(cache: Path, *arguments: str) -> Any:
    """The JSON that a child prints."""
    done = run(cache, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kind(row: dict[str, Any]) -> str:
    """The class of `LIMITS` that a row is in."""
    wide = "K=128, " if row["case"].startswith("K=128") else ""
    return wide + row["dtype"] if row["d"] <= 1152 else f"D={row['d']}"


def most_scalar_loads(row: dict[str, Any]) -> int:
    """How many loads may take 8 or 16 bits a thread: none, but where there is no more for one."""
    # Two tokens of a condition are a block of 16 keys, whose 16 columns after the 64th are one value for each of 256
    # threads, of k and of v; sm_100 has the loop twice.
    if (row["kernel"], row["case"]) == ("attention.forward", "K=72, cross"):
        return 0 if row["dtype"] == "fp32" else 4 if row["capability"] >= 100 else 2
    # Gradients in 16 bits at addresses that allow no vectors.
    return int(row["kernel"] == "adamw_ema.update" and row["dtype"] in ("bf16", "fp16"))


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel; empty if nothing is."""
    limits = LIMITS.get(row["kernel"], {}).get(kind(row))
    if limits is None:
        return [f"{row['kernel']}, {kind(row)}: not in limits.json"]
    found = []
    if row["registers"] * 32 * row["num_warps"] > REGISTERS:
        found.append(f"{row['registers']} registers in {row['num_warps']} warps")
    kib = ahead_of_time.SHARED_KIB[row["capability"]]
    if row["shared_bytes"] > 1024 * kib:
        found.append(f"shared_bytes {row['shared_bytes']}, of {kib} KiB")
    if not row["stack_bytes"] and row["local_accesses"]:
        found.append(f"local_accesses {row['local_accesses']} without a stack")
    more = MORE.get(row["kernel"], {}).get(kind(row), {})
    always = {"stack_bytes": 0, "scalar_loads": most_scalar_loads(row)}
    for name, limit in {**always, **limits, **more}.items():
        least = name.startswith(("widest", "tensor_core"))
        wrong = row[name] < limit if least else row[name] > limit
        if wrong:
            found.append(f"{name} {row[name]}, limit {limit}")
    what = ", ".join(str(row[k]) for k in ("kernel", "case", "shape", "dtype"))
    return [f"sm_{row['capability']} {what}: {fault}" for fault in found]


def assert_no_faults(rows: list[dict[str, Any]]) -> None:
    found = [fault for row in rows for fault in faults(row)]
    assert not found, "\n".join(found)


XL = """
import json
from fastdit.kernels import ahead_of_time, shipped

chosen = shipped.shipped([shipped.Configuration(1152, "bf16/fp32", 64, 256)])
rows = list(shipped.compile_shipped(chosen, [80, 90]))
ttir = [ahead_of_time.compile_kernel(one.launch, 90).asm["ttir"] for one in chosen]
print(json.dumps({"rows": rows, "ttir": ttir}))
"""


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """DiT-XL under autocast: what every kernel takes of sm_80 and sm_90, and its intermediate code."""
    return printed(tmp_path_factory.mktemp("cache"), "-c", XL)


def test_xl(xl: dict[str, Any]) -> None:
    assert {row["kernel"] for row in xl["rows"]} == set(LIMITS)
    assert {row["capability"] for row in xl["rows"]} == {80, 90}
    assert_no_faults(xl["rows"])


@pytest.mark.slow
def test_everything(tmp_path: Path) -> None:
    """By the command, which is tested with it."""
    capabilities = ["80", "86", "90", "100"]
    command = ["-m", "fastdit", "info", "--json", "--kernels", "--capability", *capabilities]
    kernels = printed(tmp_path, *command)["kernels"]
    assert kernels["reason"] is None
    rows = kernels["compiled"]
    assert {str(row["capability"]) for row in rows} == set(capabilities)
    expected = {(kernel, name) for kernel, classes in LIMITS.items() for name in classes}
    assert {(row["kernel"], kind(row)) for row in rows} == expected
    assert_no_faults(rows)


# ------------------------------------------------------------------ 64-bit offsets


def products(ttir: str, d: int, bits: int) -> list[str]:
    """The multiplications of integers of `bits` bits by an argument, as a stride is, or by a multiple of D."""
    integer = rf"(?:tensor<[\dx]+xi{bits}>|i{bits})"
    constants = re.findall(rf"(%\S+) = arith\.constant (?:dense<)?(\d+)>? : {integer}", ttir)
    large = {name for name, value in constants if int(value) and int(value) % d == 0}
    large |= set(
        re.findall(rf"(%\w+): i{bits}\b", ttir.partition("tt.func")[2].partition("{\n")[0])
    )
    found = re.findall(rf"^.*arith\.muli (%\S+), (%\S+) : {integer}", ttir, flags=re.MULTILINE)
    return [f"{a} * {b}" for a, b in found if {a, b} & large]


def row_kernels(xl: dict[str, Any]) -> list[tuple[str, str]]:
    rows = zip(xl["rows"], xl["ttir"], strict=False)  # the rows of sm_80 come first
    rooms = ("rows", "layer_norm_modulate", "gated_residual", "mlp_gelu")
    return [(row["kernel"], ttir) for row, ttir in rows if row["kernel"].startswith(rooms)]


def test_offsets_of_rows_have_64_bits(xl: dict[str, Any]) -> None:
    """Also where a tensor has more than 2^31 elements: row * D and sample * stride are 64-bit products."""
    kernels = row_kernels(xl)
    assert len({kernel for kernel, _ in kernels}) == 8
    for kernel, ttir in kernels:
        assert products(ttir, 1152, 64), kernel
        assert not products(ttir, 1152, 32), kernel


def test_narrow_offsets_are_found(xl: dict[str, Any]) -> None:
    for kernel, ttir in row_kernels(xl):
        assert products(ttir.replace("i64", "i32"), 1152, 32), kernel


# ------------------------------------------------------------------ the checks themselves

VARIANTS = """
import json

import torch

from fastdit.kernels import layer_norm_modulate, shipped
from fastdit.kernels.launch import recording


def forward(d, offset=0):
    # A plain layer norm of one row that lies `offset` values after where a tensor begins.
    x = torch.empty(offset + d, dtype=torch.bfloat16, device="meta")[offset:].view(1, 1, d)
    with recording() as launches:
        layer_norm_modulate.forward(x, None, None, 1e-6, x.dtype)
    return launches[0]


launches = {
    "good": forward(1152),
    "8 divides D": forward(1160),
    "16 bytes do not divide the address": forward(1152, offset=1),
    "one warp": forward(8192)._replace(num_warps=1),
}
known = shipped.Configuration(1152, "bf16", 1, 1)
chosen = [shipped.Shipped(known, case, launch) for case, launch in launches.items()]
print(json.dumps(list(shipped.compile_shipped(chosen, [90]))))
"""


def test_faults_are_found(tmp_path: Path) -> None:
    rows = {row["case"]: row for row in printed(tmp_path, "-c", VARIANTS)}
    assert faults(rows["good"]) == []
    assert faults(rows["8 divides D"]) == []

    narrow = rows["16 bytes do not divide the address"]
    assert narrow["widest_load"] == 16
    assert any("widest_load 16, limit 128" in fault for fault in faults(narrow))
    assert narrow["scalar_loads"] > 0
    assert any("scalar_loads" in fault for fault in faults(narrow))

    spilling = rows["one warp"]
    assert spilling["local_accesses"] > 0
    assert any("stack_bytes" in fault for fault in faults(spilling))

    for name, value in {
        "registers": 255,
        "shared_bytes": 228 * 1024,
        "local_accesses": 1,
        "narrow_loads": 99,
        "narrow_stores": 99,
        "barriers": 99,
        "widest_store": 64,
    }.items():
        assert any(f"{name} {value}" in fault for fault in faults({**rows["good"], name: value}))
    too_many = {**rows["good"], "registers": 72, "num_warps": 32}
    assert any("72 registers in 32 warps" in fault for fault in faults(too_many))
    assert "not in limits.json" in faults({**rows["good"], "kernel": "other.forward"})[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted")
def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"layer_norm_modulate.forward .* unset TRITON_INTERPRET"
    ):
        shipped.shipped([shipped.Configuration(384, "bf16", 1, 16)])


def test_unknown_capability() -> None:
    with pytest.raises(ValueError, match=r"capability=75: allowed are 80, 86, 89, 90"):
        list(ahead_of_time.compile_all([], [90, 75]))
