"""What every encoder must do, as checks that any can be put through.

Letters: B clips, C channels, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.records import Parts
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.staged import StagedEncoder

CLIPS = 3


@dataclass(frozen=True, slots=True)
class EncoderSubject:
    """An encoder to be checked, by the settings of the modality that it reads."""

    modality: Modality

    def encoder(self, *, seed: int = 0, **changed: object) -> StagedEncoder:
        """With first weights of a seed, in eval mode."""
        torch.manual_seed(seed)
        return build_encoder("NAME", self.modality.model_copy(update=changed)).eval()

    def views(self, clips: int = CLIPS) -> Parts:
        """Parts [B, ...] as decoding gives them: bytes, or numbers around 0."""
        generator = torch.Generator().manual_seed(1)
        parts = []
        for shape, dtype in self.modality.part_shapes(test=True):
            if dtype.kind == "f":
                parts.append(torch.randn(clips, *shape, generator=generator))
            else:
                whole = torch.randint(0, 200, (clips, *shape), generator=generator)
                parts.append(whole.to(getattr(torch, dtype.name)))
        return tuple(parts)


def check_stages(subject: EncoderSubject) -> None:
    """Its first stage is `input`, without parameters, and one is `pool`."""
    encoder = subject.encoder(cut="input")
    assert encoder.names[0] == "input", f"its first stage is {encoder.names[0]}"
    assert "pool" in encoder.names, f"none of its stages is pool: {', '.join(encoder.names)}"
    assert not [*encoder.stages["input"].parameters()], (
        "the stage input has parameters: a cut after it would freeze them"
    )


@torch.no_grad()
def check_features(subject: EncoderSubject) -> None:
    """Decoded views become finite float32 features [B, D]."""
    encoder = subject.encoder()
    features = encoder(subject.views())
    assert features.shape == (CLIPS, encoder.dim), f"features are {[*features.shape]}, not {[CLIPS, encoder.dim]}"
    assert features.dtype == torch.float32, f"features are {features.dtype}"
    assert torch.isfinite(features).all(), "features are not finite"


@torch.no_grad()
def check_cut(subject: EncoderSubject) -> None:
    """Trunk and tail together equal the whole, bit for bit, at every cut; parts at it are [B, C, ...] numbers."""
    views = subject.views()
    for cut in (*subject.encoder(cut="input").names, "adapter"):
        encoder = subject.encoder(cut=cut)
        trunk, tail = encoder.cut(cut)
        parts = trunk(views)
        assert all(len(part) == CLIPS and part.ndim >= 2 for part in parts), f"parts cut at {cut} are no [B, C, ...]"
        assert torch.equal(tail.eval()(parts), encoder(views)), f"cut at {cut}: trunk and tail are not the whole"
        assert not any(p.requires_grad for p in trunk.parameters()), f"cut at {cut}: the trunk trains"


@torch.no_grad()
def check_alone(subject: EncoderSubject) -> None:
    """A clip's features depend on that clip alone."""
    encoder, views = subject.encoder(), subject.views()
    together = encoder(views)
    for at in range(CLIPS):
        alone = encoder(tuple(part[at : at + 1] for part in views))[0]
        torch.testing.assert_close(
            alone, together[at], rtol=1e-3, atol=1e-4, msg=f"features of clip {at} beside others"
        )


def check_shapes(subject: EncoderSubject) -> None:
    """Its shapes are told without weights or memory (on the meta device), and are those that come out."""
    for cut in subject.encoder(cut="input").names:
        with torch.device("meta"):
            told = subject.encoder(cut=cut).cut(cut)[0](tuple(part.to("meta") for part in subject.views(1)))
        with torch.no_grad():
            made = subject.encoder(cut=cut).cut(cut)[0](subject.views(1))
        assert [p.shape for p in told] == [p.shape for p in made], f"cut at {cut}: other shapes on the meta device"


def check_training(subject: EncoderSubject) -> None:
    """Cut at the input every parameter of the tail gets a finite gradient."""
    _, tail = subject.encoder(cut="input").cut("input")
    tail.train()(subject.views()).square().sum().backward()
    without = [name for name, p in tail.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient reaches {', '.join(without[:4])}"
    endless = [name for name, p in tail.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    assert not endless, f"gradients of {', '.join(endless[:4])} are not finite"


@torch.no_grad()
def check_stored(subject: EncoderSubject) -> None:
    """Weights that are stored and loaded again give the same bits."""
    encoder, other = subject.encoder(), subject.encoder(seed=1)
    other.load_state_dict(encoder.state_dict())
    views = subject.views()
    assert torch.equal(other(views), encoder(views)), (
        "features after loading differ: something is no parameter or buffer"
    )


ENCODER_CHECKS: dict[str, Callable[[EncoderSubject], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def encoder_checks(modality: Modality) -> dict[str, Callable[[], None]]:
    """name -> check, of the encoder that the settings of a modality name."""
    subject = EncoderSubject(modality)
    return {name: partial(check, subject) for name, check in ENCODER_CHECKS.items()}
