"""Size is a reviewed quantity: lines per package, and a failure for a file or class that has grown into two things."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES = 400
CLASS_LINES = 250


def oversized(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    n_lines = len(text.splitlines())
    found = [f"{name}: {n_lines} lines, limit {FILE_LINES}"] if n_lines > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
            n_class = node.end_lineno - node.lineno + 1
            if n_class > CLASS_LINES:
                found.append(f"{name}: class {node.name} has {n_class} lines, limit {CLASS_LINES}")
    return found


def main() -> int:
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    too_big: list[str] = []
    for top in ("kvctl", "appliance", "tests", "scripts"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            package = "/".join(parts[: min(2, len(parts) - 1)])
            files[package] += 1
            lines[package] += len(path.read_text(encoding="utf-8").splitlines())
            if top in ("kvctl", "appliance"):
                too_big += oversized(path)
    for package in sorted(lines):
        print(f"{package:24}{files[package]:5} files{lines[package]:8} lines")
    product = sum(n for package, n in lines.items() if package.split("/")[0] in ("kvctl", "appliance"))
    print(f"{'product':24}{'':11}{product:8} lines\n{'all':24}{'':11}{sum(lines.values()):8} lines")
    for line in too_big:
        print(f"too big: {line}", file=sys.stderr)
    return 1 if too_big else 0


if __name__ == "__main__":
    sys.exit(main())
