"""What docs and docstrings refer to exists: files, sections, modules, names, settings, commands and flags."""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from mbcd_cli.cli import app
from mbcd_cli.data.modalities import KINDS
from mbcd_cli.data.readers import READERS, reader_settings
from mbcd_cli.methods import METHODS, method_class
from mbcd_cli.settings import Settings, Slice

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "mbcd_cli").rglob("*.py"))}
OURS = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py"))}
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
}
PLACEHOLDERS = {"a.b", "part.field", "MBCD_PART__FIELD", "MBCD_A__B", "video_left"}
MADE_UP = re.compile(r"(X|RUN_FOLDER|NAME|FILE|x_flow_[xy])\.\w+")
"""Files of a name that stands for another."""
INSTANCES = {"model": "MultiModalModel", "loss": "LossFunction"}
"""What things are called that are of a class of another name."""
OTHERS_FLAGS = {"--group", "--nproc-per-node"}
"""Flags of uv and torchrun."""
LIBRARIES = ("numpy", "torch", "torch.nn", "matplotlib.pyplot")


def docstrings(text: str) -> str:
    """All strings of a file that stand by themselves, one after the other."""
    nodes = ast.walk(ast.parse(text))
    strings = (
        node.value.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    return "\n\n".join(string for string in strings if isinstance(string, str))


def prose(path: Path) -> str:
    """What is to be read of a file: a page without its blocks of code, the docstrings of a module."""
    if path in PAGES:
        return re.sub(r"^```.*?^```", "", PAGES[path], flags=re.DOTALL | re.MULTILINE)
    return docstrings(SOURCES[path])


def in_ticks(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(path))


@cache
def identifiers() -> frozenset[str]:
    """Every identifier of the package's code, and every word of its strings that are not docstrings."""
    words = {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES}
    for text in SOURCES.values():
        words |= {t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.NAME}
    return frozenset(words).union(*(re.findall(r"\w+", string) for string in strings()))


@cache
def strings() -> frozenset[str]:
    """Every string of the package's code that is no docstring."""
    return frozenset(
        node.value
        for text in SOURCES.values()
        for node in _apart_from_docstrings(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _apart_from_docstrings(tree: ast.AST) -> list[ast.AST]:
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [node for node in ast.walk(tree) if id(node) not in told]


@cache
def members() -> dict[str, set[str]]:
    """Module, by its last name, or class -> what it defines; of a class with its bases' and its instances'."""
    held: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for path, text in SOURCES.items():
        tree = ast.parse(text)
        top = held.setdefault(path.parent.name if path.stem == "__init__" else path.stem, set())
        for node in tree.body:
            top |= {getattr(node, "name", "")} | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                inside = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.Name | ast.Attribute)]
                held[node.name] = {getattr(n, "name", None) or getattr(n, "id", None) or n.attr for n in inside}
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    for name, above in bases.items():
        held[name] = held[name].union(*(held.get(base, set()) for base in above))
    return held


def is_setting(path: str) -> bool:
    """Whether there is a setting, or a group, of this dotted path in some tree."""
    first, *rest = path.removeprefix("settings.").removesuffix(".*").split(".")
    if first not in Settings.model_fields:
        return False
    groups: list[type[Slice]]
    if first == "modalities":
        groups, rest = list(KINDS.values()), rest[1:]
    elif first == "method":
        groups = [method_class(name).Settings for name in METHODS]
    elif path.startswith("dataset.reader."):
        groups, rest = [type(reader_settings(name)) for name in READERS], rest[1:]
    else:
        groups = [Settings.model_fields[first].annotation]
    return not rest or any(_has(group, rest) for group in groups)


def _has(group: object, keys: list[str]) -> bool:
    field = getattr(group, "model_fields", {}).get(keys[0])
    return field is not None and (len(keys) == 1 or _has(field.annotation, keys[1:]))


def _importable(word: str) -> bool:
    module, _, name = word.rpartition(".")
    if not module:
        return hasattr(builtins, name)
    for prefix in ("", *(f"{library}." for library in LIBRARIES)):
        try:
            return hasattr(importlib.import_module((prefix + module).rstrip(".")), name)
        except ImportError:
            continue
    return False


def is_name(word: str) -> bool:
    """Whether `a.b` is a module, or an attribute of a module, a class or an instance called like its class."""
    *_, owner, attribute = word.split(".")
    if any(path.with_suffix("").as_posix().endswith(f"/{word.replace('.', '/')}") for path in SOURCES):
        return True
    like = [owner, "".join(part.capitalize() for part in owner.split("_")), INSTANCES.get(owner, "")]
    return any(attribute in members().get(name, ()) for name in like) or _importable(word)


def is_file(word: str) -> bool:
    """Whether a file of the repository ends like this, or the package writes one that is called so."""
    name = word.rsplit("/", 1)[-1]
    return (
        any(ROOT.glob(f"{folder}**/{word}") for folder in ("", "mbcd_cli/"))
        if "*" in word
        else (
            any(path.as_posix().endswith(f"/{word}") for path in (*SOURCES, *OURS, *PAGES))
            or (ROOT / word).exists()
            or (ROOT / "mbcd_cli" / word).exists()
            or any(name in string for string in strings())
        )
    )


def flags() -> set[str]:
    """Of all commands and of the scripts of tests/benchmarks."""
    commands = get_command(app).commands.values()
    ours = {flag for c in commands for p in c.params for flag in (*p.opts, *p.secondary_opts)}
    scripts = [text for path, text in OURS.items() if path.parent.name == "benchmarks"]
    return ours | {flag for text in scripts for flag in re.findall(r"\"(--[a-z-]+)\"", text)} | OTHERS_FLAGS


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)


