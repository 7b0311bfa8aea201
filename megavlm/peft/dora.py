"""Norms of the rows of a weight that low-rank matrices change, without making the changed weight.

||w + s b A||^2 = ||w||^2 + 2 s <w A^T, b> + s^2 <b A A^T, b> for a row w, its row b of B, and A; where ranks have parts
of the rows, the terms of the ranks add up.

Shape suffixes: R rank, I inputs that this rank has, O outputs.
"""

import torch
import torch.distributed as dist


@torch.no_grad()
def squares_of_rows(weight_OI: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[O] fp32: squared norms of a weight's rows.

    Args:
        weight_OI: this rank's part.
        group: ranks that have the other parts of these rows; None: the rows are whole.
    """
    squares_O = weight_OI.float().square().sum(dim=1)
    if group is not None:
        dist.all_reduce(squares_O, group=group)
    return squares_O


@torch.no_grad()
def changed_norms(
    squares_O: torch.Tensor,
    weight_OI: torch.Tensor,
    matrix_RI: torch.Tensor,
    matrix_OR: torch.Tensor,
    scaling: float,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """[O] fp32: norms of the rows of weight + scaling * B A.

    Args:
        squares_O: squared norms of the weight's rows.
        weight_OI: this rank's part of the weight.
        matrix_RI: A, this rank's part.
        matrix_OR: B.
        scaling: factor on B A.
        group: ranks that have the other parts of these rows; None: the rows are whole.
    """
    a_RI, b_OR = matrix_RI.float(), scaling * matrix_OR.float()
    # In the weight's own precision: its copy in fp32 would be as large as the changed weight.
    inner_OR = (weight_OI @ a_RI.to(weight_OI.dtype).t()).float()
    change_O = (b_OR * (2 * inner_OR + b_OR @ (a_RI @ a_RI.t()))).sum(dim=1)
    if group is not None:
        dist.all_reduce(change_O, group=group)
    return (squares_O + change_O).sqrt()
