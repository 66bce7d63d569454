"""VerilogEval v2 (arXiv 2408.11053): problems as its repository holds them, one file a part.

`dataset_spec-to-rtl` and `dataset_code-complete-iccad2023` hold of each problem NAME_prompt.txt, NAME_ref.sv (a
`RefModule`) and NAME_test.sv (a bench that compares it with the `TopModule` under test); the second also NAME_ifc.txt,
the module's header, which a completion continues.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibft.errors import DataError

PARTS = {"prompt": "_prompt.txt", "test": "_test.sv", "ref": "_ref.sv"}
HEADER = "_ifc.txt"


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Rows with `task_id`, `prompt`, `test`, `ref`, `canonical_solution`, and `ifc` where the problem has one.

    Raises:
        DataError: no problem in it, or a part of one is missing or cannot be read.
    """
    names = sorted(path.name.removesuffix(PARTS["prompt"]) for path in folder.glob(f"*{PARTS['prompt']}"))
    if not names:
        raise DataError(f"{folder}: no *{PARTS['prompt']} in it (VerilogEval v2: dataset_spec-to-rtl)")
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            row = {part: (folder / f"{name}{ending}").read_text(encoding="utf-8") for part, ending in PARTS.items()}
            header = folder / f"{name}{HEADER}"
            row |= {"ifc": header.read_text(encoding="utf-8")} if header.exists() else {}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{folder}, problem {name}: {getattr(error, 'strerror', None) or error}") from error
        rows.append({"task_id": name, **row, "canonical_solution": re.sub(r"\bRefModule\b", "TopModule", row["ref"])})
    return rows


def header_for(completion: str, problem: Mapping[str, str]) -> str:
    """What the completion continues: the problem's header, where it has one and the completion does not repeat it."""
    return "" if re.search(r"^\s*module\s+TopModule\b", completion, re.MULTILINE) else problem.get("ifc", "")
