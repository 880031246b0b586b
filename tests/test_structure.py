"""The house's rules that a machine can check: imports go downward, docs are what the code prints."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from mbcd_cli.cli.app import _Commands
from mbcd_cli.settings import FLAGS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mbcd_cli"
# From the bottom; a room imports what stands on lower lines, and itself. Rooms of one line do not know each other.
FLOORS = (
    "__init__ errors say allocator randomness checksums naming json_values",
    "files place settings plugins",
    "locks processes promises",
    "ledger layers",
    "runtime plotting data integrity launch",
    "encoders",
    "model",
    "methods",
    "resolved",
    "audit",
    "preparation runs scoring paper",
    "training evaluation landscape",
    "averaging",
    "sweep",
    "story examination",
    "console",
    "cli",
    "__main__",
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path):
    """Rooms that a file imports, or names in a string (a module to be run or loaded later)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mbcd_cli":
            yield from {(*node.module.split("."), alias.name)[1] for alias in node.names}
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("mbcd_cli."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^mbcd_cli\.(\w+)[\w.]*(?::\w+)?$", node.value)


def test_imports_go_downward_only():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room(path)
        for there in imports(path):
            if there not in ("__version__", here) and HEIGHT[there] >= HEIGHT[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {there}")
    assert not wrong, "\n".join(wrong)


def users_word(path: Path) -> bool:
    """Whether a file is called by a word of the user's: a command, a kind of modality, a reader."""
    return path.relative_to(PACKAGE).parent.as_posix() in ("cli", "data/modalities", "data/readers")


def test_no_name_is_used_twice():
    """Natural to repeat: what is called by a user's word, with the command in it; `read`, which every reader has."""
    named = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        if path.stem not in ("__init__", "__main__") and not users_word(path):
            named[f"{path.stem}.py"].append(where)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                natural = users_word(path) and node.name in (path.stem, "read")
                named[node.name] += [] if natural else [where]
            for name in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ():
                # A type's name: one more letter than a type variable's, and no constant's capitals.
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store) and re.match("[A-Z].*[a-z]", name.id):
                    named[name.id].append(where)
    twice = {name: places for name, places in named.items() if len(places) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(places)}" for name, places in twice.items())


def test_a_flag_is_declared_once():
    """Shared ones in the table of settings' flags or in cli/options.py."""
    declared = [word for words in FLAGS.values() for word in re.split("[ /]", words)]
    for path in sorted((PACKAGE / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option":
                declared += [word.value for word in node.args if isinstance(word, ast.Constant)]
    assert [flag for flag, count in Counter(declared).items() if flag.startswith("--") and count > 1] == []


def prints(path: Path) -> bool:
    """Whether a file prints, or imports what shows things on a terminal."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    shows = any(str(name).split(".")[0] in ("rich", "typer") or name == "mbcd_cli.console" for name in modules)
    shows |= any(re.fullmatch(r"print|traceback\.print_\w+|sys\.std(out|err)\.write\w*", name) for name in called)
    return shows or "console" in imports(path)


def test_only_the_command_line_prints():
    assert {room(path) for path in PACKAGE.rglob("*.py") if prints(path)} == {"cli", "console"}


def test_files_of_tests_can_be_read_at_once():
    lines = {path.name: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {name: count for name, count in lines.items() if count >= 500} == {}


def test_help_is_quick():
    """Neither the version nor the help of any command imports what computes."""
    heavy = "sorted({'torch', 'numpy', 'h5py', 'matplotlib', 'scipy', 'sklearn', 'cv2'} & set(sys.modules))"
    code = (
        "import sys; from typer.testing import CliRunner; from mbcd_cli.cli import app\n"
        "for words in (['--version'], ['--help'], *([name, '--help'] for name in sys.argv[1:])):\n"
        f"    assert CliRunner().invoke(app, words).exit_code == 0, words\n    assert not {heavy}, (words, {heavy})"
    )
    done = subprocess.run([sys.executable, "-c", code, *_Commands.names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_design_shows_every_room():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([a-z_]+)(?:/|\.py)`", "\n".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE))))
    there = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert told == there, f"missing: {there - told}, gone: {told - there}"


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
    missing = []
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                missing.append(f"{page.name} -> {link}")
    assert not missing, "\n".join(missing)
