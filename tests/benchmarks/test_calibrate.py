"""The whole program on tiny shapes: complete rows, files that are whole or absent, honest reasons."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import calibrate
from benchmarks.calibrate import Sizes, attention_cost, block_flops, linear_products
from benchmarks.measure import Bench
from benchmarks.results import UNITS, Row

ROOT = Path(__file__).resolve().parents[2]
PARTS = [
    "launch",
    "copy",
    "matmul",
    "gelu",
    "attention",
]  # Inductor has to compile: see the slow test
FIELDS: dict[str, tuple[type, ...]] = {
    "suite": (str,),
    "case": (str,),
    "provider": (str,),
    "shape": (dict,),
    "dtype": (str,),
    "metric": (str,),
    "unit": (str,),
    "value": (float, type(None)),
    "spread": (float, type(None)),
    "baseline": (str, type(None)),
    "ratio": (float, type(None)),
    "fraction_of_ceiling": (float, type(None)),
    "device": (str,),
    "driver": (str, type(None)),
    "torch": (str,),
    "triton": (str, type(None)),
    "commit": (str,),
    "date": (str,),
    "bytes": (int, type(None)),
    "flops": (int, type(None)),
    "kernels": (list,),
    "reason": (str, type(None)),
}


def run(output: Path, *arguments: str) -> None:
    calibrate.main(["--small", "--device", "cpu", "--output", str(output), *arguments])


def rows_below(output: Path) -> list[dict[str, Any]]:
    """The rows of all files of the one run in `output`, each checked against the schema."""
    paths = sorted(output.glob("*/*/*"))
    assert len({path.parent for path in paths}) == 1
    assert len(paths) <= 8
    rows = []
    for path in paths:
        document = json.loads(path.read_text())
        assert document["schema"] == 1
        assert {row["suite"] for row in document["rows"]} == {path.stem}
        rows += document["rows"]
    for row in rows:
        assert row.keys() == FIELDS.keys()
        for field, types in FIELDS.items():
            assert isinstance(row[field], types), (field, row)
        assert row["unit"] == UNITS[row["metric"]]
        assert all(isinstance(size, int) for size in row["shape"].values())
        assert (row["value"] is None) == (row["spread"] is None) == (row["reason"] is not None)
        assert row["value"] is None or row["value"] > 0
        assert (row["ratio"] is None) == (row["baseline"] is None)
    return rows


@pytest.fixture(scope="module", autouse=True)
def one_environment() -> Iterator[None]:
    """Of all runs: midnight, or a file that changes, between two of them would be another folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "environment_of", functools.cache(calibrate.environment_of))
        yield


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    run(folder, "--parts", *PARTS)
    return folder


def test_every_part_writes_complete_rows(output: Path) -> None:
    rows = rows_below(output)
    assert {row["suite"] for row in rows} == set(PARTS)
    assert {row["device"].split()[0] for row in rows} == {"CPU"}
    assert next(output.iterdir()).name.startswith("cpu-")
    assert next(output.glob("*/*")).name.endswith("-small")
    assert {row["torch"] for row in rows} == {torch.__version__}


def test_every_case_is_there(output: Path) -> None:
    cases = {
        (row["suite"], row["case"], row["provider"], *row["shape"].values())
        for row in rows_below(output)
    }
    sizes = calibrate.SMALL
    products = {
        ("matmul", f"{linear} {case}", provider, m, k, n)
        for linear, (k, n) in sizes.linears.items()
        for case in ("forward", "dgrad", "wgrad")
        for provider in ("mm", "scaled_mm rowwise")
        for m in sizes.rows
    }
    attentions = {
        ("attention", case, backend, n, sizes.heads, t, d)
        for case in ("forward", "backward")
        for backend in ("default", "flash", "efficient", "cudnn", "math")
        for n, t in sizes.attention
        for d in (64, 72)
    }
    copies = {("copy", "copy", "copy_", size) for size in sizes.copies}
    assert products | attentions | copies < cases


def test_what_a_cpu_cannot_do_has_a_reason(output: Path) -> None:
    rows = rows_below(output)
    reasons = {(row["suite"], row["provider"]): row["reason"] for row in rows}
    assert reasons["launch", "graph node"] == "CUDA graphs need a GPU"
    assert "erf" in reasons["gelu", "addmm_activation"]
    assert "backend" in reasons["attention", "cudnn"]
    assert reasons["attention", "math"] is None
    assert reasons["matmul", "mm"] is None


def test_ceilings_are_those_of_the_same_run(output: Path) -> None:
    rows = rows_below(output)
    best = max(
        row["value"] for row in rows if row["suite"] == "matmul" and row["dtype"] == "bfloat16"
    )
    copies = {row["bytes"]: row["value"] for row in rows if row["suite"] == "copy"}
    for row in rows:
        if row["suite"] == "copy":
            assert row["fraction_of_ceiling"] == pytest.approx(row["value"] / max(copies.values()))
        if row["suite"] == "matmul" and row["dtype"] == "bfloat16":
            assert row["fraction_of_ceiling"] == pytest.approx(row["value"] / best)
        if row["suite"] in ("gelu", "attention") and row["value"] is not None:
            assert row["fraction_of_ceiling"] >= row["flops"] / (best * 1e6) / row["value"] * 0.999
        if row["suite"] == "launch":
            assert row["fraction_of_ceiling"] is None


