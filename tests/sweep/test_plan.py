"""Plans hold exactly the paper's cells; keys tell settings apart and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
from sweep_cases import finish, plan_of

from mbcd_cli import resolved
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods import METHODS
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.names import settings_key
from mbcd_cli.sweep.estimate import checkpoint_bytes, estimate
from mbcd_cli.sweep.packing import kind, units, width_of
from mbcd_cli.sweep.plan import parse_grid, parse_modality_set, splits
from mbcd_cli.sweep.request import Request, output_of, parse_seeds, title_of

DOMAINS = {"epic-kitchens": ("D1", "D2", "D3"), "hac": ("human", "animal", "cartoon")}
V, A, F = "video", "audio", "flow"


def cells_as_sets(cells):
    return {
        (
            c.method,
            c.settings.model.modalities,
            c.settings.training.source_domains,
            c.settings.training.target_domain,
            c.settings.training.seed,
        )
        for c in cells
    }


@pytest.mark.parametrize("preset", DOMAINS)
def test_table_1_is_the_papers_multi_source_table(preset):
    cells = plan_of(preset, table=1)
    expected = {
        (method, modalities, tuple(d for d in DOMAINS[preset] if d != target), target, seed)
        for method in ("erm", "rna-net", "simmmdg", "moosa", "cmrf", "mbcd")
        for modalities in ((V, A), (V, F), (A, F), (V, A, F))
        for target in DOMAINS[preset]
        for seed in (0, 1, 2)
    }
    assert len(cells) == 216
    assert cells_as_sets(cells) == expected
    assert len({c.key for c in cells}) == len({c.folder for c in cells}) == 216


def test_table_2_is_every_ordered_pair_with_all_modalities():
    cells = plan_of("hac", table=2)
    pairs = {(c.settings.training.source_domains, c.settings.training.target_domain) for c in cells}
    assert pairs == {((a,), b) for a in DOMAINS["hac"] for b in DOMAINS["hac"] if a != b}
    assert len(cells) == 6 * 6 * 3
    assert {c.settings.model.modalities for c in cells} == {(V, A, F)}


def test_classes_of_one_name_in_two_files_are_no_seeds_of_one_row(tmp_path):
    files = [tmp_path / "one.py", tmp_path / "other.py"]
    for path in files:
        path.write_text("from mbcd_cli.methods.base import Method\nclass Mine(Method):\n    pass\n")
    mine, others = (f"{path}:Mine" for path in files)
    cells = plan_of("hac", methods=f"erm,{mine},{others}", targets="human", seeds="1")
    assert [cell.label() for cell in cells] == ["erm", mine, others]
    assert [cell.label() for cell in plan_of("hac", methods=mine, targets="human", seeds="1")] == ["Mine"]


def test_an_edited_method_is_trained_anew(tmp_path):
    path = tmp_path / "one.py"

    def key(code):
        path.write_text(f"from mbcd_cli.methods.base import Method\nclass Mine(Method):\n    {code}\n")
        (cell,) = plan_of("hac", methods=f"{path}:Mine", targets="human", seeds="1")
        assert cell.folder.name.endswith(cell.key)
        return cell.key

    assert key("views = 1") == key("views  = 1  # of a clip")
    assert key("views = 1") != key("views = 2")


def test_table_3_trains_and_tests_in_each_domain():
    cells = plan_of("epic-kitchens", table=3)
    assert len(cells) == 3 * 5 * 3
    assert {c.settings.training.target_domain for c in cells} == {None}
    assert {c.settings.training.source_domains for c in cells} == {("D1",), ("D2",), ("D3",)}


def switch(cell, part, field):
    """A switch of MBCD, or None where the cell's method has none."""
    return getattr(getattr(cell.settings.method, part, None), field, None)


def test_table_4_switches_one_part_on_at_a_time():
    cells = plan_of("epic-kitchens", table=4, seeds="1", targets="D1")
    switches = {
        c.method: (
            c.settings.average.kind == "ema",
            switch(c, "dropout", "strategy"),
            switch(c, "consistency", "order"),
            switch(c, "distillation", "enabled"),
        )
        for c in cells
    }
    assert switches == {
        "erm": (False, None, None, None),
        "ema": (True, None, None, None),
        "ema+amd": (True, "adaptive", "off", False),
        "ema+gcc": (True, "none", "first", False),
        "ema+dl": (True, "none", "off", True),
        "mbcd": (True, "adaptive", "first", True),
    }
    assert {c.settings.model.modalities for c in cells} == {(A, F)}
    assert len(plan_of("epic-kitchens", table=4)) == 6 * 3 * 3


def test_table_5_varies_the_dropout_only():
    cells = plan_of("hac", table=5, seeds="1", targets="human")
    strategies = {c.method: c.settings.method.dropout.strategy for c in cells}
    assert strategies == {"mbcd-no-dropout": "none", "mbcd-fixed-dropout": "fixed", "mbcd": "adaptive"}
    rest = [c.settings.method.model_dump(exclude={"dropout", "name"}) for c in cells]
    assert rest[0] == rest[1] == rest[2]
    assert {c.settings.method.dropout.rate for c in cells} == {0.5}
    assert len(plan_of("hac", table=5)) == 27


