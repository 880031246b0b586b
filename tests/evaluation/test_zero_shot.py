"""`mbcd zero-shot`: logits against the owners' own, prompts, rows of tables, sealed targets, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import helpers
import owners
import pytest
import test_epic_kitchens as epic
import torch
from commands import run
from torch.nn.functional import normalize

from mbcd_cli.data.dataset import CachedDataset, open_dataset
from mbcd_cli.data.readers import epic_kitchens
from mbcd_cli.encoders.formats import import_optional
from mbcd_cli.encoders.transformers_families import import_transformers
from mbcd_cli.errors import MbcdError
from mbcd_cli.evaluation.zero_shot import Prompts, TextHead, narrated, read_prompts, text_head, zero_shot_model
from mbcd_cli.files import read_json, read_records
from mbcd_cli.integrity import examine
from mbcd_cli.ledger import looks
from mbcd_cli.resolved import resolve
from mbcd_cli.scoring.predictions import predict
from mbcd_cli.settings import Settings

pytest.importorskip("transformers")
CPU = torch.device("cpu")
PROMPTS = """
templates = ["a video of {}", "a photo of {}"]
[prompts]
class0 = ["something dark", "the very dark"]
class1 = "something bright"
"""
FAMILIES = {"clip": "video", "siglip": "video", "clap": "audio"}
FRAMES = {"clip": 3, "siglip": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Media of three domains; folders of models with tokenizers; caches of each, cut before and after the model."""
    import_transformers()
    import_optional("torchvision", "timm")
    place = tmp_path_factory.mktemp("zero-shot")
    helpers.write_dataset(place / "tiny", domains=("alpha", "beta", "gamma"), test=2)
    (place / "prompts.toml").write_text(PROMPTS)
    for name in FAMILIES:
        owners.OWNERS[name](place / "weights" / name)
        owners.save_tokenizer(place / "weights" / name)
        for cut in ("input", "adapter"):
            prepare(place, name, cut)
    return place


def words(place: Path, name: str, cut: str = "adapter") -> list[object]:
    kind = FAMILIES[name]
    sets = [f"modalities.{kind}.encoder=hf:{name}", f"modalities.{kind}.cut={cut}", "cache.views=1"]
    sets += ["cache.dtype=float32", "dataset.min_frames=1", f"cache.weights_dir={place / 'weights'}"]
    sets += [f"modalities.{kind}.frames={FRAMES[name]}"] if name in FRAMES else []
    common = ["--modalities", kind, "--cache-dir", place / f"{name}-{cut}"]
    return [*common, *(word for one in sets for word in ("--set", one))]


def prepare(place: Path, name: str, cut: str) -> None:
    given = ("--root", place / "tiny", "--name", "tiny", *words(place, name, cut), "--workers", 0)
    run("prepare", "manifest", *given)


def opened(place: Path, name: str, cut: str = "adapter") -> tuple[Settings, CachedDataset]:
    flags = {"dataset.name": "tiny", "cache.dir": place / f"{name}-{cut}", "cache.weights_dir": place / "weights"}
    settings = resolve(flags=flags)
    return settings, open_dataset(settings, name="tiny")