def test_the_kernels_that_ran_are_named(output: Path) -> None:
    for row in rows_below(output):
        if row["suite"] == "attention" and row["value"] is not None:
            assert any(
                "attention" in name or "matmul" in name or "bmm" in name for name in row["kernels"]
            ), row
            if row["provider"] == "flash":
                assert any("flash" in name for name in row["kernels"])
            if row["provider"] == "math":
                assert not any("flash" in name for name in row["kernels"])


def test_what_was_measured_is_skipped_unless_forced(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in output.glob("*/*/*")}
    run(output, "--parts", *PARTS)
    assert {path: path.read_bytes() for path in output.glob("*/*/*")} == before
    shown = capsys.readouterr()
    assert shown.err.count("skipped") == len(PARTS)
    assert "copy_" in shown.out  # the table is complete all the same

    row = Row("copy", "copy", "again", {"bytes": 8}, "bfloat16", "bandwidth", 1.0, 0.0, bytes=8)
    monkeypatch.setitem(calibrate.PARTS, "copy", lambda bench, sizes: iter([row]))
    run(output, "--parts", "copy", "--force")
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert [path.name for path in changed] == ["copy.json"]
    assert json.loads(changed[0].read_text())["rows"][0]["provider"] == "again"
    changed[0].write_bytes(before[changed[0]])  # for the other tests


def test_a_part_that_breaks_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench, sizes: Sizes) -> Iterator[Row]:
        yield from calibrate.copy(bench, sizes)
        raise ZeroDivisionError

    monkeypatch.setitem(calibrate.PARTS, "copy", broken)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "--parts", "launch", "copy")
    assert [path.name for path in tmp_path.glob("*/*/*")] == ["launch.json"]


def test_a_block_that_does_not_compile_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(first_call: object) -> list[str]:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(calibrate, "generated_code", fail)
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: torch.nn.Sequential(model))
    run(tmp_path, "--parts", "inductor")
    rows = rows_below(tmp_path)
    found = {(row["case"], row["provider"]): row["reason"] for row in rows}
    assert found == {
        ("forward", "eager"): None,
        ("forward", "inductor"): "no compiler here",
        ("forward + backward", "eager"): None,
        ("forward + backward", "inductor"): "no compiler here",
        ("kernels", "inductor"): "the block was not compiled",
    }


def test_operations_and_bytes_by_hand() -> None:
    products = linear_products(m=2, k=3, n=5)
    assert {case: product.flops for case, product in products.items()} == dict.fromkeys(
        products, 2 * 2 * 3 * 5
    )
    assert products["forward"].bytes(2) == 2 * (2 * 3 + 3 * 5 + 2 * 5)
    assert products["dgrad"].bytes(2) == 2 * (2 * 5 + 5 * 3 + 2 * 3)
    assert products["wgrad"].bytes(1) == (5 * 2 + 2 * 3) + 2 * (5 * 3)
    # 8 D bytes for each token and layer, and half a FLOP per byte and token (T = 256, D = 16 x 72)
    assert attention_cost(1, 16, 256, 72, backward=False) == (8 * 1152 * 256, 128 * 8 * 1152 * 256)
    assert attention_cost(2, 3, 5, 7, backward=True) == (8 * 2 * 210, 5 * 2 * 210 * 5)
    # DiT-XL/2 at 256 pixels: 28 blocks of one image are 28 x (8.154 linear + 0.302 attention + 0.016 adaLN) GFLOP
    linear, scores, modulation = 24 * 256 * 1152**2, 4 * 256**2 * 1152, 12 * 1152**2
    assert block_flops(1, 256, 1152, backward=False) == linear + scores + modulation
    assert 28 * block_flops(1, 256, 1152, backward=False) == pytest.approx(237.2e9, rel=2e-3)
    assert block_flops(1, 256, 1152, backward=True) == 3 * (linear + modulation) + 7 * scores // 2


def test_a_copy_reads_half_of_its_bytes_and_writes_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.Tensor] = []
    normal = Bench.normal
    monkeypatch.setattr(Bench, "normal", lambda *shape: made.append(normal(*shape)) or made[-1])
    ready = calibrate.copy_prepare(Bench(torch.device("cpu"), 1, 60), 4096)()
    assert [tensor.nbytes for tensor in made] == [2048] * 4  # two sets, a target and a source each
    target, source = made[2:]
    assert not torch.equal(target, source)
    assert ready.run(1) is target
    assert torch.equal(target, source)


