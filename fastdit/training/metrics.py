"""metrics.jsonl: one line of JSON per log step, never two for the same step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import files


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in their order; lines that a killed process left unfinished are left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def drop_after(path: Path, step: int) -> None:
    """Removes the records of steps after `step`, which a resumed run goes through again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