def theirs(place: Path, name: str, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The owner's own: logits of N test views by P texts [N, P], scaled unit vectors of views, those of texts."""
    import transformers as t

    folder = place / "weights" / name
    model, tokenizer = t.AutoModel.from_pretrained(folder).eval(), t.AutoTokenizer.from_pretrained(folder)
    shape = {"padding": "max_length", "max_length": 12} if name == "siglip" else {"padding": True}
    tokens = tokenizer(texts, return_tensors="pt", **shape)
    tokens.pop("token_type_ids", None)
    _, dataset = opened(place, name, "input")
    (batch,) = dataset.batches(dataset.select(domains=dataset.domains, splits=["test"]), batch_size=99, training=False)
    ((view,),) = batch.inputs.values()
    with torch.no_grad():
        if name == "clap":
            extractor = t.AutoFeatureExtractor.from_pretrained(folder)
            waves = [wave[0].numpy() for wave in view]
            inputs = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt")
            out = model(**inputs, **tokens)
            return out.logits_per_audio, out.audio_embeds * model.logit_scale_a.exp(), out.text_embeds
        frames = [frame.permute(1, 2, 0).numpy() for clip in view for frame in clip.transpose(0, 1)]
        processor = t.AutoImageProcessor.from_pretrained(folder)
        pixels = processor(frames, do_resize=False, do_center_crop=False, return_tensors="pt")
        out = model(**pixels, **tokens)
        embeds = model.get_image_features(**pixels).pooler_output.unflatten(0, (len(view), -1)).mean(1)
        return out.logits_per_image, normalize(embeds) * model.logit_scale.exp(), out.text_embeds


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_owners(place, name):
    settings, dataset = opened(place, name)
    clips = dataset.select(domains=dataset.domains, splits=["test"])
    ours = {}
    for over in ("max", "mean"):
        prompts = read_prompts(place / "prompts.toml", over=over)
        model = zero_shot_model(settings, dataset, prompts, device=CPU)
        told = predict(model, dataset.batches(clips, batch_size=5, training=False), device=CPU)
        assert torch.equal(told.fused, told.unimodal[FAMILIES[name]])
        ours[over] = told.fused
    said = [prompts.of_class(label) for label in dataset.label_names]
    assert [len(of_class) for of_class in said] == [4, 2]
    logits, views, texts = theirs(place, name, [text for of_class in said for text in of_class])
    own = logits if FRAMES.get(name, 1) == 1 else views @ texts.T  # the owner knows images, not clips
    nearest = torch.stack([of_class.amax(1) for of_class in own.split([4, 2], dim=1)], 1)
    means = torch.stack([of_class.mean(0) for of_class in texts.split([4, 2])])
    for found, expected in ((ours["max"], nearest), (ours["mean"], views @ normalize(means).T)):
        if name == "siglip":  # it adds one number to all logits
            found, expected = found - found[:, :1], expected - expected[:, :1]
        assert torch.allclose(found, expected, rtol=0, atol=1e-4)
        assert torch.equal(found.argmax(1), expected.argmax(1))
    assert not torch.allclose(ours["max"], ours["mean"], atol=1e-2)


@pytest.mark.parametrize("over", ["max", "mean"])
def test_head_against_plain_float64(over):
    generator = torch.Generator().manual_seed(1)
    texts = [normalize(torch.randn(n, 5, generator=generator).double()) for n in (3, 1, 2)]
    features, projection = torch.randn(4, 7, generator=generator).double(), torch.nn.Linear(7, 5).double()
    head = TextHead(texts, projection=projection, scale=2.5, over=over)
    for row, logits in zip(projection(features).tolist(), head(features).tolist(), strict=True):
        unit = [x / sum(y * y for y in row) ** 0.5 for x in row]
        for of_class, logit in zip(texts, logits, strict=True):
            vectors = of_class.tolist()
            if over == "mean":
                mean = [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]
                vectors = [[x / sum(y * y for y in mean) ** 0.5 for x in mean]]
            assert logit == pytest.approx(2.5 * max(sum(map(float.__mul__, unit, v)) for v in vectors), abs=1e-12)


def rows(place: Path, name: str, out: Path, *more: object, code: int = 0):
    given = ("--dataset", "tiny", *words(place, name), "--runs-dir", out / "runs", "--json", *more)
    return run("zero-shot", *given, code=code)


def test_rows_stand_below_the_trained_ones(place, tmp_path):
    card = place / "weights/clip/README.md"
    done = rows(place, "clip", tmp_path, "--prompts", place / "prompts.toml").data
    assert not card.exists()
    folders = [Path(folder) for folder in done["runs"]]
    assert [read_json(folder / "results.json")["target_domain"] for folder in folders] == ["alpha", "beta", "gamma"]
    shown = {tuple(row[:2]): row[3]["value"] for row in done["tables"][0]["rows"]}
    first = read_json(folders[0] / "results.json")
    figures = first["models"]["pretrained"]["zero-shot"]
    assert figures["target"]["fused"]["clips"] == 4
    assert figures["source"]["fused"]["clips"] == 8
    assert shown["zero-shot clip (video, max)", "alpha"] == 100 * figures["target"]["fused"]["top1"]
    assert first["provenance"]["video pretraining"] == "unknown"
    assert examine(tmp_path).faults == []
    before = {folder: (folder / "results.json").read_bytes() for folder in folders}
    again = rows(place, "clip", tmp_path, "--prompts", place / "prompts.toml").data
    assert {folder: (folder / "results.json").read_bytes() for folder in map(Path, again["runs"])} == before
    told = ["--set", "modalities.video.pretraining=Some pairs"]
    rows(place, "clip", tmp_path, "--prompts", place / "prompts.toml", "--over", "mean", *told)
    quick = ("--set", "model.hidden=4", "--epochs", 1, "--batch-size", 4)
    train = (
        "train",
        "--dataset",
        "tiny",
        "--target-domain",
        "beta",
        "--method",
        "probe",
        *words(place, "clip"),
        *quick,
    )
    run(*train, "--run", tmp_path / "runs/tiny/probe")
    run("evaluate", "--run", tmp_path / "runs/tiny/probe", "--set", "evaluation.analyses=[]")
    compared = run("evaluate", "--runs", f"{tmp_path}/runs/tiny/*", "--output", tmp_path / "c", "--json").data
    (table,) = [table for table in compared["tables"] if table["name"] == "tiny-video-multi-source"]
    assert table["columns"] == ["method", "beta", "average", "pretraining"]
    cells = {row[0]: row[1:] for row in table["rows"]}
    assert list(cells) == ["probe", "zero-shot clip (video, max)", "zero-shot clip (video, mean)"]
    assert cells["zero-shot clip (video, max)"][0]["value"] == shown["zero-shot clip (video, max)", "beta"]
    assert [row[-1] for row in cells.values()] == ["unknown", "unknown", "Some pairs"]
    assert not any(cell["best"] for row in table["rows"][1:] for cell in row[1:-1])
    assert "nothing was trained on the sources" in table["note"]
    assert "Some pairs" in (tmp_path / "c/tiny-video-multi-source.csv").read_text()
    assert "Some pairs" in (tmp_path / "c/comparison.html").read_text()
    others = [one for one in compared["tables"] if one is not table]
    assert len(others) == 3
    assert "zero-shot" not in json.dumps(others)
    adapted = run("adapt", tmp_path / "runs/tiny", "--rule", "read", "--output", tmp_path / "a", code=0)
    assert "zero-shot" not in adapted.stdout
    for command in ("adapt", "evaluate"):
        word = [folders[0]] if command == "adapt" else ["--run", folders[0]]
        assert "is a zero-shot row" in run(command, *word, code=1).stderr
    assert "is a zero-shot row" in run("average", folders[0], "--swad", code=1).stderr
    assert "probe has kept no averages" in run("average", tmp_path / "runs/tiny", "--swad", code=1).stderr
    single = rows(place, "clip", tmp_path, "--prompts", place / "prompts.toml", "--source-domains", "alpha").data
    assert not {*single["runs"]} & {*done["runs"]}  # of another setting: other folders
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1


def test_a_sealed_target_waits_for_reveal(place, tmp_path, monkeypatch):
    init = CachedDataset.__init__
    sealed = ("--prompts", place / "prompts.toml", "--target-domain", "beta", "--set", "dataset.seal_target=true")
    kept: dict[str, bytes] = {}
    for how in ("as they are", "others"):

        def with_others(dataset, *what, how=how, **more):
            init(dataset, *what, **more)
            if how == "others":
                dataset.clips.labels[dataset.clips.domains == dataset.domains.index("beta")] = 10**6

        monkeypatch.setattr(CachedDataset, "__init__", with_others)
        done = rows(place, "clip", tmp_path / how, *sealed).data
        (folder,) = map(Path, done["runs"])
        assert done["tables"][0]["rows"][0][1] == "without beta"
        found = {file.name: file.read_bytes() for file in folder.iterdir()}
        kept = kept or found
        assert found == kept
    monkeypatch.setattr(CachedDataset, "__init__", init)
    assert "target" not in read_json(folder / "results.json")["models"]["pretrained"]["zero-shot"]
    compared = run("evaluate", "--runs", folder, "--output", tmp_path / "c")
    assert "targets are sealed" in compared.stdout
    ((record,),) = [read_records(folder / "sealed.jsonl")]
    told = run("reveal", folder, "--json").data["runs"][0]
    (opened_row,) = rows(place, "clip", tmp_path / "open", *sealed[:-2]).data["runs"]
    theirs = read_json(Path(opened_row) / "results.json")
    assert told["top1"] == theirs["headline"]["top1"]["fused"]
    assert read_json(folder / "results.json")["models"] == theirs["models"]
    assert len(record["zero-shot"]["fused"]) == theirs["models"]["pretrained"]["zero-shot"]["target"]["fused"]["clips"]
    (look,) = looks(folder.parent)
    assert list(look.runs[0].checkpoints) == ["sealed.jsonl"]
    assert "is sealed. All 1 that were are open" in run("reveal", folder, code=1).stderr
    rows(place, "clip", tmp_path / "others", *sealed)  # made again, it stays open
    assert read_json(folder / "results.json")["headline"]["clips"] == "target"
    assert examine(folder.parent).faults == []


TOML = {
    "a class is missing": ("[prompts]\nclass0 = 'a'", "says nothing of class1"),
    "an unknown class": (PROMPTS + "clas2 = 'a'", "speaks of clas2, of which the dataset has none"),
    "no prompts": ("[prompts]\nclass0 = []\nclass1 = ' '", "nothing is said of class0, class1"),
    "nothing": ("", "prompts: Field required"),
    "wrong type": ("prompts = 3", "prompts: Input should be a valid dictionary"),
    "wrong types": ("[prompts]\nclass0 = 3\nclass1 = 'a'", "prompts.class0: Input should be a valid tuple"),
    "unknown key": ("templats = ['{}']\n[prompts]\nclass0 = 'a'", "templats: Extra inputs are not permitted"),
    "no place": ("templates = ['a video']\n[prompts]\nclass0 = 'a'", "no {} in 'a video'"),
    "place in a text": ("[prompts]\nclass0 = 'a {}'\nclass1 = 'b'", "{} in a text of class0"),
    "no such way": ("over = 'sum'\n[prompts]\nclass0 = 'a'", "over: Input should be 'max' or 'mean'"),
    "no TOML": ("prompts", "is not valid TOML"),
    "too long": (f"[prompts]\nclass0 = '{'very ' * 11}'\nclass1 = 'a'", "takes 12 tokens, and the prompt 'very very"),
}


@pytest.mark.parametrize("what", TOML)
def test_bad_prompts_are_one_clear_message(place, tmp_path, what):
    text, message = TOML[what]
    (file := tmp_path / "p.toml").write_text(text)
    told = rows(place, "clip", tmp_path, "--prompts", file, code=1).stderr
    assert message in told
    assert str(place / "weights/clip" if what == "too long" else file) in told
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("*.json"))


