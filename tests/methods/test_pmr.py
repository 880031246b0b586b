"""PMR against its plainly written step and pinned numbers; its prototypes from batches written down here."""

from __future__ import annotations

import pytest
import torch
from memory import MemoryEpoch
from plain import LABELS, compare, make, pinned_features, pinned_logits, small_batch
from reference_pmr import PMRReference, class_means

from mbcd_cli.methods.modality_dropout import scores
from mbcd_cli.methods.parts import cross_entropy
from mbcd_cli.methods.pmr import is_slower, similarity


def clips_of(modalities):
    """Four batches of seeds 10, 11, ..."""
    return MemoryEpoch(lambda ahead: [small_batch(10 + number, modalities) for number in range(4)])


def begun(modalities):
    return lambda step: step.method.before_epoch(clips_of(modalities))


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    more = {"modalities": modalities, "sources": sources, "average": {"kind": "sma"}}
    _, plain = compare(PMRReference, "pmr", {"alpha": 1.3}, begin=begun(modalities), **more)
    assert plain.slower == modalities - 1


@pytest.mark.parametrize("epoch", [2, 3])
def test_until_its_last_epoch_on_another_chassis(epoch):
    compare(PMRReference, "pmr", {"stop": 3}, modalities=3, norm="none", epoch=epoch, begin=begun(3))


def features(step, batches):
    """h_k of every clip, and labels, in the order of the batches."""
    model = step.model.eval()
    with torch.no_grad():
        pairs = [(model.features(batch.inputs), batch.labels) for batch in batches]
    return {n: torch.cat([h[n] for h, _ in pairs]) for n in model.modalities}, torch.cat([y for _, y in pairs])


@pytest.mark.parametrize(("share", "read"), [(0.5, 2), (0.0, 1), (1.0, 4)])
def test_prototypes_are_class_means_of_the_first_batches_mixed_with_those_before(share, read):
    training, _ = make("pmr", {"share": share, "memory": 0.3}, modalities=2)
    step, clips = training.step, clips_of(2)
    method, kept = step.method, {}
    seen = []
    for batch in clips.training():
        seen.append(batch)
        if len(seen) >= share * 4 and len(torch.cat([b.labels for b in seen]).unique()) == 3:
            break
    assert len(seen) == read
    for epoch in range(2):
        step.context.epoch.fill_(epoch)
        with torch.no_grad():
            for parameter in step.model.parameters():
                parameter += 0.1 * epoch
        method.before_epoch(clips_of(2))
        h, labels = features(step, seen)
        for name, rows in h.items():
            expected = class_means(rows, labels, 3)
            expected = expected if not epoch else 0.7 * expected + 0.3 * kept[name]
            kept[name] = expected
            torch.testing.assert_close(method.get_buffer(f"prototypes_{name}"), expected, rtol=0, atol=1e-12)


def test_a_class_that_has_no_clip_is_far_and_keeps_no_prototype():
    training, _ = make("pmr", modalities=2)
    method, batch = training.step.method, small_batch(10)
    batch.labels.clamp_(max=1)

    method.before_epoch(MemoryEpoch(lambda ahead: [batch]))
    assert method.seen.tolist() == [True, True, False]
    vector = training.step(batch)
    assert torch.isfinite(vector).all()


def test_pinned_numbers():
    def similar(k):
        h = pinned_features(k)
        return similarity(h, class_means(h, LABELS, 3))

    s = scores([similar(0), similar(1)], LABELS, score="true_class")
    ce = [cross_entropy(similar(k), LABELS) for k in range(3)]
    fused = cross_entropy(pinned_logits(3), LABELS)

    def loss(*chosen):
        slow = is_slower(scores([similar(k) for k in chosen], LABELS, score="true_class"))
        return fused + 2 * sum(ce[k] for k, one in zip(chosen, slow, strict=True) if one)

    found = torch.stack([s[0] / s[1], ce[0], ce[1], loss(0, 1), loss(0, 2)])
    expected = [1.048525240249, 1.022085826318, 0.917841444115, 3.614866839942, 3.711570580880]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)
