"""Put visual features where the image placeholders stand.

Shape suffixes: T tokens, V visual tokens (in order of appearance), K slots, H hidden size.
Slot 0 is the hidden state. Slots 1.. hold what the first decoder layers still have to add (DeepStack), so that it
travels with the hidden state through sequence parallelism, recompute and pipeline stages without further code.
"""

import torch


def feature_rows(tokens_T: torch.Tensor, image_token_id: int, taken_V: torch.Tensor | None = None) -> torch.Tensor:
    """Row of the feature that each token takes, -1 for text: int64 [T].

    Args:
        tokens_T: of the whole packed row.
        image_token_id: of visual tokens.
        taken_V: rows that the visual tokens take, where they do not take one after the other.
    """
    is_image_T = tokens_T == image_token_id
    rows_T = torch.cumsum(is_image_T, 0) - 1
    if taken_V is not None:
        rows_T = taken_V[rows_T.clamp(min=0)]
    return torch.where(is_image_T, rows_T, -1)


def carry_features(
    embeddings_TH: torch.Tensor, features_VKH: torch.Tensor | None, rows_T: torch.Tensor
) -> torch.Tensor:
    """Hidden states [T, 2, H]: embeddings, and beside those of visual tokens their features (gated cross-attention).

    Args:
        embeddings_TH: word embeddings of the tokens.
        features_VKH: features of the whole batch's images (K is 1), or None for a batch without any.
        rows_T: from `feature_rows`, or the part of it that this rank holds.
    """
    if features_VKH is None:
        return torch.stack((embeddings_TH, torch.zeros_like(embeddings_TH)), dim=1)
    taken_TH = features_VKH[:, 0].to(embeddings_TH.dtype).index_select(0, rows_T.clamp(min=0))
    beside_TH = torch.where((rows_T >= 0)[:, None], taken_TH, taken_TH.new_zeros(()))
    return torch.stack((embeddings_TH, beside_TH), dim=1)


def merge_features(
    embeddings_TH: torch.Tensor, features_VKH: torch.Tensor | None, rows_T: torch.Tensor
) -> torch.Tensor:
    """Hidden states [T, K, H]: features at visual tokens, embeddings elsewhere; [T, 1, H] of a batch without images.

    Args:
        embeddings_TH: word embeddings of the tokens.
        features_VKH: features of the whole batch's images, or None for a batch without any.
        rows_T: from `feature_rows`, or the part of it that this rank holds.
    """
    if features_VKH is None:
        return embeddings_TH[:, None]
    visual_T = rows_T >= 0
    taken_TKH = features_VKH.to(embeddings_TH.dtype).index_select(0, rows_T.clamp(min=0))
    taken_TKH = torch.where(visual_T[:, None, None], taken_TKH, taken_TKH.new_zeros(()))
    text_TH = torch.where(visual_T[:, None], embeddings_TH.new_zeros(()), embeddings_TH)
    return torch.cat(((taken_TKH[:, 0] + text_TH)[:, None], taken_TKH[:, 1:]), dim=1)
