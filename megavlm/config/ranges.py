"""Which values the numbers of a recipe may have."""

import math

from megavlm.config.load import recipe_to_dict
from megavlm.config.schema import Recipe
from megavlm.errors import use_error

# Least value of every number; -inf: it is free. A negative rate or limit of a component means the common one.
LEAST: dict[str, float] = {
    "model.attention_dropout": 0,
    "model.hidden_dropout": 0,
    "model.rope_theta": 0,
    "model.max_position_embeddings": 0,
    "model.moe_aux_loss_coeff": 0,
    "model.cross_entropy_chunk_tokens": 1,
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.virtual_pipeline_model_parallel_size": 1,
    "parallel.context_parallel_size": 1,
    "parallel.expert_model_parallel_size": 1,
    "parallel.expert_tensor_parallel_size": 0,
    "parallel.vision_tensor_model_parallel_size": 0,
    "parallel.vision_pipeline_model_parallel_size": 1,
    "parallel.vision_data_parallel_size": 1,
    "parallel.vision_max_live_microbatches": 0,
    "parallel.vision_extra_microbatches_in_flight": 0,
    "parallel.recompute_num_layers": 1,
    "parallel.optimizer_offload_fraction": 0,
    "data.max_length": 2,  # one token read, one predicted
    "data.max_row_bytes": 1,
    "data.max_member_bytes": 1,
    "data.max_image_pixels": 1,
    "data.frames_fps": 0,
    "data.min_pixels": 0,
    "data.max_pixels": 0,
    "data.fps": 0,
    "data.fps_min_frames": 0,
    "data.fps_max_frames": 0,
    "data.video_min_pixels": 0,
    "data.video_max_pixels": 0,
    "data.packing_length": 0,
    "data.mixture_temperature": 0,
    "data.dataloader_num_workers": 0,
    "data.dataloader_prefetch_factor": 1,
    "data.augment_crop_min_area": 0.01,
    "data.augment_color_jitter": 0,
    "data.augment_flip_probability": 0,
    "optimizer.lr": 0,
    "optimizer.min_lr": 0,
    "optimizer.vit_lr": -math.inf,
    "optimizer.aligner_lr": -math.inf,
    "optimizer.weight_decay": 0,
    "optimizer.adam_beta1": 0,
    "optimizer.adam_beta2": 0,
    "optimizer.adam_eps": 0,
    "optimizer.clip_grad": 0,
    "optimizer.unfreeze_warmup_iters": 0,
    "optimizer.vit_clip_grad": -math.inf,
    "optimizer.aligner_clip_grad": -math.inf,
    "optimizer.vit_layer_decay": 0,
    "optimizer.llm_layer_decay": 0,
    "optimizer.lr_warmup_fraction": 0,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.lr_wsd_decay_iters": 0,
    "sft.label_smoothing_factor": 0,
    "sft.z_loss_coeff": 0,
    "sft.neftune_noise_alpha": 0,
    "sft.task_weight_lr": 0,
    "sft.task_weight_alpha": 0,
    "sft.task_weight_temperature": 0,
    "sft.task_weight_momentum": 0,
    "sft.box_loss_coeff": 0,
    "sft.box_l1_weight": 0,
    "sft.box_giou_weight": 0,
    "sft.mask_loss_coeff": 0,
    "sft.mask_bce_weight": 0,
    "sft.mask_dice_weight": 0,
    "sft.mask_head_dim": 1,
    "preference.beta": 0,
    "preference.label_smoothing": 0,
    "preference.rpo_alpha": 0,
    "preference.discopop_tau": 0,
    "preference.cpo_alpha": 0,
    "preference.simpo_gamma": 0,
    "preference.desirable_weight": 0,
    "preference.undesirable_weight": 0,
    "reward.center_rewards_coefficient": 0,
    "iterate.num_rounds": 1,
    "iterate.num_generations": 1,
    "iterate.num_rows": 0,
    "iterate.temperature": 0,
    "iterate.max_completion_length": 1,
    "iterate.generation_batch_size": 1,
    "iterate.threshold": -math.inf,
    "iterate.num_kept": 0,
    "contrastive.embedding_dim": 1,
    "contrastive.temperature": 0,
    "contrastive.logit_bias": -math.inf,
    "matching.max_texts_per_image": 1,
    "matching.contrastive_coeff": 0,
    "optimizer.loss_scale": 0,
    "optimizer.initial_loss_scale": 1,
    "optimizer.min_loss_scale": 1,
    "optimizer.loss_scale_window": 1,
    "optimizer.hysteresis": 1,
    "fp8.fp8_margin": 0,
    "fp8.fp8_amax_history_len": 1,
    "fp8.num_layers_at_start_in_bf16": 0,
    "fp8.num_layers_at_end_in_bf16": 0,
    "peft.lora_rank": 1,
    "peft.lora_alpha": 0,
    "peft.lora_dropout": 0,
    "peft.lorap_lr_ratio": 0,
    "peft.adapter_size": 1,
    "peft.num_virtual_tokens": 1,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 1,
    "train.train_iters": 0,
    "train.num_train_epochs": 0,
    "train.seed": 0,
    "train.eval_steps": 0,
    "train.eval_iters": 0,
    "train.early_stopping_patience": 0,
    "train.early_stopping_threshold": 0,
    "train.distributed_timeout_s": 1,
    "checkpoint.save_steps": 0,
    "checkpoint.keep_last": 0,
    "checkpoint.keep_every_steps": 0,
    "checkpoint.keep_best": 0,
    "checkpoint.save_timeout_s": 1,
    "observe.log_steps": 1,
    "observe.num_report_samples": 0,
    "observe.report_max_new_tokens": 1,
    "observe.timeline_step": 0,
}
_BELOW_ONE = (
    "model.attention_dropout",
    "model.hidden_dropout",
    "optimizer.adam_beta1",
    "optimizer.adam_beta2",
    "optimizer.lr_warmup_fraction",
    "sft.label_smoothing_factor",
    "sft.task_weight_momentum",
    "peft.lora_dropout",
)
_ABOVE_ZERO = (
    "data.frames_fps",
    "optimizer.lr",
    "optimizer.adam_eps",
    "peft.lora_alpha",
    "peft.lorap_lr_ratio",
    "sft.task_weight_lr",
    "sft.task_weight_temperature",
)


def check_numbers(recipe: Recipe) -> None:
    """Every number is finite and in its range.

    Raises:
        UseError: the first that is not.
    """
    flat = {
        f"{section}.{name}": value
        for section, values in recipe_to_dict(recipe).items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    for key, least in LEAST.items():
        value = flat[key]
        if not math.isfinite(value):
            raise use_error(key, value, "a finite number", "check how it was typed")
        if value < least:
            raise use_error(key, value, f"at least {least}", f"set {key}={least} or more")
    for key in _BELOW_ONE:
        if flat[key] >= 1:
            raise use_error(key, flat[key], "at least 0 and below 1", "give a fraction")
    for key in _ABOVE_ZERO:
        if flat[key] == 0:
            raise use_error(key, 0, "more than 0", f"remove {key}, or give a small number")