def drop(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def config(**changes: object):
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def other_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"dark": 10', '"dark": 60'))


FOLDERS = {
    "no tokenizer": (drop("tokenizer.json", "tokenizer_config.json"), "has no tokenizer."),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
    "another tokenizer": (other_tokens, "knows tokens that its model of 50 does not"),
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "there is no config.json"),
    "other weights": (lambda folder: change_weights(folder, lambda state: state), "is not what video of tiny was prep"),
    "no text weights": (
        lambda folder: change_weights(folder, lambda state: {k: v for k, v in state.items() if "text" not in k}),
        "there is no whole text tower",
    ),
}


def change_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    state = {key: value + 0 for key, value in change(load_file(folder / "model.safetensors")).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt", "made": "again"})


@pytest.mark.parametrize("what", FOLDERS)
def test_a_spoilt_folder_is_one_clear_message(place, tmp_path, what):
    spoil, message = FOLDERS[what]
    shutil.copytree(place / "weights/clip", tmp_path / "weights/clip")
    spoil(tmp_path / "weights/clip")
    more = ("--weights-dir", tmp_path / "weights", "--prompts", place / "prompts.toml")
    told = rows(place, "clip", tmp_path, *more, code=1).stderr
    assert message in told
    assert str(tmp_path / "weights/clip") in told


def test_encoders_without_a_text_tower_are_refused(place, tmp_path):
    import transformers as t

    model = t.CLIPModel.from_pretrained(place / "weights/clip").vision_model
    shutil.copytree(place / "weights/clip", tmp_path / "weights/vision")
    model.save_pretrained(tmp_path / "weights/vision")
    sets = ["cache.workers=0", "cache.views=1", "dataset.min_frames=1", "modalities.video.frames=1"]
    common = ["--cache-dir", tmp_path / "cache", "--weights-dir", tmp_path / "weights", "--modalities", "video"]
    base = [*common, *(word for one in sets for word in ("--set", one))]
    for encoder, cut, message in (
        ("hf:vision", "adapter", "has no text tower"),
        ("small-video", "input", "small-video has no text tower"),
    ):
        more = ["--set", f"modalities.video.encoder={encoder}", "--set", f"modalities.video.cut={cut}"]
        run("prepare", "manifest", "--root", place / "tiny", "--name", "tiny", *base, *more)
        words_ = ("--dataset", "tiny", "--prompts", place / "prompts.toml", *base, *more)
        assert message in run("zero-shot", *words_, code=1).stderr
    flags = {"dataset.name": "tiny", "cache.dir": place / "clip-adapter", "cache.weights_dir": place / "weights"}
    dataset = open_dataset(resolve(flags=flags), name="tiny")
    dataset.modalities["video"] = dataset.modalities["video"].model_copy(update={"frame_pooling": "max"})
    with pytest.raises(MbcdError, match="frame_pooling is max"):
        text_head(resolve(flags=flags), dataset, "video", read_prompts(place / "prompts.toml"), device=CPU)
    (tmp_path / "file").write_text("")
    given = ("--prompts", place / "prompts.toml")
    assert "Not a directory" in rows(place, "clip", tmp_path, *given, "--runs-dir", tmp_path / "file", code=1).stderr
    every = ("--source-domains", "alpha,beta,gamma")
    assert "there is no target" in rows(place, "clip", tmp_path, *given, *every, code=1).stderr
    assert "no such way" in rows(place, "clip", tmp_path, "--prompts", "x", "--over", "sum", code=2).stderr
    assert "has no narrations" in rows(place, "clip", tmp_path, "--prompts", "narrations", code=1).stderr
    assert "does not exist" in rows(place, "clip", tmp_path, "--prompts", tmp_path / "none.toml", code=1).stderr


def test_modalities_without_a_text_tower_have_no_row(place, tmp_path):
    shutil.copytree(place / "weights/clip", tmp_path / "weights/clip")
    owners.OWNERS["wav2vec2"](tmp_path / "weights/speech")
    (tmp_path / "c.toml").write_text(
        'dataset = {name = "tiny", min_frames = 1}\ncache = {views = 1, workers = 0}\n'
        '[modalities]\nvideo = {encoder = "hf:clip", cut = "adapter", frames = 1}\n'
        'audio = {encoder = "hf:speech", cut = "adapter"}\n'
    )
    folders = ("--cache-dir", tmp_path / "cache", "--weights-dir", tmp_path / "weights")
    common = (*folders, "--preset", "none", "--config", tmp_path / "c.toml")
    run("prepare", "manifest", "--root", place / "tiny", "--modalities", "video,audio", *common)
    words_ = (*common, "--prompts", place / "prompts.toml", "--runs-dir", tmp_path / "runs", "--json")
    assert {row[0] for row in run("zero-shot", *words_).data["tables"][0]["rows"]} == {"zero-shot clip (video, max)"}


def test_narrations_are_the_sources_alone(tmp_path, monkeypatch):
    entries = {split: list(table) for split, table in epic.table_rows().items()}
    for (domain, split), table in entries.items():
        table[:] = [
            {**table[0], "uid": verb, "verb_class": verb, "narration": f"{name} in {domain} {split}{twice}"}
            for verb, name in enumerate(epic_kitchens.VERBS)
            for twice in ("", " ", " again")
        ]
    epic.write_tables(tmp_path, entries)
    (tmp_path / "D1_train.csv").rename(tmp_path / "away")
    (tmp_path / "D1_test.csv").unlink()
    read: list[str] = []
    read_table = epic_kitchens.read_table
    monkeypatch.setattr(epic_kitchens, "read_table", lambda path: (read.append(path.name), read_table(path))[1])

    def prompts(*sources: str) -> Prompts:
        layer = {"dataset.root": tmp_path, "dataset.reader": "epic-kitchens", "training.source_domains": sources}
        return narrated(resolve(flags=layer), over="mean")

    found = prompts("D2", "D3")
    assert read == ["D2_train.csv", "D3_train.csv"]
    assert found.of_class("wash") == [f"wash in {d} train{again}" for d in ("D2", "D3") for again in ("", " again")]
    assert (list(found.prompts), found.source) == (list(epic_kitchens.VERBS), "narrations")
    with pytest.raises(MbcdError, match=r"there is no D1_train\.csv"):
        prompts("D1", "D2")
    epic.write_tables(
        tmp_path, {("D2", "train"): entries["D2", "train"][3:], ("D3", "train"): entries["D3", "test"][3:]}
    )
    with pytest.raises(MbcdError, match="have no narration of take"):
        prompts("D2", "D3")
    bare = "uid,verb_class\n1,0\n"
    (tmp_path / "D2_train.csv").write_text(bare)
    with pytest.raises(MbcdError, match=r"D2_train\.csv: it lacks the columns narration"):
        prompts("D2")


@pytest.mark.skipif(not epic.REAL.is_dir(), reason="the MM-SADA split tables are not beside the clone")
def test_narrations_of_the_real_tables():
    layer = {"dataset.root": epic.REAL, "dataset.reader": "epic-kitchens", "training.source_domains": ("D2", "D3")}
    found = narrated(resolve(flags=layer), over="max")
    assert [len(texts) for texts in found.prompts.values()] == [395, 531, 70, 64, 228, 61, 37, 79]