def test_operands_are_stored_as_autograd_finds_them() -> None:
    bench = Bench(torch.device("cpu"), 1, 60)
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    strides = {}
    for case, product in linear_products(4, 3, 5).items():
        a, b = product.operands(bench)
        assert (a.shape, b.shape) == (
            (product.rows, product.inner),
            (product.inner, product.columns),
        )
        strides[case] = (a.stride(), b.stride())
    dy = torch.ones(4, 5)
    assert strides["forward"] == (x.stride(), w.t().stride())
    assert strides["dgrad"] == (dy.stride(), w.stride())
    assert strides["wgrad"] == (dy.t().stride(), x.stride())


def test_rows_keep_their_size_in_fp8() -> None:
    x = torch.randn(4, 64) * torch.tensor([[1e-6], [1.0], [1e4], [1e8]])
    quantised, scale = calibrate.quantise_rows(x)
    assert quantised.dtype == torch.float8_e4m3fn
    assert scale.shape == (4, 1)
    assert quantised.float().abs().amax(dim=1).tolist() == [448.0] * 4
    # three mantissa bits: half a step is 2^-4, as long as the number is not subnormal (2^-6 after scaling)
    error = (quantised.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10)).all()


def test_the_gelu_is_told_apart() -> None:
    calibrate.require_tanh(calibrate.linear_gelu, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="erf GELU"):
        calibrate.require_tanh(
            lambda x, weight, bias: torch.nn.functional.gelu(x @ weight.t() + bias),
            torch.device("cpu"),
        )


def test_bytes_are_read_from_generated_code() -> None:
    code = """
triton_red_fused_add_native_layer_norm_0 = async_compile.triton('triton_red_fused_add_native_layer_norm_0', '''
    inductor_meta={'grid_type': 'Grid1D', 'kernel_name': 'triton_red_fused_add_native_layer_norm_0', 'num_load': 2, 'kernel_num_gb': 0.113246208, 'kernel_flop': 0},
    inductor_meta={'kernel_name': 'triton_poi_fused_gelu_1', 'kernel_num_gb': 3.2e-06, 'x': True},
    inductor_meta={'kernel_name': 'triton_for_fused_2', 'num_load': 2},
"""  # noqa: E501
    assert calibrate.triton_kernel_bytes([code, ""]) == {
        "triton_red_fused_add_native_layer_norm_0": 113_246_208,
        "triton_poi_fused_gelu_1": 3200,
    }


def test_needs_torch_and_numpy_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "triton", "benchmarks"}
    for name in ("calibrate", "measure", "results"):
        for node in ast.walk(
            ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
        ):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            if isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in allowed


@pytest.mark.parametrize(
    "start", [[str(ROOT / "benchmarks/calibrate.py")], ["-m", "benchmarks.calibrate"]]
)
def test_starts_from_the_source_tree(start: list[str], tmp_path: Path) -> None:
    folder = ROOT if start[0] == "-m" else tmp_path
    options = ["--small", "--device", "cpu", "--parts", "launch", "--output", str(tmp_path / "out")]
    command = [sys.executable, *start, *options]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert "one-element add" in shown
    assert [row["provider"] for row in rows_below(tmp_path / "out")] == ["eager", "graph node"]


def test_wrong_arguments_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        calibrate.main(["--parts", "copie"])
    assert "copie" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        calibrate.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_inductor_on_a_cpu(tmp_path: Path) -> None:
    """In a process of its own: importing Inductor warns of what torch itself has deprecated."""
    options = ["--small", "--device", "cpu", "--parts", "inductor", "--output", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks/calibrate.py"), *options]
    subprocess.run(command, capture_output=True, check=True)
    rows = {(row["case"], row["provider"]): row for row in rows_below(tmp_path)}
    for case in ("forward", "forward + backward"):
        assert rows[case, "inductor"]["value"] > 0
        assert rows[case, "inductor"]["baseline"] == "eager"
    assert rows["kernels", "inductor"]["reason"] == "the times of kernels need a GPU"


@pytest.mark.gpu
def test_all_parts_on_a_gpu(tmp_path: Path) -> None:
    calibrate.main(["--small", "--device", "cuda", "--output", str(tmp_path)])
    rows = rows_below(tmp_path)
    assert {row["suite"] for row in rows} == set(calibrate.PARTS)
    measured = {(row["suite"], row["provider"]) for row in rows if row["value"] is not None}
    assert measured >= {
        ("launch", "eager"),
        ("launch", "graph node"),
        ("copy", "copy_"),
        ("matmul", "mm"),
        ("gelu", "linear, gelu"),
        ("gelu", "addmm_activation"),
        ("attention", "default"),
        ("attention", "math"),
        ("inductor", "eager"),
        ("inductor", "inductor"),
    }
    assert all(
        row["kernels"] for row in rows if row["value"] is not None and row["provider"] != "eager"
    )
    assert any(row["metric"] == "bandwidth" for row in rows if row["suite"] == "inductor")
