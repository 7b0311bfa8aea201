"""Mixtures of experts: Megatron-Core's layer, with a load-balancing loss that means the same in every layout.

Megatron-Core multiplies the loss by the tokens of the rank, so that its weight depends on tensor and context
parallelism, and counts padding. Here it is a mean over the real tokens of the global batch.

Shape suffixes: T tokens of this rank, E experts.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def load_balancing_sum(
    logits_TE: torch.Tensor, chosen_TE: torch.Tensor, real_T: torch.Tensor, top_k: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Load-balancing loss of a packed row, times its number of real tokens: this rank's addend.

    With f the share of choices that fall on an expert, and p its mean probability, E * sum(f * p); 1 where all experts
    are chosen alike. The addends of the row's ranks sum up to the row's.

    Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6.

    Args:
        logits_TE: of the router.
        chosen_TE: bool, experts that a token goes to.
        real_T: bool, tokens that count.
        top_k: experts of a token.
        group: ranks that share the row.

    Returns:
        A scalar, fp32.
    """
    num_experts = logits_TE.shape[1]
    probabilities_E = (torch.softmax(logits_TE.float(), dim=1) * real_T[:, None]).sum(dim=0)
    counts = torch.cat(((chosen_TE & real_T[:, None]).sum(dim=0), real_T.sum()[None])).float()
    dist.all_reduce(counts, group=group)
    return num_experts * (counts[:-1] * probabilities_E).sum() / (top_k * counts[-1].clamp(min=1))


class Router(TopKRouter):
    """Sends each token to its experts, and attaches the gradient of the load-balancing loss.

    The caller sets the factor that turns sums over tokens into the loss's scale (`set_balance_scale`), and takes what
    has added up (`take_balance`).
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, coefficient: float, **options: Any
    ) -> None:
        """`options`: what newer versions of Megatron-Core hand on to their router."""
        super().__init__(config=config, pg_collection=pg_collection, **options)
        self.coefficient = coefficient
        self.balance_sums: list[torch.Tensor] = []

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choices [T, E] from the logits [T, 1, E]; `padding_mask` [T, 1]: tokens that do not count."""
        probs, chosen_TE = super().routing(logits, padding_mask=padding_mask, **options)
        if self.coefficient and self.training and torch.is_grad_enabled():  # not in recompute's first pass
            assert padding_mask is not None
            logits_TE = logits.reshape(-1, self.config.num_moe_experts)
            real_T = ~padding_mask.reshape(-1)
            balance = load_balancing_sum(logits_TE, chosen_TE, real_T, self.topk, self.tp_cp_group)
            self.balance_sums.append(balance.detach())
            probs = MoEAuxLossAutoScaler.apply(probs, self.coefficient * balance)
        return probs, chosen_TE


def set_balance_scale(scale: torch.Tensor) -> None:
    """Multiply gradients of the load-balancing sums of all routers of this process by a scalar from now on."""
    MoEAuxLossAutoScaler.set_loss_scale(scale)


def take_balance(models: Iterable[nn.Module], device: torch.device) -> torch.Tensor:
    """Sum of `load_balancing_sum` over these models' layers and rows since the last call; float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for model in models:
        for module in model.modules():
            if isinstance(module, Router) and module.balance_sums:
                total += torch.stack(module.balance_sums).double().sum()
                module.balance_sums.clear()
    return total


class AllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Gathers tokens on all ranks that share the experts; rows need not be of one length (Megatron-Core's must)."""

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and weights of this rank to those of all ranks."""
        group = self.tp_ep_group
        if group.size() == 1:
            return hidden_states, probs
        own = torch.tensor([len(hidden_states)], device=hidden_states.device)
        everyones = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(everyones, own, group=group)
        self.sizes = [int(size) for size in everyones]
        gather = functools.partial(gather_from_sequence_parallel_region, group=group, output_split_sizes=self.sizes)
        with torch.no_grad():
            self.routing_map: torch.Tensor = gather(self.routing_map)
        return gather(hidden_states), gather(probs)

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the experts made of all tokens to the sums for this rank's."""
        if self.tp_ep_group.size() == 1:
            return hidden_states
        return reduce_scatter_to_sequence_parallel_region(
            hidden_states.to(self.local_probs.dtype), group=self.tp_ep_group, input_split_sizes=self.sizes
        ).to(hidden_states.dtype)


def experts_spec(provider: LocalSpecProvider, coefficient: float) -> ModuleSpec:
    """The layer's module in place of an MLP.

    Args:
        provider: where the experts come from.
        coefficient: of the load-balancing loss.
    """
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=provider.experts(),
            router=functools.partial(Router, coefficient=coefficient),
        ),
    )


def finish_experts(model: nn.Module, groups: ProcessGroupCollection) -> None:
    """What Megatron-Core's constructor leaves undone, for every mixture in a model.

    Experts are marked as such also where they are not shared out: their copies lie on other ranks than those of the
    rest as soon as `expert_tensor_parallel_size` differs from the tensor parallel size.
    """
    for module in model.modules():
        if not isinstance(module, MoELayer):
            continue
        for name, parameter in module.experts.named_parameters():
            vars(parameter)["allreduce"] = False
            # Transformer Engine's grouped linears know nothing of the ranks that share a matrix, and mark dimension 0
            if "linear_fc2.weight" in name:
                vars(parameter)["partition_dim"] = 1
        if module.config.moe_token_dispatcher_type == "allgather":
            module.token_dispatcher = AllGatherDispatcher(
                module.num_local_experts, module.local_expert_indices, config=module.config, pg_collection=groups
            )