def test_pages_and_their_sections():
    wrong = []
    for path, text in {**PAGES, **SOURCES, **OURS}.items():
        for name, title in re.findall(r"\b([\w-]+\.md)\b(?:,? section ([\w\"' -]+))?", text):
            page = next((p for p in PAGES if p.name == name), None)
            if page is None and not is_file(name):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
            elif title and title.strip("\"' ") not in headings(page):
                wrong.append(f"{path.relative_to(ROOT)}: {name} section {title}")
        if path in PAGES:
            for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
                there = (path.parent / link).resolve() if link else path
                if there in PAGES and anchor not in map(slug, headings(there)):
                    wrong.append(f"{path.name}: {link}#{anchor}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_stands_in_ticks(path):
    wrong = []
    for word in in_ticks(path):
        if MADE_UP.fullmatch(word):
            good = True
        elif re.fullmatch(r"[\w/.*-]+\.(py|md|toml)", word):
            good = is_file(word)
        elif re.fullmatch(r"[A-Za-z_]+(\.\w+)*\.[A-Za-z_]\w*", word) or re.fullmatch(r"[a-z_.]+\.\*", word):
            good = is_setting(word) or is_file(word) or is_name(word)
        elif re.fullmatch(r"(tests|docs|presets|mbcd_cli)/\S*", word):
            good = is_file(word)
        elif match := re.fullmatch(r"([a-z_]+(?:\.\w+)+) ?= ?\S+", word):
            good = is_setting(match[1]) or match[1] in PLACEHOLDERS
        elif match := re.fullmatch(r"\.?([A-Za-z_.]+)\(.*\)", word):
            good = all(part in identifiers() for part in match[1].split(".")) or _importable(match[1])
        elif re.fullmatch(r"[A-Za-z_]+", word) and re.search(r"[a-z_][A-Z_][A-Za-z]", word):
            good = word in identifiers() or hasattr(builtins, word) or word in PLACEHOLDERS
        elif word.startswith("mbcd ") and word.split()[1].isalpha() and word.split()[1].islower():
            good = word.split()[1] in get_command(app).commands
        else:
            good = True
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", word):
            good = good and flag in flags()
        for setting in re.findall(r"--set '?([a-z]\w*\.[\w.]+)=", word):
            good = good and (is_setting(setting) or setting in PLACEHOLDERS)
        if not good:
            wrong.append(word)
    assert not wrong, f"{path.relative_to(ROOT)} refers to what is not there: {', '.join(wrong)}"
