"""README, docs/ and RESULTS.md as text: short, linked, and true to the scripts and to each other."""

import importlib
import re
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
PATHS = [path for folder in (".", "variants", "feedback") for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [path.stem for path in PATHS]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmark/README.md")]
PAGES += [ROOT / "benchmark/RESULTS.md", ROOT / "tests/README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
TERMS = "Policy Reference Response Score KL Nat Reward Baseline Advantage Critic".split()


def prose(text):
    """The text without code blocks, tables, inline code and the targets of links."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"^\|.*$", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`", "code", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(text):
    """Of each paragraph or item of a list."""
    for paragraph in re.split(r"\n\s*\n|\n\s*[*#-] ?", prose(text)):
        yield from re.split(r"(?<=[.:;?!])\s+", paragraph)


def test_the_front_page_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 2200
    long = [sentence for sentence in sentences(README) if len(sentence.split()) > 35]
    assert not long


def test_terms_stand_behind_their_definitions():
    """Beside the words before the list, which say KL and score and explain them on the spot."""
    for term in TERMS:
        assert len(re.findall(rf"^\* \*\*{term}\*\*", README, re.M)) == 1
    before = prose(README.split("* **Policy**")[0]).lower()
    used = [term for term in TERMS if re.search(rf"\b{term.lower()}s?\b", before)]
    assert set(used) <= {"KL", "Score"}
    assert "KL says how far" in README and "VADER gives the score" in README


def test_every_number_of_the_front_page_is_in_the_results():
    results = (ROOT / "benchmark/RESULTS.md").read_text()
    tables = "\n".join(re.findall(r"^\|.*$|^(?:SFT|trained) .*$", README, re.M))
    numbers = re.findall(r"-?\d+\.\d+", tables)
    assert len(numbers) > 15
    missing = [number for number in numbers if number not in results]
    assert not missing


def anchors(path):
    """GitHub's: lower case, punctuation dropped, blanks as hyphens."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page
        if name:
            path = page.parent / name
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


SHOWN = [page for page in PAGES if page != ROOT / "benchmark/README.md"]  # whose loops and variables bash expands
SHOWN += PATHS


@pytest.mark.parametrize("page", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_ours_that_is_shown_is_understood(page):
    text = page.read_text().replace("\\\n", " ")
    launchers = r"(?:accelerate launch|uv run|python|torchrun)(?: --\S+ [^-\s]\S*)*"
    shown = re.findall(rf"{launchers} (?:variants/|feedback/)?(\w+)\.py\b([^#`|\n]*)", text)
    if page.stem in SCRIPTS:
        assert len(shown) >= 2
    for script, flags in shown:
        if script in SCRIPTS:
            flags = re.sub(r"\$\{?\w+\}?", "1", flags.replace("--help", ""))  # variables of a loop
            tyro.cli(importlib.import_module(script).Args, args=flags.replace("...", "").replace('"', "").split())


def top_level(path):
    return set(re.findall(r"^(?:def|class) (\w+)", path.read_text(), re.M))


def page_of(path):
    """The two scripts with LoRA have one."""
    return ROOT / f"docs/{path.stem.split('_')[-1] if path.stem.endswith('_lora') else path.stem}.md"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_script_has_a_page_that_names_its_functions_and_metrics(path):
    page = page_of(path).read_text()
    script = path.read_text()
    assert f"docs/{page_of(path).name}" in README
    for section in ("The idea", "How the code maps to it", "What is logged", "Flags that matter", "Results"):
        assert f"## {section}" in page
    for section in ("Left out", "Traps"):
        assert f"## {section}" in page
    if path.parent == ROOT:
        algorithm = script.split("# ---- The algorithm ----")[-1].split("# ---- Evaluation ----")[0]
        own = re.findall(r"^def (\w+)", algorithm, re.M)
    else:  # what the core scripts do not have
        own = top_level(path).difference(*[top_level(core) for core in ROOT.glob("*.py")])
    for function in own:
        assert f"`{function}`" in page, function
    if page_of(path).stem != "lora":  # which logs what the core scripts do
        for tag in re.findall(r'"((?:objective|policy|loss|val|charts|rewards|logps)/\w+)"', script):
            group, _, metric = tag.partition("/")
            assert tag in page or (f"`{group}/" in page and metric in page), tag


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_be_done(page):
    assert "TODO" not in page.read_text()
