"""What the README tells people to type works. Numbers are made smaller; nothing else is changed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALLER = {
    "--steps 1800": "--steps 4",
    "--warmup-steps 100": "--warmup-steps 1",
    "--num 100": "--num 4 --steps 2",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python() -> None:
    (code,) = blocks("python")
    for large, small in {"DiT-XL/2": "DiT-S/8", '"50"': '"2"'}.items():
        assert large in code
        code = code.replace(large, small)
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["latents"].shape == (2, 4, 32, 32)  # type: ignore[attr-defined]


def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    from fastdit.cli import main

    monkeypatch.chdir(tmp_path)
    text = "".join(blocks("bash")).replace("\\\n", " ")
    for large, small in SMALLER.items():
        assert large in text
        text = text.replace(large, small)
    commands = [
        shlex.split(line, comments=True)
        for line in text.splitlines()
        if line.startswith("fastdit ")
    ]
    assert [command[1] for command in commands] == [
        "train",
        "sample",
        "info",
        "inspect",
        "convert",
        "convert",
        "info",
    ]
    for command in commands:
        main(command[1:])
    assert (tmp_path / "digits.png").stat().st_size > 0
    assert "reference" in capsys.readouterr().out


def test_make_targets_and_links() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert targets >= {"demo", "test", "gpu"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\[]+)\)", prose.replace("`", "")):
        assert link.startswith("https://") or (ROOT / link).exists(), link
