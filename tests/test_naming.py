"""What can serve as a name."""

from __future__ import annotations

import pytest
from helpers import write_array, write_manifest

from mbcd_cli.errors import ManifestError, SettingsError
from mbcd_cli.naming import did_you_mean, modality_faults, name_faults
from mbcd_cli.preparation.cache_plan import read_listing
from mbcd_cli.resolved import resolve


@pytest.mark.parametrize("name", ["../x", "/abs", "a/b", "a\nb", "-x", ".x", "", " ", "a ", "n" * 201, "\x1b[31m"])
def test_names_that_lead_out_of_their_folder_or_cannot_be_shown(name):
    assert name_faults("domain", name)
    with pytest.raises(SettingsError, match=r"dataset\.name"):
        resolve(flags={"dataset.name": name})


def test_usual_names_are_fine():
    for name in ("dark room", "P01_clip1", "日本", "a.b", "n" * 200):
        assert not name_faults("domain", name)
    assert did_you_mean("STREAT", ["street", "fog"]) == "Did you mean street? "
    assert did_you_mean("zzz", ["street"]) == ""


@pytest.mark.parametrize("name", ["../x", "Fused", "label", "1x", "m" * 65])
def test_modalities_are_not_called_as_something_else(name):
    assert modality_faults(name)
    with pytest.raises(SettingsError, match=r"model\.modalities"):
        resolve(flags={"model.modalities": name})


@pytest.mark.parametrize("name", ["type", "values", "fused"])
def test_prepare_refuses_what_train_could_not_use(tmp_path, name):
    write_array(tmp_path / "a.npy", [1.0, 2.0])
    rows = [{"id": s, "domain": "d", "split": s, "label": 0, name: "a.npy"} for s in ("train", "test")]
    write_manifest(tmp_path / "manifest.csv", rows)
    with pytest.raises(ManifestError, match=f"{name}.*choose another"):
        read_listing(resolve(flags={"dataset.root": tmp_path}))
