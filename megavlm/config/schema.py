"""The recipe: every knob of a run, as frozen dataclasses with their defaults.

Knobs carry the names that Megatron and ms-swift users already type. Units are in the names.
`load.py` reads a recipe from YAML, `validate.py` checks what one field alone cannot tell.
"""

from dataclasses import dataclass, field
from typing import Literal

from megavlm.config.inputs import BoxFormat
from megavlm.config.iterate import IterateConfig
from megavlm.config.mixture_knobs import CurriculumPhase, MixtureSource, MixtureTask
from megavlm.config.peft import PeftConfig
from megavlm.config.precision import Fp8Config
from megavlm.config.rope import RopeScalingConfig
from megavlm.config.stage_knobs import ContrastiveConfig, MatchingConfig, PreferenceConfig, RewardConfig, SftConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and through which kernels."""

    hf_dir: str = ""
    """Hugging Face directory that gives architecture, weights, tokenizer, template and image processor."""
    backend: Literal["torch", "flash", "te"] = "torch"
    """Layer specs: plain torch SDPA (runs anywhere), flash-attn, or Transformer Engine."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """A longer context than the model's; an exported config.json says so."""
    rope_theta: float = 0.0
    """Base of rotary frequencies; 0: the model's."""
    max_position_embeddings: int = 0
    """Context length in tokens; 0: the model's, or what rope_scaling makes of it."""
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    cross_entropy_loss_fusion: bool = False
    """Output layer and loss go through a row in pieces, forward and again backward: logits never exist whole. Any
    backend; costs the output layer's product once more."""
    cross_entropy_chunk_tokens: int = 1024
    """Tokens of such a piece."""
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
    cp_comm_type: Literal["all_gather", "p2p", "a2a"] = "all_gather"
    """How context-parallel attention moves keys and values: `p2p` is the ring (backends torch and te), `a2a` shares out
    heads instead of tokens (te). With te, `all_gather` takes Transformer Engine 2.18."""
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
    cpu_offloading: bool = False
    """Activations wait for their backward pass in CPU memory, of encoder and language model; copied to and fro without
    overlap."""
    optimizer_cpu_offload: bool = False
    """AdamW's averages and main weights are kept in CPU memory, and updated there, by Megatron-Core's hybrid optimizer;
    for bf16 and the distributed optimizer."""
    optimizer_offload_fraction: float = 1.0
    """With optimizer_cpu_offload: which part of the weights; what is left is updated on the GPU."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With optimizer_cpu_offload: a weight is updated while gradients of others are on their way to the CPU, and
    weights on their way back."""
    tp_comm_overlap: bool = False
    """Messages between tensor-parallel ranks travel while linears of the language model are computed: Transformer
    Engine's user buffers, for rows of one length (data.pad_to_packing_length), on GPUs only."""
    gradient_accumulation_fusion: bool = False
    """Gradients of weights are added to those of the step in the product itself: kernels of Transformer Engine or apex,
    on GPUs only. (On a CPU it is always so in fp32.)"""


@dataclass(frozen=True)
class TokenWeights:
    """How much each kind of token weighs in the loss; a turn's `loss_scale` and a row's weight multiply it."""

    special: float = 0.0
    """What the chat template prints of its own: markers of roles and of the end of a question, tools."""
    instruction: float = 0.0
    """Texts of system, user and tool turns."""
    response: float = 1.0
    """Answers and calls of tools, with the marker that ends them."""
    box: float = 0.0
    """On top of `response`, for coordinates in answers: `<box>...</box>`, `<|box_start|>...<|box_end|>`,
    `[x1, y1, x2, y2]`."""
    entity: float = 0.0
    """On top of `response`, for names in answers: `<ref>...</ref>`, `<|object_ref_start|>...<|object_ref_end|>`, names
    of the row's boxes, and texts that the row lists as `entities`."""


@dataclass(frozen=True)
class TokenWeightPhase(TokenWeights):
    """Weights from a point of the training on; what is left out has the default of TokenWeights."""

    from_progress: float = 0.0
    """Share of the optimizer steps that are done by then: 0 is the start, 0.5 the middle."""


