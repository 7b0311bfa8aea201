"""A chunk of the language model of one pipeline rank; the first one puts visual features among the words.

Shape suffixes: T tokens of the packed row, L tokens of this rank (T / cp), S those of its sequence-parallel part,
V visual tokens, K slots (1 + DeepStack features), H hidden size, W this rank's part of the vocabulary.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.models.architecture import Architecture
from megavlm.models.gated import ImagesInRow, images_in_row
from megavlm.models.mask_head import InputOf
from megavlm.models.merge import carry_features, feature_rows, merge_features
from megavlm.models.recompute import ready_for_recompute
from megavlm.models.visual_tokens import VisualTokens
from megavlm.parallel.context import local_part
from megavlm.parallel.groups import Groups


class LanguageChunk(MegatronModule):
    """Decodes; its child is `language`, the component that learning rates, freezing, norms and checkpoints speak of."""

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        groups: Groups,
        language: nn.Module,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.architecture, self.groups, self.vp_stage = architecture, groups, vp_stage
        self.language: Any = language
        decoder: Any = self.language.decoder
        self.pre_process, self.post_process = self.language.pre_process, self.language.post_process
        self.share_embeddings_and_output_weights = architecture.language.shares_embeddings
        self.model_type = self.language.model_type
        layers = [layer.layer_number - 1 for layer in decoder.layers]
        num_deepstack = architecture.num_deepstack
        # an empty chunk passes on what it gets
        self.slots_in = 1 + max(0, num_deepstack - layers[0]) if layers else None
        if architecture.gate_interval and layers:
            self.slots_in = 2
        self.visual_tokens: VisualTokens | None = None
        self._seen_by_output: InputOf | None = None
        if architecture.language.mask_head is not None and self.post_process:
            output_layer: Any = self.language.output_layer
            self._seen_by_output = InputOf(output_layer)

    @property
    def num_slots(self) -> int:
        """K of the hidden states that leave the embedding, in a row with images."""
        return 2 if self.architecture.gate_interval else 1 + self.architecture.num_deepstack

    def watch_visual_tokens(self) -> VisualTokens:
        """What says, from now on, which tokens of the row that goes through are visual."""
        if self.visual_tokens is None:
            self.visual_tokens = VisualTokens()
        return self.visual_tokens

    def show_row(self, tokens_T: torch.Tensor, borders: torch.Tensor) -> None:
        """Say which row goes through: before its backward pass; the forward pass says it by itself.

        Args:
            tokens_T: int64 token ids, the whole row.
            borders: its sample borders.
        """
        if self.visual_tokens is not None:
            is_visual_T = tokens_T == self.architecture.inputs.image_token_id
            self.visual_tokens.show(self._seen_by_layers(is_visual_T, borders))

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the stage before: [S, K, H], possibly with slots that are no longer used."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if tensor is not None and self.slots_in is not None:
            tensor = tensor[:, : self.slots_in]
        self.language.set_input_tensor(tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """Return the weight that a tied embedding and output layer share (Megatron-Core sums its gradients)."""
        return self.language.shared_embedding_or_output_weight()

    def forward(
        self,
        features_VKH: torch.Tensor | None,
        tokens_T: torch.Tensor,
        position_ids_3T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        real_T: torch.Tensor,
        feature_rows_V: torch.Tensor | None = None,
        noise_TH: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run this chunk on one packed row.

        Args:
            features_VKH: of all images of the row, in their order; None without images, and on later chunks.
            tokens_T: int64 token ids, the whole row.
            position_ids_3T: int64 rotary positions, the whole row.
            cu_seqlens: int32 sample borders, padding included, the last one T.
            real_T: bool, tokens that count in a load-balancing loss of experts.
            feature_rows_V: int64 number of the feature that each visual token of the row takes; None: one after the
                other.
            noise_TH: what is added to the word embeddings of the row; None: nothing.

        Returns:
            Logits [L, W] on the last chunk (where the loss computes them, what they are computed from: [L, H]; of a
            reward model scores [L, 1]; of an embedding model what `EmbeddingHead` gives; with a head for masks the
            logits, and what `MaskHead` gives), hidden states [S, K, H] elsewhere.
        """
        borders = cu_seqlens.to(torch.int32)
        self.show_row(tokens_T, borders)
        longest = int((borders[1:] - borders[:-1]).max())
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        if self.architecture.gate_interval:
            packing = ImagesInRow(**vars(packing), **self._images(tokens_T, borders))
        hidden = self._embed(features_VKH, tokens_T, borders, feature_rows_V, noise_TH) if self.pre_process else None
        output: torch.Tensor = self.language(
            input_ids=None,
            position_ids=position_ids_3T[:, None],
            attention_mask=None,
            decoder_input=hidden,
            packed_seq_params=packing,
            padding_mask=self._padding(real_T, borders) if self.architecture.language.experts else None,
        )
        if not self.post_process:
            return output
        output = output.reshape(-1, output.shape[-1])  # GPTModel gives [1, L, W]
        if self._seen_by_output is None:
            return output
        visual_V, segments_G = self._mask_tokens(tokens_T, borders)
        return output, *self.language.mask_head(self._seen_by_output.take(), visual_V, segments_G)

    def _mask_tokens(self, tokens_T: torch.Tensor, borders: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers, among this context rank's tokens, of visual tokens and of tokens for masks."""
        context, head = self.groups.context, self.architecture.language.mask_head
        assert head is not None
        tokens_L = local_part(tokens_T, borders, context.size(), context.rank())
        visual_V = torch.nonzero(tokens_L == self.architecture.inputs.image_token_id)[:, 0]
        return visual_V, torch.nonzero(tokens_L == head.segment_token_id)[:, 0]

    def _images(self, tokens_T: torch.Tensor, borders: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs, context = self.architecture.inputs, self.groups.context
        is_visual_T = tokens_T == inputs.image_token_id
        return images_in_row(is_visual_T, inputs.num_queries, borders, context.size(), context.rank())

    def _padding(self, real_T: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
        """Bool [1, S]: of the tokens that the layers of this rank see, those that do not count."""
        return ~self._seen_by_layers(real_T, borders)[None]

    def _seen_by_layers(self, values_T: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
        """[S]: those of the tokens that the layers of this rank see."""
        context, tensor = self.groups.context, self.groups.tensor
        values_S = local_part(values_T, borders, context.size(), context.rank())
        return values_S.chunk(tensor.size())[tensor.rank()] if self.config.sequence_parallel else values_S

    def _embed(
        self,
        features_VKH: torch.Tensor | None,
        tokens_T: torch.Tensor,
        borders: torch.Tensor,
        feature_rows_V: torch.Tensor | None,
        noise_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        context = self.groups.context
        rows_T = feature_rows(tokens_T, self.architecture.inputs.image_token_id, feature_rows_V)
        tokens_L = local_part(tokens_T, borders, context.size(), context.rank())
        rows_L = local_part(rows_T, borders, context.size(), context.rank())
        embeddings_LH = self.language.embedding(input_ids=tokens_L[None], position_ids=None)[:, 0]
        if noise_TH is not None:
            noise_LH = local_part(noise_TH, borders, context.size(), context.rank())
            embeddings_LH = embeddings_LH + noise_LH.to(embeddings_LH)
        if self.architecture.gate_interval:
            hidden_LKH = carry_features(embeddings_LH, features_VKH, rows_L)
        else:
            hidden_LKH = merge_features(embeddings_LH, features_VKH, rows_L)
        if self.config.sequence_parallel:
            hidden_LKH = tensor_parallel.scatter_to_sequence_parallel_region(hidden_LKH, group=self.groups.tensor)
        return ready_for_recompute(hidden_LKH.contiguous(), self)
