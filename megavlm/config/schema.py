"""The recipe: every knob of a run, as frozen dataclasses with their defaults.

Knobs carry the names that Megatron and ms-swift users already type. Units are in the names.
`load.py` reads a recipe from YAML, `validate.py` checks what one field alone cannot tell.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and through which kernels."""

    hf_dir: str = ""
    """Hugging Face directory that gives architecture, weights, tokenizer, template and image processor."""
    backend: Literal["torch", "flash", "te"] = "torch"
    """Layer specs: plain torch SDPA (runs anywhere), flash-attn, or Transformer Engine."""
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    moe_aux_loss_coeff: float = 0.0
    """Of mixtures of experts: weight of the load-balancing loss (Switch Transformer's, of each row and layer), a mean
    over the real tokens of the global batch and a sum over layers, beside the mean loss."""


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: how ranks share the model and the data. Data parallel size is what is left of the world."""

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    """Model chunks per pipeline rank (interleaved schedule when > 1)."""
    pipeline_model_parallel_layout: str = ""
    """Explicit decoder layers per stage in Megatron's notation, e.g. `Et|ttt|tL`; empty: even split."""
    context_parallel_size: int = 1
    cp_comm_type: Literal["all_gather", "p2p"] = "all_gather"
    """How context-parallel attention moves keys and values: `p2p` is the ring."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer; they are out of the tensor, context and data ranks of a stage."""
    expert_tensor_parallel_size: int = 0
    """Ranks that share the matrices of an expert; 0: tensor_model_parallel_size."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts: sent to the ranks that have them, or gathered on all."""
    vision_placement: Literal["first_stage", "stage", "spread", "bubble", "own_ranks"] = "first_stage"
    """Where the vision encoder is. `first_stage`: on the first pipeline rank, beside the language model's first layers.
    `stage`: its layers have pipeline ranks of their own in front of the language model's. `spread`: all ranks encode
    shares of equal cost of the whole global batch before the language model starts. `bubble`: the ranks of a pipeline
    encode shares of its images where the pipeline would be idle. `own_ranks`: on ranks of its own, in front of all
    others, with tensor and data parallelism of its own."""
    vision_tensor_model_parallel_size: int = 0
    """0: the same as tensor_model_parallel_size; otherwise 1 or the same. With `own_ranks` any; 0 means 1."""
    vision_pipeline_model_parallel_size: int = 1
    """With `stage`: how many of the pipeline_model_parallel_size ranks hold the encoder; the rest hold the language
    model."""
    vision_data_parallel_size: int = 1
    """With `own_ranks`: encoders, each on vision_tensor_model_parallel_size ranks; added to the world size."""
    vision_max_live_microbatches: int = 0
    """With `bubble`: a rank holds encoder activations of at most so many microbatches; 0: pipeline ranks + 4."""
    vision_extra_microbatches_in_flight: int = 0
    """With `bubble` and one model chunk a rank: the language model runs so many microbatches further ahead than 1F1B,
    at the price of their activations, so that more of the encoder's backward fits into the bubbles."""
    vision_recompute: bool = False
    """With `spread` or `bubble`: keep features only, and encode again before each backward pass of the encoder."""
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: Literal["none", "full", "selective"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """With `selective`: any of core_attn, mlp (moe in a model with experts), layernorm."""


@dataclass(frozen=True)
class DataConfig:
    """Rows, images and how they become batches."""

    train: tuple[str, ...] = ()
    """JSON or JSONL files of training rows."""
    eval: tuple[str, ...] = ()
    """Held-out rows: evaluation loss, and the samples of the report."""
    image_dir: str = ""
    """Root of relative image paths; empty: the folder of the row's file."""
    max_length: int = 4096
    """Longest sample in tokens, images included; longer rows are dropped, counted and reported."""
    min_pixels: int = 0
    """Least image area in pixels (dynamic resolution); 0: what the image processor of hf_dir says."""
    max_pixels: int = 0
    fps: float = 0.0
    """Frames of a video that the model sees, a second; 0: what the video processor of hf_dir says."""
    fps_min_frames: int = 0
    fps_max_frames: int = 0
    """Fewest and most frames of a video; 0: what the video processor of hf_dir says."""
    video_min_pixels: int = 0
    """Least area (dynamic resolution) of a frame, or with Qwen3-VL of all frames together; 0: as above."""
    video_max_pixels: int = 0
    packing: bool = False
    """True: each global batch is split into rows of equal cost, of encoder and language model, each of at most
    packing_length tokens; False: micro_batch_size samples a row, in their order."""
    packing_length: int = 0
    """Longest packed row in tokens; 0: max_length."""
    shuffle: bool = True
    index_dir: str = ""
    """Where the index of the rows is kept (token counts, image sizes, what is wrong with a row); empty: what
    `megavlm data index` has put beside the rows is used, else it is made in the run folder."""
    on_error: Literal["stop", "skip"] = "stop"
    """A row or an image that cannot be used: `stop` names it and trains nothing; `skip` leaves it out and counts it.
    With `skip` every image is decoded once when the index is made, so that none can break the run later."""
    check_images: bool = False
    """Decode every image when the index is made, also with `stop`; otherwise only headers are read."""
    dataloader_num_workers: int = 0
    """Processes of each rank that prepare microbatches ahead; 0: prepared in the rank itself when they are needed."""
    dataloader_prefetch_factor: int = 2
    """Microbatches that each worker prepares ahead."""
    image_backend: Literal["auto", "pil", "dali"] = "auto"
    """Who decodes and resizes images. auto: PIL, unless there are both CUDA and DALI. PIL's pixels are transformers';
    DALI's differ by less than 1/255 in the mean."""
    dali_device: Literal["cpu", "gpu"] = "cpu"
    """Where DALI works."""
    jpeg_draft: bool = False
    """PIL may decode a JPEG at a half, a quarter or an eighth of its size where that is no smaller than what the model
    sees: faster, but other pixels."""
    augment_crop_min_area: float = 1.0
    """Training images are cropped to a random share of their area, at least this, and resized to the size (and number
    of tokens) that the whole image has; 1: they are not."""
    augment_color_jitter: float = 0.0
    """Brightness, contrast and saturation of training images are multiplied by 1 - this to 1 + this; 0: not."""
    augment_flip_probability: float = 0.0
    """Of mirroring a training image left and right. Rows with boxes or coordinates are neither mirrored nor cropped,
    rows whose text names left or right are not mirrored; what is written IN an image nobody checks."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and which components learn how fast."""

    lr: float = 1e-5
    """Peak learning rate of the language model, and of components that set none."""
    min_lr: float = 0.0
    vit_lr: float = -1.0
    """Peak learning rate of the vision tower; negative: `lr`."""
    aligner_lr: float = -1.0
    """Peak learning rate of the projector; negative: `lr`."""
    freeze_vit: bool = False
    freeze_aligner: bool = False
    freeze_llm: bool = False
    weight_decay: float = 0.1
    """Never applied to 1-D parameters (norms, biases)."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0: not clipped."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    lr_warmup_fraction: float = 0.0
    lr_warmup_iters: int = 0
    """Set at most one of the two."""
    lr_wsd_decay_iters: int = 0
    """Steps of the final decay under WSD."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    stage: Literal["sft"] = "sft"
    micro_batch_size: int = 1
    """Samples packed into one row (without data.packing)."""
    global_batch_size: int = 8
    """Samples per optimizer step, over all data ranks."""
    train_iters: int = 0
    """Optimizer steps; 0: from num_train_epochs."""
    num_train_epochs: float = 0.0
    """Used when train_iters is 0."""
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 1234
    eval_steps: int = 0
    """Evaluate every so many steps (0: only at the end, where data.eval is set)."""
    eval_iters: int = 0
    """Microbatch rounds per evaluation (0: all of data.eval)."""
    distributed_timeout_s: int = 600


@dataclass(frozen=True)
class CheckpointConfig:
    """Native checkpoints: layout-independent, atomic."""

    save_steps: int = 0
    """Save every so many steps; 0: only at the end."""
    save_at_end: bool = True
    resume: bool = True
    """Go on from the newest complete checkpoint of the run folder, if there is one."""
    load_dir: str = ""
    """Start from this checkpoint (a step folder, or a folder of them) instead."""
    keep_last: int = 2
    """Older checkpoints are removed; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are a multiple of this are never removed; 0: no such ones."""
    keep_best: int = 0
    """So many checkpoints with the least evaluation loss are never removed, out of those whose step was evaluated."""
    async_save: bool = False
    """Training goes on while a checkpoint is written, by a thread of each rank, from a copy of the state in memory. A
    distributed optimizer's state is gathered first, which takes several times as long as the copy."""
    save_timeout_s: int = 600


@dataclass(frozen=True)
class ObserveConfig:
    """What a run says about itself."""

    log_steps: int = 1
    tensorboard: bool = True
    progress: bool = True
    report: bool = True
    """Write report.html at the end."""
    num_report_samples: int = 4
    """Held-out samples that are answered before and after training (0: none)."""
    report_max_new_tokens: int = 32
    timeline_step: int = 0
    """Record what every rank does in this optimizer step (from 1; 0: none) into timeline.json, for the report."""


@dataclass(frozen=True)
class Recipe:
    """One run."""

    name: str = "run"
    output_dir: str = "runs"
    """The run folder is output_dir/name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    @property
    def run_dir(self) -> str:
        """Where this run writes."""
        return f"{self.output_dir}/{self.name}"
