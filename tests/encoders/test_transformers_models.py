"""`hf:FOLDER`: tiny models of every family, ours against their owners'."""

from __future__ import annotations

from pathlib import Path

import owners
import pytest
import torch

pytest.importorskip("transformers")

from mbcd_cli.data.modalities import KINDS
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders import build_encoder, described_encoders, format_of
from mbcd_cli.encoders.staged import StagedEncoder
from mbcd_cli.settings import Settings

SOUND = ("ast", "wav2vec2", "hubert", "clap", "clap, fused")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, owners.Owner]]:
    owners.import_torchvision()
    made = {}
    for name, make in owners.OWNERS.items():
        folder = tmp_path_factory.mktemp("hf") / name.replace(", ", "-")
        made[name] = (folder, make(folder))
    return made


def described(folder: Path, kind: str, **more: object) -> Modality:
    if kind == "audio" and "clap" not in folder.name:
        more = {"samples": 8000, **more}
    modality = KINDS[kind](encoder=f"hf:{folder}", cut="pool", **more)
    return described_encoders(Settings(modalities={"m": modality})).modalities["m"]


def loaded(modality: Modality) -> StagedEncoder:
    encoder = build_encoder("m", modality)
    format_of(modality).load(encoder, modality, Path())
    return encoder.eval()


@pytest.mark.parametrize("name", owners.OWNERS)
def test_equals_its_owner_and_every_cut_is_the_whole(folders, name):
    folder, owner = folders[name]
    kind = "audio" if name in SOUND else "video"
    modality = described(folder, kind)
    view = owners.views(kind, modality)
    encoder = loaded(modality)
    with torch.no_grad():
        ours, theirs = encoder((view,)), owner(view)
        assert ours.shape == theirs.shape == (2, encoder.dim)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        for cut in encoder.names:
            trunk, tail = encoder.cut(cut)
            (part,) = trunk((view,))
            assert part.shape[:2] == view.shape[:2] if cut in ("input", "patch") else part.is_contiguous()
            assert torch.equal(tail.eval()((part,)), ours), cut