def test_tables_share_runs():
    first = {c.key for c in plan_of("epic-kitchens", table=1) if c.settings.model.modalities == (A, F)}
    ablation = {c.key: c.method for c in plan_of("epic-kitchens", table=4)}
    assert first >= {key for key, method in ablation.items() if method in ("erm", "mbcd")}


def test_a_grid_value_equal_to_the_default_is_the_same_run():
    plain = plan_of("hac", targets="human", methods="mbcd", seeds="1")
    grid = plan_of("hac", targets="human", methods="mbcd", seeds="1", grid=("average.beta=0.99,0.999",))
    assert [c.label() for c in grid] == ["mbcd, beta=0.99", "mbcd, beta=0.999"]
    assert grid[1].key == plain[0].key != grid[0].key
    assert grid[0].settings.average.beta == 0.99


def test_keys_follow_what_weights_depend_on():
    def key(*sets):
        return settings_key(resolve(preset="hac", sets=["model.modalities=video,audio", *sets]))

    same = key()
    for free in ("runtime.threads=3", "cache.dir=elsewhere", "evaluation.bins=7", "landscape.points=5"):
        assert key(free) == same, free
    assert key("modalities.flow.frames=4") == same, "a modality that is not used"
    for used in ("optimizer.lr=3e-4", "training.seed=1", "modalities.audio.samples=8000", "cache.views=2"):
        assert key(used) != same, used


def test_every_method_of_the_tool_makes_a_distinct_run():
    cells = plan_of("hac", targets="human", methods=",".join(METHODS), seeds="1")
    assert Counter(c.method for c in cells) == Counter(list(METHODS))


def test_grid_texts():
    assert parse_grid(["a.b=1,2", "c.d=x"]) == {"a.b": ("1", "2"), "c.d": ("x",)}
    assert parse_grid(['model.modalities=["video,audio", "audio"]']) == {"model.modalities": ("video,audio", "audio")}
    for bad in ("a.b", "a=1", "a.b=", "training.seed=1,2"):
        with pytest.raises(SettingsError):
            parse_grid([bad])
    with pytest.raises(SettingsError, match="twice"):
        parse_grid(["a.b=1", "a.b=2"])


def test_a_grid_over_modalities_replaces_their_sets():
    cells = plan_of(
        "digits-6",
        targets="noisy",
        methods="mbcd",
        seeds="1",
        grid=('model.modalities=["northwest,southeast", "northwest,northeast,southwest,southeast"]',),
    )
    assert [len(c.settings.model.modalities) for c in cells] == [2, 4]


def test_seeds_are_a_number_of_them_or_themselves():
    assert [parse_seeds(text) for text in ("3", "0,4,7", "7,", "7,7")] == [(0, 1, 2), (0, 4, 7), (7,), (7,)]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"table": 6}, "no such table"),
        ({"targets": "D9"}, "no domain 'D9'"),
        ({"targets": "D11"}, "Did you mean D1?"),
        ({"methods": "mbcd,mcbd"}, "no method 'mcbd'"),
        ({"modality_sets": "vx"}, "not a set of this dataset's modalities"),
        ({"seeds": "0"}, "no seeds"),
        ({"seeds": "a,b"}, "no seeds"),
        ({"protocol": "leave-one-out"}, "no protocol"),
        ({"seeds": "-1,2"}, "no seeds"),
        ({"methods": ","}, "names nothing"),
        ({"targets": ""}, "names nothing"),
        ({"modality_sets": " "}, "names nothing"),
        ({"grid": ("average.bta=1",)}, "no such setting"),
        ({"grid": ("average.beta=0.9,high",)}, "average.beta"),
        ({"grid": ("runtime.threads=1,2",)}, "no weight depends on runtime.threads"),
        ({"grid": ('model.modalities=["video,smell"]',)}, "not a set of this dataset's modalities"),
    ],
)
def test_wrong_requests_say_what_is_wrong(request_, words):
    with pytest.raises(SettingsError, match=words):
        plan_of("epic-kitchens", **request_)


def test_seeds_and_modality_sets_as_written():
    cells = plan_of("hac", targets="human", methods="erm", seeds="4,7", modality_sets="va,audio+flow")
    found = [(c.settings.model.modalities, c.settings.training.seed) for c in cells]
    assert found == [((V, A), 4), ((V, A), 7), ((A, F), 4), ((A, F), 7)]
    assert parse_modality_set("fv", (V, A, F)) == (V, F)
    assert parse_modality_set("m2+m1", ("m1", "m2")) == ("m1", "m2")


def test_one_domain_has_no_generalization():
    with pytest.raises(SettingsError, match="two domains"):
        splits("multi-source", ["a"], ["a"])
    assert splits("in-domain", ["a"], ["a"]) == [(("a",), None)]


