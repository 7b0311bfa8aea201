"""Image-text matching: which pairs do not match and are hard to tell, and the loss of telling them.

Sources: Li et al. (ALBEF), arXiv 2107.07651, section 3.2; Li et al. (BLIP), arXiv 2201.12086, section 3.2.

Shape suffixes: N rows of this rank, M rows of the global batch, D width of embeddings, C choices of each row, B rows
that are looked at together, E pairs of images and a text, 2 the classes (no match, match).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

_COSINES_AT_A_TIME = 1 << 22


def gumbel_noise(seeds: Sequence[int], count: int) -> torch.Tensor:
    """So many draws of the Gumbel distribution, fp64 [count]: the same for the same seeds on any machine.

    With them added, the largest of some logits is a draw by their softmax, and the next ones are draws without those
    before (Gumbel top-k; Kool et al., arXiv 1903.06059).
    """
    raw = np.random.PCG64(list(seeds)).random_raw(count)  # numpy promises the raw stream for ever
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(-np.log(-np.log(uniform)))


def hard_negatives(
    rows_ND: torch.Tensor,
    candidates_MD: torch.Tensor,
    scale: torch.Tensor,
    contents_NX: torch.Tensor,
    contents_MX: torch.Tensor,
    noise_seeds: Sequence[Sequence[int]] | None,
    num_choices: int,
) -> torch.Tensor:
    """Which candidates each row is told from: the first choice, the second, and so on; int64 [N, C], -1 for none.

    Args:
        rows_ND: embeddings, normalised.
        candidates_MD: embeddings of the other kind (texts of images, images of texts), in the order of whose numbers
            draws are to depend.
        scale: what cosines are multiplied by (1 / temperature).
        contents_NX: int64, what tells a row's own contents from others.
        contents_MX: of the candidates; one with any content of the row is none of its negatives.
        noise_seeds: for each row what its draws depend on; None: the most similar ones are chosen.
        num_choices: C.
    """
    num_candidates = len(candidates_MD)
    chosen_NC = torch.full((len(rows_ND), num_choices), -1, device=rows_ND.device)
    num_found = min(num_choices, num_candidates)
    size = max(1, _COSINES_AT_A_TIME // num_candidates)
    for start in range(0, len(rows_ND), size):
        block = slice(start, start + size)
        scores_BM = (scale * (rows_ND[block] @ candidates_MD.T)).double()
        if noise_seeds is not None:
            noise = [gumbel_noise(seeds, num_candidates) for seeds in noise_seeds[block]]
            scores_BM += torch.stack(noise).to(scores_BM.device)
        is_same_BM = (contents_NX[block, None] == contents_MX[None]).any(-1)
        best = scores_BM.masked_fill(is_same_BM, -torch.inf).topk(num_found, dim=1)
        chosen_NC[block, :num_found] = torch.where(best.values.isinf(), -1, best.indices)
    return chosen_NC


def share_out(choices_MC: torch.Tensor, limit: int) -> list[int]:
    """One choice for each row, such that none is taken more often than `limit` times where there is another.

    Args:
        choices_MC: int64, -1 for none; rows choose in this order.
        limit: how often the same one may be chosen.

    Returns:
        For each row the first of its choices that is not taken so often yet; where all are, the one that is taken least
        often; -1 where there is none.
    """
    taken: dict[int, int] = {}
    chosen = []
    for choices in choices_MC.tolist():
        possible = [choice for choice in choices if choice >= 0]
        free = (choice for choice in possible if taken.get(choice, 0) < limit)
        least = min(possible, key=lambda choice: taken.get(choice, 0), default=-1)
        found = next(free, least)
        taken[found] = taken.get(found, 0) + 1
        chosen.append(found)
    return chosen


def matching_loss(logits_E2: torch.Tensor, matches_E: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross entropy over the two classes (ALBEF's image-text matching).

    Args:
        logits_E2: of no match, and of a match.
        matches_E: bool, whether the text belongs to the images.

    Returns:
        The sum over pairs (fp32), and sums over them by what they are: their number and how many are told rightly.
    """
    logits_E2 = logits_E2.float()
    loss = F.cross_entropy(logits_E2, matches_E.long(), reduction="sum")
    is_right_E = (logits_E2[:, 1] > logits_E2[:, 0]) == matches_E
    return loss, {
        "count/match": matches_E.sum().float(),
        "count/no_match": (~matches_E).sum().float(),
        "right/match": (is_right_E & matches_E).sum().float(),
        "right/no_match": (is_right_E & ~matches_E).sum().float(),
    }
