"""For environments of their own (serving, videos): torchvision from a package registry beside torch's CPU build.

torchvision's compiled operators do not load there, and its import fails because it describes operators that nobody has
declared. Image processors need none of them: declaring them is enough. Python imports this file by its name, before
anything else, in every process that has this folder in PYTHONPATH.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_SIZES = "SymInt pooled_height, SymInt pooled_width"
_SHAPE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_POOL = f"Tensor input, Tensor rois, float spatial_scale, {_SIZES}"
_BACK = f"float spatial_scale, {_SIZES}"
_CONV = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
# Operators of torchvision 0.28 (torchvision/csrc/ops).
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_BACK}, {_SHAPE}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_POOL}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_BACK}, {_SHAPE}) -> Tensor",
    f"ps_roi_align({_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_BACK}, int sampling_ratio, {_SHAPE})"
    " -> Tensor",
    f"ps_roi_pool({_POOL}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_BACK}, {_SHAPE}) -> Tensor",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_CONV}) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    f"{_CONV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class DeclareFirst(MetaPathFinder):
    """Declares the operators when torchvision is about to be imported; finds nothing itself."""

    library: Any = None

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> None:
        """Called for every import."""
        if name == "torchvision" and DeclareFirst.library is None:
            import torch

            DeclareFirst.library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                DeclareFirst.library.define(schema)


sys.meta_path.insert(0, DeclareFirst())