def test_disk_is_what_the_checkpoints_hold_and_time_what_finished_runs_took(tmp_path):
    cells = plan_of("hac", runs=tmp_path, targets="human", methods="mbcd", seeds="3", modality_sets="vaf")
    # 55,043,872 trained parameters with all three modalities, of which C = 8 here 7; plus buffers.
    nbytes = checkpoint_bytes(cells[0])
    assert 4 * 55.0e6 * 6 < nbytes < 4 * 55.5e6 * 6
    # SimMMDG: no average; 83.4 million parameters of its own at the paper's features, with two moments, in one file.
    (own,) = plan_of("hac", runs=tmp_path, targets="human", methods="simmmdg", seeds="1", modality_sets="vaf")
    assert 4 * (55.0e6 * 4 + 83.4e6 * 3) < checkpoint_bytes(own) < 4 * (55.5e6 * 4 + 83.5e6 * 3)
    unknown = estimate(cells, measure=lambda cell: None)
    assert (unknown.cells, unknown.seconds, unknown.nbytes) == (3, None, 3 * nbytes)
    tried = estimate(cells, measure=lambda cell: 7.0)
    assert tried.seconds == 21.0
    finish(cells[0], top1=0.5)  # 100 steps at 10 per second
    known = estimate(cells, measure=lambda cell: pytest.fail("a finished run tells"))
    assert (known.cells, known.seconds) == (2, 20.0)


def test_cells_on_their_methods_published_chassis_are_told_apart():
    asked = {"targets": "human", "methods": "erm,cmrf", "seeds": "1", "modality_sets": "va"}
    shared = plan_of("hac", **asked)
    theirs = plan_of("hac", flags={"training.chassis": "published"}, **asked)
    assert [cell.label() for cell in theirs] == ["erm-published", "cmrf-published"]
    assert [cell.settings.training.epochs for cell in theirs] == [20, 15]
    assert not {cell.key for cell in theirs} & {cell.key for cell in shared}
    assert title_of(Request(table=1), theirs).endswith("generalization, published chassis")
    assert output_of(Request(table=1), theirs).name == "hac-table-1-published"
    axis = "training.chassis=shared,published"
    both = plan_of("hac", grid=(axis,), **asked)
    assert {cell.key for cell in both} == {cell.key for cell in (*shared, *theirs)}
    assert [cell.label() for cell in both][1::2] == ["cmrf, chassis=shared", "cmrf, chassis=published"]
    assert "published" not in title_of(Request(grid=(axis,)), both[2:])
    with pytest.raises(SettingsError, match="no published chassis of method sam"):
        plan_of("hac", flags={"training.chassis": "published"}, targets="human", methods="erm,sam")


def test_what_trains_together_depends_on_the_plan_alone(monkeypatch):
    cells = plan_of("digits-4", methods="erm,mbcd", targets="all", seeds="4")
    together = units(cells, width=None, jobs=2)
    assert {len(share) for share in together.values()} == {6}
    for share in together.values():
        assert len({cell.method for cell in share}) == 1
        assert all(together[cell.key] is share for cell in share)
    assert {len(share) for share in units(cells, width=0, jobs=2).values()} == {1}
    convolutions = plan_of("hac", methods="erm", targets="all", seeds="4", modality_sets="va")
    assert {len(share) for share in units(convolutions, width=None, jobs=2).values()} == {1}
    assert {len(share) for share in units(convolutions, width=4, jobs=2).values()} == {6}
    monkeypatch.setattr("mbcd_cli.sweep.packing.SHARE", 4)
    assert {len(share) for share in units(cells, width=None, jobs=2).values()} == {4, 2}
    other = plan_of("digits-4", methods="erm", targets="all", seeds="2", grid=["training.epochs=1,2"])
    assert {len(share) for share in units(other, width=None, jobs=1).values()} == {4, 2}
    numbers = plan_of("digits-4", methods="erm", targets="all", seeds="2", grid=["optimizer.lr=1e-3,2e-3"])
    assert {len(share) for share in units(numbers, width=None, jobs=1).values()} == {4}
    assert len({kind(cell.settings) for cell in numbers}) == 1
    zero = plan_of("digits-4", methods="erm", targets="all", seeds="2", grid=["model.dropout=0,0.5"])
    assert len({kind(cell.settings) for cell in zero}) == 2


def test_how_many_train_together_is_auto_off_or_a_number():
    assert [width_of(text) for text in ("auto", "off", "1", "32")] == [None, 0, 0, 32]
    for text in ("0", "-3", "many", "1.5"):
        with pytest.raises(SettingsError, match="neither auto, off nor a number"):
            width_of(text)


def test_a_plan_reads_its_preset_and_the_environment_once(monkeypatch):
    read = []
    for name in ("load_preset", "environment_layer"):
        real = getattr(resolved, name)
        monkeypatch.setattr(resolved, name, lambda *what, real=real, name=name: read.append(name) or real(*what))
    assert len(plan_of("hac", targets="human", methods="erm", seeds="6")) == 6
    assert sorted(read) == ["environment_layer", "load_preset"]
