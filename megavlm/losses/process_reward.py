"""Loss of a process reward model: of each step of an answer, whether it is right.

Source: Lightman et al., arXiv 2305.20050, section 2.6, and Uesato et al., arXiv 2211.14275: the label of a step is
predicted at its last token. Over two labels with logits a and b, softmax's cross entropy is that of sigmoid(b - a); the
score here is b - a.

Shape suffix: S steps (or any tokens, of which those without a mark count nothing).
"""

import torch
import torch.nn.functional as F


def process_reward_loss(
    scores_S: torch.Tensor, marks_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Binary cross entropy of the steps' scores.

    Args:
        scores_S: log odds of a step being right.
        marks_S: the weight of a right step, minus that of a wrong one; 0: no step.

    Returns:
        The sum over steps (fp32), the sum of weights (fp32), and sums over steps: how many are right and wrong, and of
        how many of either the score says so (a score of 0 says that a step is wrong).
    """
    is_step_S = marks_S != 0
    scores_S, marks_S = scores_S.float()[is_step_S], marks_S.float()[is_step_S]
    is_right_S = marks_S > 0
    loss_S = F.binary_cross_entropy_with_logits(scores_S, is_right_S.float(), marks_S.abs(), reduction="none")
    agrees_S = (scores_S.detach() > 0) == is_right_S
    metrics = {}
    for name, chosen_S in (("right", is_right_S), ("wrong", ~is_right_S)):
        metrics[f"count/{name}"] = chosen_S.sum().float()
        metrics[f"agrees/{name}"] = (chosen_S & agrees_S).sum().float()
    return loss_S.sum(), marks_S.abs().sum(), metrics
