"""Copies a shared block, a function, class or constant of the top level, to every script that has one of that name.

    python tests/sync.py make_rows --from rloo.py

A block with the same name is the same text in every script (test_style.py). Edit one copy, then run this.
"""

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def scripts():
    return sorted(path for folder in (".", "variants", "feedback") for path in (ROOT / folder).glob("*.py"))


def names_of(node) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", "")]


def find_block(text: str, name: str) -> slice | None:
    """The lines of the block, its decorators included; None if there is none."""
    for node in ast.parse(text).body:
        if name in names_of(node):
            first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])
            return slice(first - 1, node.end_lineno)
    return None


def copy_block(name: str, source: Path, targets: list[Path]) -> list[Path]:
    """The files that were changed."""
    text = source.read_text()
    where = find_block(text, name)
    if where is None:
        raise SystemExit(f"{source.name} has no {name}")
    block = text.splitlines()[where]
    changed = []
    for path in targets:
        lines = path.read_text().splitlines()
        where = find_block("\n".join(lines), name)
        if where is not None and lines[where] != block:
            lines[where] = block
            path.write_text("\n".join(lines) + "\n")
            changed.append(path)
    return changed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "rloo.py")
    args = parser.parse_args()
    for path in copy_block(args.name, args.source, scripts()):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
