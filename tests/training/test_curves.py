"""Pictures of a run: terms of the loss are drawn as such, other figures in their own panels."""

from __future__ import annotations

from matplotlib.text import Text

from mbcd_cli import plotting
from mbcd_cli.files import append_record
from mbcd_cli.methods.base import Panel, Shown
from mbcd_cli.training.curves import plot_run

PANEL = Panel("gates", "Gates", {"p": Shown("$p_k$", "probability")})


def test_only_terms_are_losses_and_only_labels_are_formulas(tmp_path, monkeypatch):
    for step in (10, 20):
        rows = {name: {"ce": 2.0 + step, "s": 0.5, "p": 0.25, "accuracy": 0.75} for name in ("a$b$", "c")}
        scalars = {"step": step, "epoch": 0, "steps": 10, "total": 3.0, "ce_fused": 1.0, "own": 0.5, "sharpness": -1.0}
        append_record(tmp_path / "steps.jsonl", {**scalars, "accuracy_fused": 0.5, "modalities": rows})
    saved = {}
    save = plotting.save

    def kept(fig, path, **how):
        saved[path.name] = fig
        return save(fig, path, **how)

    monkeypatch.setattr(plotting, "save", kept)
    drawn = plot_run(tmp_path, [PANEL], ("ce_fused", "own", "ce"))
    assert [path.name for path in drawn] == ["losses.png", "gates.png"] == [p.name for p in drawn if p.is_file()]
    (axes,) = saved["losses.png"].axes
    assert [line.get_label() for line in axes.lines] == ["total", "ce fused", "own", "ce a$b$", "ce c"]
    told = {text.get_text(): text.get_parse_math() for fig in saved.values() for text in fig.findobj(Text)}
    assert told[r"a\$b\$: $p_k$"]
    assert not told["ce a$b$"]
