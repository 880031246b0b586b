"""Every command with whatever flags, paths, values and environments: as documented, one message, in time.

Under `-m stress` DRAWS=500 draws 500 examples instead of 10,000; --hypothesis-seed=1 others.
"""

from __future__ import annotations

import inspect
import os
import socket
import typing
from importlib import import_module
from pathlib import Path

import helpers
import pytest
from commands import CUTS, DRAWS, tried
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.models import ArgumentInfo

from mbcd_cli import story
from mbcd_cli.cli.app import _Commands
from mbcd_cli.errors import RunError

WORDS = [
    *("", "x", "none", "all", "tiny", "alpha", "gamma", "video", "video,audio", "video,video", ",", "erm", "mbdc"),
    *("av-digits", "demo", "manifst", "../x", "/", "-1", "0", "5%", "200%", "a" * 3000, "\x1b[31m", "🐈", "\udcff"),
    *(
        "va",
        "presets",
        "0,1",
        "nan",
        "video+audio",
        "in-domain",
        "cuda:99",
        "mps",
        "csv,hdf5",
        "[bold]x[/bold]",
        "[/x]",
    ),
]
NUMBERS = ["0", "-1", "1", "3", "1e308", "nan", "inf", "9" * 30, "9" * 5000, "0.5", "x", "", "2147483648", "1_0", "٣"]
SETS = [
    *("training.epochs=0", "cache.workers=-1", "landscape.analyses=[]", "model.hidden=1", "training.batch_size=1"),
    *("evaluation.analyses=[]", "a.b=1", "x", "=", "modalities.video.frames=0", "cache.dtype=int8", "method.name=5"),
    *("optimizer.lr=nan", "optimizer.lr=1e300", "runtime.threads=99999", "dataset.name=..", "evaluation.top_k=999"),
    *("landscape.radii=[1e30]", "landscape.max_clips=1", "dataset.min_frames=99999", "dataset.max_bad=100%"),
    *(f'{path}="a\\u0000b"' for path in ("dataset.root", "cache.dir", "cache.weights_dir", "dataset.reader.manifest")),
]
ENVIRONMENTS = [
    *({"RANK": "x"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "7"}, {"MASTER_ADDR": "nowhere"}, {"OMP_NUM_THREADS": "x"}),
    *({"MBCD_TRAINING__EPOCHS": "x"}, {"MBCD_TRAINING": "5"}, {"MBCD_X": "1"}, {"MBCD_CACHE__DIR": "/dev/null"}),
    *({"HOME": ""}, {"HOME": "/nowhere"}, {"TMPDIR": "/nowhere"}, {"LC_ALL": "C"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}),
]
FOREIGN = [
    *(
        "/dev/full",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/proc/1",
        "/sys/x",
        "/etc/passwd",
        "",
        "-",
        "~nobody/x",
    ),
    *(
        "x" * 5000,
        "a/" * 3000,
        "a\0b",
        "\udcff/x",
        "http://127.0.0.1:9/x",
        "a\nb",
        "*",
        "[",
        "[a-",
        "{",
        "//etc//passwd",
    ),
]
OURS = [
    "",
    "cache",
    "cache/tiny",
    "run",
    "run/checkpoints/best.pt",
    "tiny",
    "tiny/manifest.csv",
    "landscape",
    "run/done",
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> list[str]:
    """Paths of all that is no file or folder as it should be."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "empty").mkdir()
    (folder / "nothing").write_bytes(b"")
    (folder / "text").write_text("hello\n")
    (folder / "bytes.pt").write_bytes(b"PK\3\4" + bytes(range(256)))
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe.toml")
    (folder / "deep.toml").write_text("a=" + "[" * 5000)
    (folder / "bad.toml").write_bytes(b"\xff[training\n")
    (folder / "other.toml").write_text("training=5\nmodalities=[1]\n")
    (folder / "fine.toml").write_text("[training]\nepochs=1\n")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    inside = [f"{name}/x" for name in ("missing", "text", "dangling", "loop", "c" * 255)]
    return FOREIGN + [
        str(folder / name)
        for name in sorted([*(path.name for path in folder.iterdir()), *inside, "missing", "d" * 300])
    ]


def flags_of(name: str) -> list[tuple[bool, object, list[str], bool]]:
    """(whether it is an argument, type, names, whether it is needed) of all that a command takes, but --debug."""
    found = []
    module = name.replace("-", "_")
    command = getattr(import_module(f"mbcd_cli.cli.{module}"), module)
    for one in inspect.signature(command.callback).parameters.values():
        kind, declared = typing.get_args(one.annotation)[:2]
        names = [text for text in (declared.default, *(declared.param_decls or ())) if isinstance(text, str)]
        argument = isinstance(declared, ArgumentInfo)
        if "--debug" not in names:
            split = [] if argument else [name for text in names for name in text.split("/")]
            found.append((argument, kind, split, one.default is inspect.Parameter.empty))
    return found


def drawn(draw, home: Path, odd: list[str]) -> list[str]:
    """A command line, most of it wrong."""
    name = draw(st.sampled_from(_Commands.names))
    paths = st.sampled_from([*odd, *(str(home / one) for one in OURS)])
    words, numbers = st.sampled_from(WORDS), st.sampled_from(NUMBERS)

    def value(kind: object, names: list[str]) -> str:
        text = str(kind)
        if "--set" in names:
            return draw(st.sampled_from(SETS))
        if "Path" in text or "--runs" in names:
            return draw(paths)
        return draw(numbers if "int" in text or "float" in text else words)

    line = [name]
    for argument, kind, names, needed in flags_of(name):
        if not argument and draw(st.integers(0, 9)) > (6 if needed else 1):
            continue
        if argument:
            readers = ["manifest", "manifest", "epic-kitchens", "hac"]
            known = {"prepare": readers, "audit": readers, "list": ["presets", "datasets"]}
            line.append(draw(st.sampled_from([*known.get(name, ()), value(kind, names)])))
        elif "bool" in str(kind):
            line.append(draw(st.sampled_from(names)))
        else:
            line += [draw(st.sampled_from(names)), value(kind, names)]
    if draw(st.booleans()):  # the rest is right
        line += rest(name, home)
    return line + {"sweep": ["--dry-run"], "demo": ["--epochs", "0"]}.get(name, [])


def rest(name: str, home: Path) -> list[str]:
    small = [word for one in (*helpers.SMALL, *CUTS, "training.max_steps=1") for word in ("--set", one)]
    cache = ["--cache-dir", str(home / "cache")]
    quick = ["--set", "landscape.points=3", "--set", "landscape.analyses=['curve']"]
    return {
        "audit": ["--root", str(home / "tiny"), *cache, *small],
        "prepare": ["--root", str(home / "tiny"), *small],
        "train": ["--dataset", "tiny", "--target-domain", "gamma", *cache, *small],
        "sweep": ["--dataset", "tiny", "--targets", "gamma", *cache, *small],
        "adapt": [str(home / "run"), *cache, "--set", "adapt.batch_size=2"],
        "average": [str(home / "run"), *cache, "--window", "1..1"],
        "evaluate": ["--run", str(home / "run"), *cache, "--set", "evaluation.analyses=[]"],
        "landscape": ["--checkpoint", str(home / "run/checkpoints/best.pt"), *cache, *quick],
    }.get(name, [])


@pytest.mark.parametrize(
    "effort",
    [
        settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)),
        pytest.param(
            settings(max_examples=DRAWS, deadline=None, suppress_health_check=list(HealthCheck)),
            marks=[pytest.mark.stress, pytest.mark.timeout(0)],
        ),
    ],
    ids=["few", "many"],
)
def test_any_command_line(home, kept, odd, tmp_path, monkeypatch, effort):
    def stop(*_: object, **__: object) -> None:
        raise RunError("The demo would begin.")

    monkeypatch.setattr(story.prepare, "prepare", stop)
    monkeypatch.chdir(tmp_path)

    @effort
    @given(data=st.data())
    def one(data):
        try:
            line = drawn(data.draw, home, odd)
            tried(line, data.draw(st.sampled_from([{}, {}, *ENVIRONMENTS])))
        finally:
            for snapshot in kept.values():
                snapshot.restore()

    one()


@pytest.fixture
def nobody(home, tmp_path, monkeypatch):
    """This process may read nothing of `home`."""
    rights = home.stat().st_mode
    home.chmod(0)
    if os.geteuid() == 0:
        monkeypatch.setenv("HOME", str(tmp_path))
        os.seteuid(65534)
    yield
    if os.getuid() == 0:
        os.seteuid(0)
    home.chmod(rights)


def test_what_may_not_be_read_is_said(home, nobody):
    """Folders and files without rights, for every command that reads some."""
    best, cache = str(home / "run/checkpoints/best.pt"), str(home / "cache")
    for line in (
        ["prepare", "manifest", "--root", str(home / "tiny")],
        ["train", "--dataset", "tiny", "--cache-dir", cache],
        ["train", "--config", str(home / "run/settings.toml")],
        ["evaluate", "--run", str(home / "run")],
        ["adapt", str(home / "run")],
        ["average", str(home / "run"), "--window", "1..1"],
        ["evaluate", "--checkpoint", best],
        ["evaluate", "--runs", str(home / "run")],
        ["landscape", "--checkpoint", best],
        ["landscape", "--checkpoint", best, "--plot-only", "--output", str(home / "landscape")],
        ["sweep", "--dataset", "tiny", "--cache-dir", cache, "--dry-run"],
        ["verify", str(home / "run")],
        ["repair", cache],
        ["list", "datasets", "--cache-dir", cache],
        ["demo", "--dir", str(home / "demo")],
    ):
        result = tried(line)
        assert result.exit_code == 1, (line, result.stderr)
        assert str(home) in result.stderr
