"""The demo dataset: eight verbs in three places, rendered to real mp4 and wav files and read like any other dataset.

A clip shows an object moving, and sounds, as its verb does. Places (domains) differ in background, lighting and room
sound. As in real kitchens, each place also has its habits: the same verb goes with other objects in each, so that an
object's colour, shape and mat tell the verb inside a place and mislead outside it. `shortcut` is the strength of that
habit. A clip's motion and sound always tell its verb; its look does so only with its place.

Nothing but the content tells the label: ids are hashes, rows are shuffled, all files of one kind have the same number
of frames, samples and bytes.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import soundfile

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing, generated, manifest
from mbcd_cli.data.readers.demo_content import (
    DOMAINS,
    FPS,
    SAMPLE_RATE,
    SIDE,
    VERBS,
    Look,
    optical_flow,
    record,
    render,
)
from mbcd_cli.errors import ManifestError
from mbcd_cli.settings import DatasetSettings, Fraction, ReaderSettings

GENERATOR, VERSION = "mbcd demo", 1
"""Name and version of what is generated; a folder of another version is refused."""
ROOT = Path("mbcd-demo")
"""Where the dataset is generated when no root is set."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What fixes the dataset's content (for one version of the generator and of the codecs).

    Attributes:
        seed: of everything random.
        clips_per_class_train, clips_per_class_test: clips of each verb in each domain.
        shortcut: probability, 0 to 1, that a clip's object looks as its domain's habit has it for the verb; otherwise
            the look is drawn at random.
    """

    seed: int = 0
    clips_per_class_train: int = 24
    clips_per_class_test: int = 6
    shortcut: float = 0.85


@dataclass(frozen=True, slots=True)
class _Plan:
    """One clip to be made: its row of the manifest, and the look of its object."""

    number: int
    id: str
    domain: str
    split: str
    label: int
    look: Look


def _plans(parameters: Parameters) -> list[_Plan]:
    """Every clip of the dataset in the manifest's (shuffled) order."""
    rng = np.random.default_rng([parameters.seed, 0])
    verbs = len(VERBS)
    habits = np.stack([rng.permutation(verbs) for _ in range(3)])
    plans = []
    for d, domain in enumerate(DOMAINS):
        for split, count in (("train", parameters.clips_per_class_train), ("test", parameters.clips_per_class_test)):
            for label in range(verbs):
                for _ in range(count):
                    # Shifts that differ between domains: no look stands for the same verb in two of them.
                    look = (habits[:, label] + d * np.array([1, 3, 2])) % verbs
                    if rng.random() >= parameters.shortcut:
                        look = rng.integers(0, verbs, 3)
                    number = len(plans)
                    name = hashlib.blake2b(f"{parameters.seed}/{number}".encode(), digest_size=6).hexdigest()
                    plans.append(_Plan(number, name, domain, split, label, Look(*map(int, look))))
    return [plans[i] for i in rng.permutation(len(plans))]


# --- files -----------------------------------------------------------------------------------------------------


def _write_video(path: Path, frames: np.ndarray) -> None:
    """Write uint8 RGB frames [T, H, W, 3] as MPEG-4."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FPS, (SIDE, SIDE))
    if not writer.isOpened():
        raise ManifestError(
            f"{path}: OpenCV cannot write MPEG-4 video here.",
            "Check that the folder is writable, and that opencv-python-headless is installed from a wheel.",
        )
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()


def _files(clip: str) -> dict[str, str]:
    """File names of one clip, by what they hold."""
    return {
        "video": f"{clip}.mp4",
        "audio": f"{clip}.wav",
        "flow": f"{clip}_flow_x.mp4",
        "flow_y": f"{clip}_flow_y.mp4",
    }


def _make(job: tuple[Path, int, _Plan]) -> None:
    """Write the four files of one clip; they depend on the seed and the clip's number alone."""
    root, seed, plan = job
    folder = root / plan.domain
    files = _files(plan.id)
    verb = VERBS[plan.label]
    frames = render(verb, plan.domain, plan.look, np.random.default_rng([seed, 1, plan.number]))
    _write_video(folder / files["video"], frames)
    flow = optical_flow(frames)
    for k, name in enumerate(("flow", "flow_y")):
        _write_video(folder / files[name], np.repeat(flow[..., k, None], 3, axis=3))
    sound = record(verb, plan.domain, np.random.default_rng([seed, 2, plan.number]))
    soundfile.write(folder / files["audio"], sound, SAMPLE_RATE, subtype="PCM_16")


