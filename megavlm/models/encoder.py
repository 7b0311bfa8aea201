"""The vision encoder of a rank: tower and connectors, whole or one of several stages in series.

Shape suffixes: P patches, C patch values, D tower hidden size, Z hidden states that travel together (the last one and
those tapped so far), N images, V visual tokens, K slots (1 + DeepStack features), H language hidden size.
"""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.models.architecture import Architecture
from megavlm.parallel.groups import Groups


class VisionEncoder(MegatronModule):
    """Images to features, or a stage of that.

    Children are `vision` (the tower, or this stage's layers of it) and `projector` (on the last stage); these names
    are the components that learning rates, freezing, norms and checkpoints speak of.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        groups: Groups,
        vision: nn.Module,
        projector: nn.Module | None,
    ) -> None:
        super().__init__(config=config)
        self.architecture, self.groups = architecture, groups
        self.vision: Any = vision
        self.is_first_stage = groups.vision.pp.rank() == 0
        self.is_last_stage = projector is not None
        if projector is not None:
            self.projector: Any = projector

    def forward(self, inputs: torch.Tensor, grid_thw_N3: torch.Tensor) -> torch.Tensor:
        """Run this stage on the images of one microbatch.

        Args:
            inputs: patches [P, C] on the first stage, hidden states [P', Z, D] of the stage before elsewhere.
            grid_thw_N3: int64 patch grid of every image; at least one.

        Returns:
            Features [V, K, H] on the last stage, hidden states [P', Z, D] elsewhere.
        """
        hiddens = [inputs] if self.is_first_stage else list(inputs.unbind(1))
        hiddens = self.vision(hiddens, grid_thw_N3)
        if not self.is_last_stage:
            return torch.stack(hiddens, dim=1)
        features_VKH: torch.Tensor = self.projector(hiddens, grid_thw_N3)
        return features_VKH