@dataclass(frozen=True)
class DataConfig:
    """Rows, images and how they become batches."""

    train: tuple[str, ...] = ()
    """Training rows: JSON, JSONL, parquet and WebDataset tar files, folders of them or of `save_to_disk`, patterns."""
    mixture: tuple[MixtureSource, ...] = ()
    """Training rows by source, in place of `train`. After any number of samples each source is less than one sample
    away from its share (with mixture_tasks less than two); within a source all rows are seen before one is seen
    again."""
    mixture_temperature: float = 0.0
    """T above 0: a source's share is proportional to weight * rows ** (1 / T): 1 is by size, and the larger T is the
    more often small sources are seen; 0: proportional to weight alone."""
    mixture_tasks: tuple[MixtureTask, ...] = ()
    """When set, every source names its task, and tasks share the samples of a global batch first."""
    mixture_stop: Literal["first_exhausted", "all_exhausted", "never"] = "never"
    """What one of train.num_train_epochs is: until the first source has been seen once, or until all have (smaller ones
    several times by then); `never`: it is by the `epochs` of the sources, or train.train_iters ends the run."""
    curriculum: tuple[CurriculumPhase, ...] = ()
    """Phases of training by where they start, the first at 0; they need train.train_iters."""
    eval: tuple[str, ...] = ()
    """Held-out rows: evaluation loss, and the samples of the report."""
    image_dir: str = ""
    """Root of relative image paths; empty: the folder of the row's file."""
    root: str = ""
    """Folder that no image or video of a row may be outside of, symbolic links followed; empty: anywhere."""
    allow_remote: bool = False
    """Rows may name URLs of images and videos (s3://, gs://, https:// ...), which are read through fsspec."""
    max_row_bytes: int = 16 << 20
    """Longest row of a JSON, JSONL or tar file, pictures inside it included; longer ones are refused."""
    max_member_bytes: int = 1 << 30
    """Largest image or video inside a zip archive, unpacked, as the archive states it."""
    max_image_pixels: int = 89_478_485
    """Largest image; PIL's own limit, of which it only warns. At most twice as much."""
    caption_prompt: str = "Describe the image."
    """The question that a caption answers, where a WebDataset shard has nothing but captions (`.txt`)."""
    frames_fps: float = 2.0
    """Frames a second of videos that rows give as lists of pictures."""
    box_format: BoxFormat = ""
    """How `objects` of rows are written. `qwen_tokens_1000`: <|box_start|>(x1,y1),(x2,y2)<|box_end|>, thousandths of
    the image's sides (Qwen2-VL); `qwen_tokens_pixels`: the same in pixels of the image as the model sees it;
    `json_1000` (Qwen3-VL) and `json_pixels` (Qwen2.5-VL): {"bbox_2d": [x1, y1, x2, y2], "label": ...}; `numbers`:
    [x1, y1, x2, y2] as in the row; `bin_tokens_1000`: <|box_start|><|x1|><|y1|><|x2|><|y2|><|box_end|>, a token a
    coordinate, which `megavlm add-tokens --coordinates` gives a model; `grid_tokens_32` (Kosmos-2): a token for each of
    the cells, out of 32 x 32, of two corners, which `megavlm add-tokens --grid` does. Empty: `objects` are refused."""
    max_length: int = 4096
    """Longest sample in tokens, images included."""
    too_long: Literal["drop", "cut_turns", "cut_answer", "stop"] = "drop"
    """What becomes of longer rows; all are counted and reported. `cut_turns`: whole questions with their answers are
    left out from the end, and with nothing left the row is dropped. `cut_answer`: the same, but the answer that the
    limit falls into is kept up to there. `stop`: it is an error."""
    template: str = ""
    """Chat template: chatml, vicuna, llama2, llava_plain, document, or the path of a .jinja file; empty: that of
    hf_dir. An exported directory gets it."""
    token_weights: TokenWeights = field(default_factory=TokenWeights)
    token_weight_schedule: tuple[TokenWeightPhase, ...] = ()
    """Instead of token_weights: weights that change during training, e.g. from everything to answers alone."""
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
    pad_to_packing_length: bool = False
    """Every packed row is filled up to that length, rounded up to what the layout asks for, by tokens without weight:
    for kernels that want rows of one length."""
    shuffle: bool = True
    group_by: str = ""
    """Key of the rows, as `prompt_id`: rows of one source with the same value stay together in a step, a microbatch, a
    pack. Groups are of one size; those of another are an error, and with on_error=skip left out. Empty: no groups."""
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
    sees: two to four times as fast with large photographs; pixels differ by 1 to 3 of 255 in the mean."""
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
    vit_layer_decay: float = 1.0
    """Layer d from the top of the vision tower has the rate `vit_lr` x this ** d: d is 1 for the last layer, 2 for the
    one before, and largest for embeddings; 0 only for what lies above the layers (BEiT's rule). 1: all learn alike."""
    llm_layer_decay: float = 1.0
    """The same for the language model; a tied output layer learns as the embedding that it is."""
    unfreeze: str = ""
    """What begins to learn when, e.g. `0: projector; 0.1: vision[-2:]; 0.3: vision; 2000: language`: with a decimal
    point a share of the run, otherwise optimizer steps; layers as in peft.components, also from the end. Until then
    weights stay as they are, and their gradients count nowhere; they are computed all the same. Empty: all from 0."""
    unfreeze_warmup_iters: int = 0
    """Over so many steps the rate of what is unfrozen later rises to that of the schedule."""
    clip_grad: float = 1.0
    """Gradient norm is clipped to this; 0: not clipped."""
    clip_grad_by: Literal["total", "component", "layer"] = "total"
    """Whose norm: of all gradients together; of each component (vision tower, projector, language model); or of each
    layer, and of the rest of each component."""
    vit_clip_grad: float = -1.0
    """By component or layer: the vision tower's limit, and the projector's; negative: `clip_grad`."""
    aligner_clip_grad: float = -1.0
    loss_scale: float = 0.0
    """With fp16: the loss is multiplied by this, and gradients divided by it again; 0: by a scale that is halved when
    gradients overflow (the step is then skipped), and doubled after loss_scale_window steps without."""
    initial_loss_scale: float = 65536.0
    """Far less than Megatron's 2 ** 32: a loss here is a sum over tokens, and its gradients are divided afterwards."""
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2
    """Overflows that are let pass before the scale is halved."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    lr_warmup_fraction: float = 0.0
    lr_warmup_iters: int = 0
    """Set at most one of the two."""
    lr_wsd_decay_iters: int = 0
    """Steps of the final decay under WSD."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    stage: Literal["sft", "rm", "prm", "dpo", "cpo", "simpo", "orpo", "kto", "contrastive", "matching"] = "sft"
    """Training method. sft: answers are learned (also captions, in pretraining); rm: a reward model; prm: a reward
    model of steps; dpo, cpo, simpo, orpo: from pairs of answers; kto: from answers that are marked good or bad;
    contrastive: embeddings of images and texts; matching: these, and whether a text belongs to images."""
    micro_batch_size: int = 1
    """Samples packed into one row (without data.packing)."""
    global_batch_size: int = 8
    """Samples per optimizer step, over all data ranks."""
    train_iters: int = 0
    """Optimizer steps; 0: from num_train_epochs."""
    num_train_epochs: float = 0.0
    """Used when train_iters is 0."""
    precision: Literal["fp32", "bf16", "fp16", "fp8", "fp8_emulated"] = "bf16"
    """fp16 scales the loss (see optimizer.loss_scale). fp8 is bf16 with linear layers in FP8 as `fp8` says, through
    Transformer Engine; fp8_emulated rounds their operands to the same FP8 numbers on any machine, and multiplies
    these in fp32: for what a recipe does to the loss, not for speed."""
    seed: int = 1234
    eval_steps: int = 0
    """Evaluate every so many steps (0: only at the end, where data.eval is set)."""
    eval_iters: int = 0
    """Microbatch rounds per evaluation (0: all of data.eval)."""
    early_stopping_patience: int = 0
    """Stop after so many evaluations in a row without a lower loss on the held-out rows; 0: never. The checkpoint with
    the least loss is kept with checkpoint.keep_best, where checkpoints are saved when evaluations are made."""
    early_stopping_threshold: float = 0.0
    """By how much a loss has to be lower than the lowest before."""
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
    """Training goes on while a checkpoint is written, by a thread of each rank, from a copy of the state in memory.
    Each rank copies what it holds; a distributed optimizer's state is not gathered either."""
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
    description: str = ""
    """What the run is for, in a sentence or two; its report says it."""
    output_dir: str = "runs"
    """The run folder is output_dir/name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    iterate: IterateConfig = field(default_factory=IterateConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    gpu: str = ""
    """What the layout is meant for: h100, h200, b200, or a hardware file. Read by `make check-recipes`, which shows
    that it fits."""

    @property
    def run_dir(self) -> str:
        """Where this run writes."""
        return f"{self.output_dir}/{self.name}"
