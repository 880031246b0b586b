"""The teacher: an exponential moving average of the student (Eq. 7).

Letters: B clips, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from mbcd_cli.encoders.staged import Parts
from mbcd_cli.model import MultiModalModel

_AVERAGED = ("trunks.", "tails.", "norms.", "fused_head.")


class Teacher:
    """Weight average of the encoders and the fused head, beginning as a copy of the student.

    Floating buffers (batch-norm statistics, of live trunks too) are averaged as well, counters are copied. Uni-modal
    heads have no average: `model_for_evaluation` carries the student's current ones, so that uni-modal accuracy can be
    reported.

    Args:
        student: the model that is averaged; its tensors are referred to, so it must be updated in place.
        beta: Theta_EMA <- beta Theta_EMA + (1 - beta) Theta.
    """

    def __init__(self, student: MultiModalModel, *, beta: float) -> None:
        self.student = student
        self.beta = beta
        self.model = copy.deepcopy(student).requires_grad_(False).eval()
        mine, theirs = self.model.state_dict(keep_vars=True), student.state_dict(keep_vars=True)
        # Frozen weights are the student's for good.
        frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
        averaged = [key for key in mine if key.startswith(_AVERAGED) and key not in frozen]
        self._pairs = [(mine[key].detach(), theirs[key].detach()) for key in averaged]
        self._mine = [a for a, _ in self._pairs if a.is_floating_point()]
        self._theirs = [b for _, b in self._pairs if b.is_floating_point()]
        self._counters = [(a, b) for a, b in self._pairs if not a.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """One averaging step; call it after every optimizer step."""
        if self._mine:
            torch._foreach_lerp_(self._mine, self._theirs, 1 - self.beta)
        for mine, theirs in self._counters:
            mine.copy_(theirs)

    @torch.no_grad()
    def fused_logits(self, inputs: Mapping[str, Parts]) -> torch.Tensor:
        """The teacher's fused logits [B, C] (eval mode, no dropout, no gradient) from the dataset's inputs."""
        return self.model.fuse(self.model.features(self.model.at_cut(inputs)))

    @torch.no_grad()
    def model_for_evaluation(self) -> MultiModalModel:
        """The averaged model with the student's current uni-modal heads, in eval mode."""
        self.model.heads.load_state_dict(self.student.heads.state_dict())
        return self.model.eval()
