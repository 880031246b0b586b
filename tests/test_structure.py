"""The house's rules that a machine can check: imports go downward, docs are what the code prints."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mbcd_cli"
# Higher may import lower, and its own room; rooms of one height do not know each other.
HEIGHT = {
    "__main__": 12,
    "cli": 11,
    "story": 10,
    "sweep": 9,
    "training": 8,
    "evaluation": 8,
    "landscape": 8,
    "paper": 7,
    "preparation": 7,
    "runs": 7,
    "scoring": 7,
    "layers": 6,
    "methods": 5,
    "model": 4,
    "encoders": 3,
    "data": 2,
    "runtime": 2,
    "plotting": 2,
    "plugins": 1,
    "settings": 1,
    "processes": 1,
    "files": 1,
    "randomness": 0,
    "errors": 0,
    "allocator": 0,
    "console": 0,
    "__init__": 0,
}
CONSOLE_USERS = {"cli", "story", "sweep", "training", "evaluation", "landscape", "preparation", "runs"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mbcd_cli":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("mbcd_cli."))


def test_imports_go_downward_only():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room(path)
        for there in imports(path):
            if there in ("__version__", here):
                continue
            if there == "console":
                if here not in CONSOLE_USERS:
                    wrong.append(f"{path.relative_to(ROOT)} imports console")
            elif HEIGHT[there] >= HEIGHT[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {there}")
    assert not wrong, "\n".join(wrong)


def _generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "settings.md"])
def test_generated_docs_are_current(page, monkeypatch):
    for name in ("TERMINAL_WIDTH", "COLUMNS", "NO_COLOR", "TERM"):
        monkeypatch.setenv(name, "")  # restored afterwards: the generator sets them
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == _generator().PAGES[page]().rstrip("\n") + "\n", "run `uv run python docs/generate.py`"


def test_documents_link_to_files_that_exist():
    import re

    missing = []
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                missing.append(f"{page.name} -> {link}")
    assert not missing, "\n".join(missing)
