"""Single terms and statistics against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import MemoryDataset, memory_settings
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import binom
from small import KINDS_ALL, LentAverage, make_step, small_batch, small_model, tail

from mbcd_cli.methods import modality_dropout as amd
from mbcd_cli.methods.base import Context, Method
from mbcd_cli.methods.feature_noise import FeatureNoise, FeatureNoiseSettings
from mbcd_cli.methods.mbcd import MBCD
from mbcd_cli.methods.modality_dropout import DropoutSettings
from mbcd_cli.methods.parts import cross_entropy, distillation, teacher_probabilities
from mbcd_cli.model import MultiModalModel
from mbcd_cli.randomness import Randomness
from mbcd_cli.settings import AverageSettings, ModelSettings
from mbcd_cli.training.average import Average


def logits(seed, rows=6, classes=5):
    return 3 * np.random.default_rng(seed).normal(size=(rows, classes))


def test_distillation_is_kl_from_teacher_to_student():
    teacher, student = logits(0), logits(1)
    expected = rel_entr(softmax(teacher, axis=1), softmax(student, axis=1)).sum(axis=1).mean()
    reverse = rel_entr(softmax(student, axis=1), softmax(teacher, axis=1)).sum(axis=1).mean()
    have = distillation(teacher_probabilities(torch.tensor(teacher)), torch.tensor(student)).item()
    assert have == pytest.approx(expected, abs=1e-12)
    assert abs(expected - reverse) > 0.01


def test_distillation_stays_finite_for_a_certain_teacher():
    teacher = teacher_probabilities(torch.tensor([[2000.0, 0.0, 0.0]]))
    assert teacher.min() == torch.tensor(1e-12)
    assert torch.isfinite(distillation(teacher, torch.zeros(1, 3)))


def test_cross_entropy():
    z, y = logits(2), np.array([0, 1, 2, 3, 4, 0])
    expected = -log_softmax(z, axis=1)[np.arange(6), y].mean()
    assert cross_entropy(torch.tensor(z), torch.tensor(y)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_adaptive_probabilities(count):
    tables = [torch.tensor(logits(k) * (1 + k)) for k in range(count)]
    s = amd.scores(tables, torch.zeros(6, dtype=torch.int64), score="confidence").numpy()
    assert s == pytest.approx([softmax(t.numpy(), axis=1).max(axis=1).sum() for t in tables], abs=1e-12)
    r = np.array([np.mean([s[k] / s[j] for j in range(count) if j != k]) for k in range(count)])
    assert amd.ratios(torch.tensor(s)).numpy() == pytest.approx(r, abs=1e-12)
    p = amd.drop_probabilities(torch.tensor(r), DropoutSettings()).numpy()
    assert p == pytest.approx(np.tanh(np.maximum(r - 1, 0)), abs=1e-12)
    assert p.max() > 0
    assert p.min() == 0


def test_mask_drops_clips_independently_at_the_given_rates():
    p, rows = torch.tensor([0.0, 0.2, 0.7, 1.0]), 20000
    keep = amd.keep_mask(p, rows, Randomness(seed=1))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    dropped = rows - keep.sum(dim=0).numpy()
    for k, probability in enumerate(p.tolist()):
        low, high = binom.interval(1 - 1e-6, rows, probability)
        assert low <= dropped[k] <= high
    both = ((keep[:, 1] == 0) & (keep[:, 2] == 0)).sum().item()
    low, high = binom.interval(1 - 1e-6, rows, 0.2 * 0.7)
    assert low <= both <= high


@pytest.mark.parametrize("strategy", ["none", "fixed", "adaptive"])
def test_a_single_modality_is_never_dropped(strategy):
    settings = DropoutSettings(strategy=strategy, rate=1.0)
    assert amd.ratios(torch.tensor([3.0])).item() == 1
    assert amd.drop_probabilities(torch.tensor([1.0]), settings).item() == 0


def test_dropped_modalities_are_zeroed_without_rescaling():
    model, batch = small_model(3, KINDS_ALL), small_batch(3, KINDS_ALL)
    features = model.features(batch.inputs)
    keep = torch.ones(7, 3, dtype=torch.float64)
    keep[2, 1] = 0
    columns = [features[n].clone() for n in model.modalities]
    columns[1][2] = 0
    expected = model.fused_head(torch.cat(columns, dim=1))
    torch.testing.assert_close(model.fuse(features, keep), expected, rtol=0, atol=0)


def test_the_chassis_may_have_no_norm_linear_heads_and_dropout_on_some_features():
    def built(**settings):
        torch.manual_seed(0)
        tails = {name: tail("vector") for name in ("video", "audio")}
        return MultiModalModel(tails, settings=ModelSettings(hidden=6, **settings), classes=3).double()

    batch = small_batch(2, ("vector", "vector"))
    plain = built(norm="none", unimodal_head="linear")
    pooled = plain.pooled(batch.inputs)
    assert all(torch.equal(h, pooled[name]) for name, h in plain.normalised(pooled).items())
    assert [tuple(head.weight.shape) for head in plain.heads.values()] == [(3, 4), (3, 4)]
    dropped = built(feature_dropout=0.5, feature_dropout_on=("audio",))
    assert dropped.state_dict().keys() == built().state_dict().keys()
    for mode in (True, False):
        dropped.train(mode)
        values = dropped.pooled(batch.inputs)
        assert torch.equal(dropped.pooled(batch.inputs)["video"], values["video"])
        assert torch.equal(dropped.pooled(batch.inputs)["audio"], values["audio"]) != mode
    with pytest.raises(ValueError, match="flow is not among the modalities"):
        ModelSettings(modalities=("video", "audio"), feature_dropout=0.5, feature_dropout_on=("flow",))


def test_noise_gives_the_statistics_that_it_should():
    """Over many draws each clip's channel mean has mean mu and deviation S(mu); unapplied calls change nothing."""
    x = torch.randn(4, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * torch.arange(1, 4)[None, :, None] + torch.arange(4)[:, None, None]
    always = FeatureNoise(settings=FeatureNoiseSettings(probability=1), randomness=Randomness(seed=0))
    means = torch.stack([always((x,))[0].mean(dim=2) for _ in range(4000)])
    mu = x.mean(dim=2)
    spread = mu.std(dim=0).expand(4, 3)
    torch.testing.assert_close(means.std(dim=0), spread, rtol=0.06, atol=0)
    assert ((means.mean(dim=0) - mu).abs() < 5 * spread / 4000**0.5).all()
    never = FeatureNoise(settings=FeatureNoiseSettings(probability=0), randomness=Randomness(seed=0))
    assert torch.equal(never((x,))[0], x)
    half = FeatureNoise(settings=FeatureNoiseSettings(), randomness=Randomness(seed=0))
    changed = sum(not torch.equal(half((x,))[0], x) for _ in range(400))
    low, high = binom.interval(1 - 1e-6, 400, 0.5)
    assert low <= changed <= high


def test_both_paths_share_the_draw_that_decides():
    noise = FeatureNoise(settings=FeatureNoiseSettings(), randomness=Randomness(seed=0))
    slow, fast = torch.randn(4, 3, 9), torch.randn(4, 2, 5, 2)
    seen = set()
    for _ in range(40):
        a, b = noise((slow, fast))
        seen.add((torch.equal(a, slow), torch.equal(b, fast)))
    assert seen == {(True, True), (False, False)}


def test_half_precision_parts_keep_their_type():
    noise = FeatureNoise(settings=FeatureNoiseSettings(probability=1), randomness=Randomness(seed=0))
    assert noise((torch.randn(4, 3, 9).bfloat16(),))[0].dtype == torch.bfloat16


def test_teacher_follows_weights_and_statistics_but_not_heads():
    student = small_model(2, KINDS_ALL)
    start = {k: v.clone() for k, v in student.state_dict().items()}
    teacher = Average(student, AverageSettings(kind="ema", beta=0.75))
    with torch.no_grad():
        for value in student.state_dict().values():
            value += 1
    teacher.update(torch.tensor(1))
    for key, value in teacher.model.state_dict().items():
        if key.startswith("heads."):
            assert torch.equal(value, start[key])
        elif value.is_floating_point():
            torch.testing.assert_close(value, start[key] + 0.25, rtol=0, atol=1e-12)
        else:
            assert torch.equal(value, start[key] + 1)
    for key, value in teacher.model_for_evaluation().heads.state_dict().items():
        assert torch.equal(value, student.heads.state_dict()[key])
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_method_distils_from_whatever_average_it_is_lent():
    student, teacher = small_model(2, KINDS_ALL, seed=3), small_model(2, KINDS_ALL, seed=4).eval()
    context = Context.of(student, randomness=Randomness(seed=1), average=LentAverage(teacher), precision="float32")
    settings = {"dropout": {"strategy": "none"}, "consistency": {"order": "off"}, "feature_noise": {"enabled": False}}
    batch = small_batch(2, KINDS_ALL)
    figures = MBCD(MBCD.Settings.model_validate(settings), context).gradients(batch)
    with torch.no_grad():
        target = teacher_probabilities(teacher.fuse(teacher.features(batch.inputs)))
        expected = distillation(target, student.fuse(student.features(batch.inputs)))
    torch.testing.assert_close(figures["kl_fused"], expected, rtol=0, atol=1e-12)


def averaged(settings, values):
    """Value of a weight's average after each of `values`."""
    student = small_model(1, KINDS_ALL)
    weight = next(student.tails.parameters())
    average = Average(student, settings)
    mine = next(average.model.tails.parameters())
    trace = []
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            weight.fill_(value)
        average.update(torch.tensor(step))
        trace.append(mine.flatten()[0].item())
    return trace


def test_a_simple_average_is_a_copy_until_it_starts_and_the_mean_from_then_on():
    values = [3.0, 5.0, 1.0, 4.0, 8.0]
    have = averaged(AverageSettings(kind="sma", start=2), values)
    assert have == pytest.approx([3, 5, np.mean([5, 1]), np.mean([5, 1, 4]), np.mean([5, 1, 4, 8])], abs=1e-6)


def test_an_exponential_average_may_start_later():
    have = averaged(AverageSettings(kind="ema", beta=0.75, start=2), [3.0, 5.0, 1.0, 9.0])
    assert have == pytest.approx([3, 5, 4, 5.25], abs=1e-6)


def test_bfloat16_keeps_weights_in_float32_and_learns():
    dataset, settings = MemoryDataset(), memory_settings()
    from mbcd_cli.training.assemble import assemble

    settings = settings.model_copy(update={"runtime": settings.runtime.model_copy(update={"precision": "bfloat16"})})
    step = assemble(settings, dataset, device=torch.device("cpu")).step
    batch = next(dataset.batches(dataset.select(domains=("a",)), batch_size=16, training=True))
    losses = [step(batch)[0].item() for _ in range(40)]  # the total comes first
    assert losses[-1] < 0.7 * losses[0]
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}


def test_encoders_get_no_unimodal_gradient_when_heads_only_probe():
    def gradients(unimodal_labels_matter):
        model, batch = small_model(2, KINDS_ALL), small_batch(2, KINDS_ALL)
        if unimodal_labels_matter:
            with torch.no_grad():
                for head in model.heads.values():
                    head[3].bias[0] += 5
        make_step(model, Method, average=None)(batch)
        return [p.grad for p in model.tails.parameters()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)