def _even_sizes(paths: list[Path]) -> None:
    """Pad mp4 files to one size by a `free` box at the end, so that the size tells nothing of the content."""
    # The box's header takes 8 bytes: every file gets a box, also the largest.
    size = max(path.stat().st_size for path in paths) + 8
    for path in paths:
        room = size - path.stat().st_size
        with path.open("ab") as file:
            file.write(room.to_bytes(4, "big") + b"free" + bytes(room - 8))


def _write_all(root: Path, parameters: Parameters, workers: int) -> None:
    """Write the whole dataset into the empty folder `root`."""
    for domain in DOMAINS:
        (root / domain).mkdir()
    plans = _plans(parameters)
    jobs = [(root, parameters.seed, plan) for plan in plans]
    # Threads, since OpenCV and NumPy let go of the interpreter, and a fresh process takes seconds to import torch.
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for _ in pool.map(_make, jobs):
            pass
    for kind in ("video", "flow", "flow_y"):
        _even_sizes([root / plan.domain / _files(plan.id)[kind] for plan in plans])
    rows = []
    for plan in plans:
        files = [f"{plan.domain}/{_files(plan.id)[kind]}" for kind in ("video", "audio", "flow")]
        rows.append([plan.id, plan.domain, plan.split, plan.label, VERBS[plan.label], *files])
    generated.write_manifest(root, ("video", "audio", "flow"), rows)


def _marker(parameters: Parameters) -> dict:
    return {"generator": GENERATOR, "version": VERSION, "parameters": asdict(parameters)}


def generate_demo(
    root: Path,
    *,
    seed: int = 0,
    clips_per_class_train: int = 24,
    clips_per_class_test: int = 6,
    shortcut: float = 0.85,
    workers: int = 2,
) -> None:
    """Generate the dataset into `root`; the same arguments give the same bytes on one machine, whatever `workers` is.

    It is written aside and renamed when complete, `generated.json` (version and parameters) being written last: a
    killed generation leaves `root` as it was, and the next one begins again. When `root` already holds this very
    dataset nothing is done.

    Args:
        root: folder to make; it may exist when empty.
        seed, clips_per_class_train, clips_per_class_test, shortcut: see `Parameters`.
        workers: threads that render.

    Raises:
        ManifestError: `root` holds something else, or cannot be written.
        ValueError: counts below 1, or a shortcut outside 0..1.
    """
    parameters = Parameters(seed, clips_per_class_train, clips_per_class_test, shortcut)
    if min(clips_per_class_train, clips_per_class_test) < 1 or not 0 <= shortcut <= 1:
        raise ValueError("at least one clip per class and split, and a shortcut from 0 to 1, are needed")
    generated.generate(root, _marker(parameters), lambda folder: _write_all(folder, parameters, workers))


class DemoSettings(ReaderSettings):
    """The demo's media are made."""

    shortcut: Fraction | None = None
    """Probability that a clip's look follows its place's habit, which misleads elsewhere; default: 0.85."""


def read(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
    """The demo dataset's clips, generated first when `dataset.root` (default: mbcd-demo) does not hold them.

    A complete generation of this version is used whatever its parameters, so that `generate_demo` may make another one;
    but a `dataset.reader.shortcut` that is set must be the one it was made with.

    Raises:
        ManifestError: the folder holds something else, or cannot be written.
    """
    root = dataset.root or ROOT
    marker = generated.marker_of(root) or {}
    shortcut = dataset.reader.shortcut
    wanted = {} if shortcut is None else {"shortcut": shortcut}
    if (marker.get("generator"), marker.get("version")) != (GENERATOR, VERSION):
        generate_demo(root, **wanted, workers=min(2, os.cpu_count() or 1))
    elif shortcut is not None and marker["parameters"].get("shortcut") != shortcut:
        raise ManifestError(
            f"{root} holds a demo dataset of shortcut {marker['parameters'].get('shortcut')}, not {shortcut}.",
            "Generate this one elsewhere: --root DIR, with --name NAME for its cache.",
        )
    return manifest.read(dataset.model_copy(update={"root": root}), modalities)
