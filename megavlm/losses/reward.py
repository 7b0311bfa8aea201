"""Loss of a reward model on pairs of answers, and how well calibrated its preferences are.

Shape suffixes: P pairs of this microbatch, B bins of confidence.
"""

import torch
import torch.nn.functional as F


def reward_loss(
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    margin_P: torch.Tensor | None = None,
    center_rewards_coefficient: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin), arXiv 2307.09288, equations 1 and 2.

    Args:
        chosen_P: scores of the preferred answers.
        rejected_P: scores of the others.
        margin_P: by how much the scores should differ; None: 0.
        center_rewards_coefficient: weight of (chosen + rejected)^2, which keeps scores around 0: Eisenstein et al.,
            arXiv 2312.09244.

    Returns:
        The sum over pairs (fp32), the number of pairs (fp32), and sums over pairs: rewards, margins, accuracies.
    """
    chosen_P, rejected_P = chosen_P.float(), rejected_P.float()
    difference_P = chosen_P - rejected_P
    wanted_P = difference_P if margin_P is None else difference_P - margin_P.float()
    loss_P = -F.logsigmoid(wanted_P) + center_rewards_coefficient * (chosen_P + rejected_P) ** 2
    metrics = {
        "rewards/chosen": chosen_P.detach().sum(),
        "rewards/rejected": rejected_P.detach().sum(),
        "rewards/margins": difference_P.detach().sum(),
        "rewards/accuracies": (difference_P > 0).float().sum(),
    }
    return loss_P.sum(), loss_P.new_tensor(float(loss_P.numel())), metrics


def calibration_sums(chosen_P: torch.Tensor, rejected_P: torch.Tensor, num_bins: int = 10) -> torch.Tensor:
    """What the expected calibration error of a reward model's preferences is made of.

    The model prefers the answer with the higher score, with confidence sigmoid(|difference|), from 0.5 to 1, which is
    split into bins of equal width. A tie counts as half right.

    Args:
        chosen_P: scores of the preferred answers.
        rejected_P: scores of the others.
        num_bins: B.

    Returns:
        float64 [B, 3]: pairs, sum of confidences, sum of right preferences. Sums of different pairs may be added up.
    """
    difference_P = (chosen_P.detach() - rejected_P.detach()).double()
    confidence_P = torch.sigmoid(difference_P.abs())
    right_P = (torch.sign(difference_P) + 1) / 2
    bin_P = ((confidence_P - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    values_P3 = torch.stack((torch.ones_like(confidence_P), confidence_P, right_P), dim=1)
    return torch.zeros(num_bins, 3, dtype=torch.float64, device=bin_P.device).index_add(0, bin_P, values_P3)


def expected_calibration_error(sums_B3: torch.Tensor) -> torch.Tensor:
    """Mean of |accuracy - confidence| over bins, weighted by their pairs: Guo et al., arXiv 1706.04599, equation 3.

    Args:
        sums_B3: of `calibration_sums`, over at least one pair.
    """
    num_pairs_B, confidence_B, right_B = sums_B3.unbind(1)
    return (right_B - confidence_B).abs().sum() / num_pairs_B.sum()
