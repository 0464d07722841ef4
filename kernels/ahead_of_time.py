"""What the compiler makes of a recorded launch, on a machine with or without a GPU.

A launch is specialised on its arguments (aligned pointers, integers that 16 divides, ones, None) by Triton's own steps,
so what is compiled here is what would run. Its resources are read from the machine code, with the disassembler that
comes with Triton. Triton keeps what it has compiled in TRITON_CACHE_DIR.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.knobs import nvidia
from triton.runtime.jit import create_function_from_signature

from .launch import Launch

# KiB of shared memory that a program may have, by compute capability. Source: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

# A line of the disassembly: /*0080*/ @!P1 LDG.E.128 R4, ...
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE
)
_BITS = re.compile(r"[US]?(8|16|64|128|256)")
# sm_80 and later, sm_90, sm_100.
_TENSOR_CORE = ("HMMA.", "HGMMA.", "UTCHMMA")
_BATCH = 32  # kernels that are disassembled together


class Compiled(NamedTuple):
    """What one kernel takes of one compute capability (90 is sm_90). Counts are of instructions in the machine code."""

    kernel: str
    capability: int
    num_warps: int
    registers: int  # a thread
    shared_bytes: int  # a program
    stack_bytes: int  # a thread; above 0 where registers spill
    local_accesses: int  # loads from the stack and stores to it
    widest_load: int  # bits of the widest load of a thread from global memory
    narrow_loads: int  # loads of fewer than 128 bits from global memory
    scalar_loads: int  # those of them of fewer than 32
    widest_store: int
    narrow_stores: int
    barriers: int
    tensor_core: int  # products of matrices


def kernel_name(launch: Launch) -> str:
    """`layer_norm_modulate.forward` for `_forward_kernel` of kernels/layer_norm_modulate.py."""
    function = launch.kernel.fn
    name = function.__name__.removeprefix("_").removesuffix("_kernel")
    return f"{function.__module__.rpartition('.')[2]}.{name}"


def specialise(launch: Launch, capability: int) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """Source, target and options, as `launch` would give them to Triton's compiler on a device of `capability`.

    Raises RuntimeError in a process whose kernels are interpreted.
    """
    kernel = launch.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"{kernel_name(launch)} is interpreted in this process and cannot be compiled: unset TRITON_INTERPRET"
        )
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "maxnreg": launch.maxnreg,
        "enable_fp_fusion": True,
    }
    # As in JITFunction.run, which needs a device.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, given = bind(*launch.arguments, **launch.constants, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialisation, given
    )
    return ASTSource(kernel, signature, constants, attributes), target, parsed.__dict__


def identity(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that run the same machine code."""
    source, _, _ = specialise(launch, 90)
    return source.hash(), launch.num_warps, launch.num_stages, launch.maxnreg


def compile_kernel(launch: Launch, capability: int) -> Any:
    """Triton's CompiledKernel of a launch; its `asm` holds "ttir", "ttgir", "ptx" and "cubin"."""
    source, target, options = specialise(launch, capability)
    return triton.compile(source, target=target, options=options)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch, and reads what it takes."""
    (compiled,) = compile_all([launch], [capability])
    return compiled


def compile_all(launches: Sequence[Launch], capabilities: Sequence[int]) -> Iterator[Compiled]:
    """Every launch for the first capability, then for the next, in this order, on all cores.

    Raises ValueError for a capability that is not in `SHARED_KIB`.
    """
    for capability in capabilities:
        if capability not in SHARED_KIB:
            allowed = ", ".join(map(str, SHARED_KIB))
            raise ValueError(f"capability={capability}: allowed are {allowed}")
    # Threads: the compiler and its assembler run outside of Python's lock.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for capability in capabilities:
            kernels = pool.map(compile_kernel, launches, [capability] * len(launches))
            for start in range(0, len(launches), _BATCH):
                batch = launches[start : start + _BATCH]
                ready = [next(kernels) for _ in batch]
                codes = disassemble([kernel.asm["cubin"] for kernel in ready], capability)
                for launch, kernel, code in zip(batch, ready, codes, strict=True):
                    yield _read(launch, capability, kernel, code)
    finally:
        pool.shutdown(cancel_futures=True)


def disassemble(cubins: Sequence[bytes], capability: int) -> list[list[str]]:
    """The opcodes of each cubin, as `LDG.E.128`. In one call: the disassembler takes longer to start than to read."""
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(texts))
        file.flush()
        listing = _run(nvidia.nvdisasm.path, "-ndf", "-b", f"SM{capability}", file.name)
    codes: list[list[str]] = [[] for _ in texts]
    ends = list(itertools.accumulate(map(len, texts)))
    for address, opcode in _INSTRUCTION.findall(listing):
        codes[bisect.bisect(ends, int(address, 16))].append(opcode)
    return codes


def _text(cubin: bytes) -> bytes:
    """The machine code of a cubin, which holds one kernel: the section `.text.<kernel>` of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", strings + name)
    )
    return code


def _read(launch: Launch, capability: int, kernel: Any, code: Sequence[str]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(nvidia.cuobjdump.path, "-res-usage", file.name)
    loads, stores = _widths(code, "LDG", "LDGSTS"), _widths(code, "STG")
    return Compiled(
        kernel=kernel_name(launch),
        capability=capability,
        num_warps=launch.num_warps,
        registers=_resource(usage, "REG"),
        shared_bytes=kernel.metadata.shared,
        stack_bytes=_resource(usage, "STACK"),
        local_accesses=len(_widths(code, "LDL", "STL")),
        widest_load=max(loads, default=0),
        narrow_loads=sum(bits < 128 for bits in loads),
        scalar_loads=sum(bits < 32 for bits in loads),
        widest_store=max(stores, default=0),
        narrow_stores=sum(bits < 128 for bits in stores),
        barriers=sum(opcode.startswith("BAR.") for opcode in code),
        tensor_core=sum(opcode.startswith(_TENSOR_CORE) for opcode in code),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resource(usage: str, name: str) -> int:
    """A number in `REG:72 STACK:0 SHARED:0 ...`."""
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing of {name}: {usage!r}")
    return int(found[1])


def _widths(code: Sequence[str], *names: str) -> list[int]:
    """How many bits each instruction of these names moves a thread: `LDG.E.128` 128, `LDG.E.U16` 16, `LDG.E` 32."""
    widths = []
    for opcode in code:
        name, *modifiers = opcode.split(".")
        if name in names:
            bits = [int(m.lstrip("US")) for m in modifiers if _BITS.fullmatch(m)]
            widths.append(bits[0] if bits else 32)
    return widths
