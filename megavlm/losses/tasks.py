"""Weights of tasks that are learned together: functions of the tasks' losses over a whole global batch.

Shape suffixes: K tasks, L tokens.
"""

import torch


def ratio_weights(running_K: torch.Tensor, initial_K: torch.Tensor, temperature: float) -> torch.Tensor:
    """Weights with mean 1, larger where the loss has fallen less.

    Dynamic weight average, Liu et al., arXiv 1803.10704, equation 7: w_k = K exp(r_k / T) / sum_i exp(r_i / T). There
    r_k is the ratio of a task's losses in the two epochs before; here that of its running loss to its first one, since
    a run may see its rows once.

    Args:
        running_K: losses, averaged over the last steps.
        initial_K: losses of the first step that a task had a share of.
        temperature: T; the paper's is 2.
    """
    return len(running_K) * torch.softmax(running_K / initial_K / temperature, dim=0)


def uncertainty_objective(
    losses_K: torch.Tensor, shares_K: torch.Tensor, log_variances_K: torch.Tensor
) -> torch.Tensor:
    """sum_k share_k (exp(-s_k) L_k + s_k / 2): Kendall et al., arXiv 1705.07115, equation 10, with s = log sigma^2.

    Of equation 10 the term of a classification, L / sigma^2 + log sigma (that of a regression has half the loss). The
    likelihood is one of every output (equation 8), so a task counts by its share of them.

    Args:
        losses_K: mean cross entropy of a task's tokens.
        shares_K: the tokens' share of all, by weight.
        log_variances_K: s.
    """
    return (shares_K * (torch.exp(-log_variances_K) * losses_K + log_variances_K / 2)).sum()


def gradient_norm_objective(
    weights_K: torch.Tensor, norms_K: torch.Tensor, progress_K: torch.Tensor, alpha: float
) -> torch.Tensor:
    """What GradNorm learns the weights by: Chen et al., arXiv 1711.02257, equations 1 and 2.

    sum_k |G_k - mean(G) r_k^alpha|, with G_k = w_k norms_k and r_k = progress_k / mean(progress); the target behind the
    minus is a constant (algorithm 1).

    Args:
        weights_K: of the tasks; what is differentiated by.
        norms_K: norms of the gradients of the tasks' losses by the last shared layer, without weights.
        progress_K: a task's loss over its first one.
        alpha: strength of the pull towards tasks that learn slowly; the paper's are 1.5 and 0.12.
    """
    scaled_K = weights_K * norms_K
    rates_K = progress_K / progress_K.mean()
    targets_K = (scaled_K.mean() * rates_K**alpha).detach()
    return (scaled_K - targets_K).abs().sum()


def rescaled(weights_K: torch.Tensor) -> torch.Tensor:
    """Weights with mean 1: the last step of GradNorm's algorithm 1."""
    return weights_K * (len(weights_K) / weights_K.sum())


def task_sums(values_L: torch.Tensor, tasks_L: torch.Tensor, num_tasks: int) -> torch.Tensor:
    """Sum of a value over the tokens of each task, float64 [K].

    Args:
        values_L: of some tokens.
        tasks_L: int64 number of each token's task.
        num_tasks: K.
    """
    sums_K = torch.zeros(num_tasks, dtype=torch.float64, device=values_L.device)
    return sums_K.index_add(0, tasks_L, values_L.double())
