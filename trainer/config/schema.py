"""Every knob of a run: typed, frozen, and documented where it is declared.

A field's docstring is the only place its meaning is written: `sdxl-train schema`, editor help and
`docs/config.md` are generated from it. Values are strict (no silent conversion); rules that need two
fields live in `rules.py`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from trainer.config.sections.adapter_config import AdapterConfig
from trainer.config.sections.checkpoint_config import CheckpointConfig
from trainer.config.sections.data.captions_config import CaptionsConfig
from trainer.config.sections.data.filters_config import FiltersConfig
from trainer.config.sections.data.sources import Source
from trainer.config.sections.ema_config import EmaConfig
from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.config.sections.guard_config import GuardConfig
from trainer.config.sections.launch_config import LaunchConfig
from trainer.config.sections.limits_config import LimitsConfig
from trainer.config.sections.log_config import LogConfig
from trainer.config.sections.new_tokens_config import NewTokensConfig
from trainer.config.sections.notify_config import NotifyConfig
from trainer.config.sections.objective_config import ObjectiveConfig
from trainer.config.sections.optimizer_config import OptimizerConfig
from trainer.config.sections.samples_config import SamplesConfig
from trainer.config.sections.trainable_config import TrainableConfig
from trainer.config.values import (
    Count,
    Flag,
    Fraction,
    FrozenWeights,
    ModelField,
    PathField,
    PositiveInt,
    Section,
    Seed,
    Size,
    yes_no_or_path,
)


class RunConfig(Section):
    dir: PathField
    """Where everything this run writes goes: checkpoints, metrics, samples, logs."""
    on_local_disks: bool = False
    """Of a run on several hosts: `dir` is a directory of its own on each, and not one that all of them see. Each gets
    whole checkpoints, and any of them can go on alone. See `docs/hosts.md`. Nothing changes on one host."""
    seed: Seed = 0
    """Seed of the data order, the noise and the timesteps. The same seed gives the same run."""
    resume: Annotated[
        bool | str, BeforeValidator(yes_no_or_path, json_schema_input_type=bool | Literal["auto"] | str)
    ] = "auto"
    """`auto`: go on from the newest complete checkpoint in `run.dir`, or start fresh if there is none.
    `true`: the same, but none is an error. `false`: start fresh; an existing run in the directory is an
    error. A path: start from that checkpoint, of this run or another; later checkpoints of the run are moved aside,
    and the same command, given again, goes on from what the run has written since."""


class ModelConfig(Section):
    path: ModelField
    """The SDXL model: a single `.safetensors` file, a folder in diffusers' layout, a `.ckpt` that holds nothing but
    tensors, or the id of a model on the Hugging Face hub. See `docs/models.md`."""
    vae: PathField | None = None
    """A VAE (a folder, or a single file) to use in place of `model.path`'s, such as the fp16-fix VAE."""
    tokenizer: PathField | None = None
    """A folder with CLIP's `vocab.json` and `merges.txt`, or a model folder with tokenizers. Default: those of
    `model.path`; of a single file, which has none, CLIP's in the hub's cache."""
    latent_scale: Annotated[float, Field(gt=0)] | None = None
    """What the UNet sees is (latents - `latent_shift`) * `latent_scale`. Default: the VAE's own scaling factor, 0.13025
    of SDXL's; a UNet that was trained for a VAE with other latents has its own numbers."""
    latent_shift: float | None = None
    """Subtracted from the latents before they are scaled. Default: the VAE's own shift factor, 0 of SDXL's."""
    text_projection: Literal["correct", "kohya"] = "correct"
    """How a single file holds the second text encoder's projection: `correct` as SDXL was published, `kohya` as kohya's
    scripts take it, without transposing it; only to go on with a file that was trained by them."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the VAE. SDXL's original VAE overflows in fp16: use `fp16` with the fp16-fix only."""
    text_encoder_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision in which the frozen text encoders are held and run."""
    frozen_weights: FrozenWeights = "compute"
    """How the weights below an adapter, or below new tokens that train alone, are held: `compute` in the precision of
    the passes; `int8` and `nf4` in 8.5 and 4.5 bits each (linear layers and convolutions; bitsandbytes, from the extra
    `quantized`), unpacked layer by layer in each pass. See `docs/adapters.md`."""


class ResolutionConfig(Section):
    resolution: PositiveInt
    """Pixels on the side of the square bucket; less than that of `data.buckets`, whose rules hold here as well, with
    `min_px` and `max_px` reduced in proportion."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Part of an epoch's images that is seen at this resolution in place of the main one, another part in each epoch.
    Default: all of them are, beside the main one, as one image more."""


class BucketConfig(Section):
    resolution: PositiveInt = 1024
    """Pixels on the side of the square bucket; all buckets have at most this area."""
    min_px: PositiveInt = 256
    """Shortest side of any bucket, in pixels."""
    max_px: PositiveInt = 2048
    """Longest side of any bucket, in pixels."""
    step_px: PositiveInt = 64
    """Bucket sides are multiples of this, in pixels; a multiple of 8."""
    no_upscale: Flag = False
    """Never enlarge an image: smaller ones get a bucket of their own size, rounded down to `step_px`."""
    also_at: list[ResolutionConfig] = []
    """Further resolutions at which the images to train on are held, each encoded once. May change at any time; what
    is held is not encoded again. Images whose latents come with the sources stay at their one resolution."""


class AugmentConfig(Section):
    flip_probability: Fraction = 0.0
    """Chance that a visit sees the image mirrored left to right; its crop coordinates are mirrored as well. With
    stored latents only those in `.npz` files that hold `latents_flipped` can be, and not after `prepare --repack`."""
    random_crop: Flag = False
    """Crop anywhere in the resized image, anew at each visit, in place of its centre; the crop coordinates
    that SDXL is conditioned on say where."""


class DataConfig(Section):
    sources: Annotated[list[Source], Field(min_length=1)]
    """Where the images come from; any number of entries, of any types."""
    prepared: PathField
    """Folder of the prepared data set (latents in shards). Made by `prepare`, or on the first start."""
    look_at_start: Flag = False
    """Look through the sources at each start of a training, as `prepare` does, and not only at the first and where
    `data.sources` has changed. Not under torchrun and SLURM."""
    mode: Literal["latents", "images"] = "latents"
    """`latents`: the VAE encodes each image once, in `prepare`. `images`: `prepare` only lists the images; each is
    decoded anew whenever it is seen and the VAE runs in every step, which costs time and allows `data.augment`."""
    augment: AugmentConfig = AugmentConfig()
    """What is drawn anew each time an image is seen. Needs `data.mode: images`, but for mirrored `.npz` latents."""
    buckets: BucketConfig = BucketConfig()
    """Aspect-ratio buckets."""
    filters: FiltersConfig = FiltersConfig()
    """Which images are left out. May change at any time: nothing is encoded that was encoded before."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images held out for the validation loss, chosen by a hash of each image's key."""
    rows_per_shard: PositiveInt = 2048
    """Images in one shard file."""
    cache_text: Flag = False
    """Store the text encoders' outputs with the latents (about 320 KB an image in real SDXL) in place of
    running the frozen encoders in each step."""
    vae_batch_size: PositiveInt = 4
    """Images of the square bucket that a worker encodes at once, in `prepare` or with `mode: images` in each step."""
    workers: Count = 2
    """CPU processes per training worker that read and assemble batches; 0 reads in threads of the
    training process. In `prepare`, threads per worker that decode images, at least 2."""
    prefetch_batches: PositiveInt = 4
    """Batches kept ready per training worker."""
    max_bad_fraction: Fraction = 1e-3
    """The run ends when more than this share of the latest images could not be read (a damaged row, a drive that
    fails); they are listed in `bad.jsonl` in `run.dir`. Not judged before 1,000 images."""


class TrainConfig(Section):
    steps: PositiveInt | None = None
    """Optimizer steps of the whole run. Give this or `train.epochs`."""
    epochs: PositiveInt | None = None
    """Passes over the data of the whole run. Give this or `train.steps`."""
    batch_size_per_gpu: PositiveInt = 1
    """Images in one forward and backward pass of one worker."""
    batch_by_area: Flag = False
    """Give buckets of small images larger batches: a bucket of 1/n of the area of `data.buckets.resolution`^2 takes n
    times as many images in each pass and in each step, n being a whole number up to 16. Helps with
    `data.buckets.no_upscale` and `also_at`; without them, nearly all buckets are of the same area."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forward and backward passes per optimizer step. Default 1, or what `global_batch_size` needs."""
    global_batch_size: PositiveInt | None = None
    """Images per optimizer step over all workers; the accumulation follows from it. Unlike
    `gradient_accumulation_steps`, it keeps the run the same when the number of workers changes."""
    precision: Literal["bf16", "bf16_stochastic", "bf16_kahan", "fp16", "fp32"] = "bf16"
    """`bf16`: bf16 arithmetic on fp32 weights. `bf16_stochastic`, `bf16_kahan`: the weights are bf16 as well, and
    updates too small for them are not lost: they are rounded at random in proportion, or what is cut off is kept in a
    second bf16 (Kahan). `fp16`: for cards without bf16, with a loss scale. `fp32`. Plain bf16 weights are not offered:
    rounding to the nearest loses nearly all of each update."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks`: torch.compile for each kind of block of the UNet and of text encoders that train. The first steps wait
    for the compiler, some minutes at SDXL's size; `sdxl-train bench --compile` says whether it is faster."""
    channels_last: Flag = False
    """Convolutions compute in the memory layout NHWC; `benchmarks/gpu.sh` measures whether it pays."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off."""
    adaptive_clip: Annotated[float, Field(ge=0)] = 0.0
    """Before that, the gradient of each row and filter is scaled down to this share of the norm of its weights
    (adaptive gradient clipping), 0.01 being usual; 0 turns it off. A few wild units then do not slow all others."""


class LrScheduleConfig(Section):
    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up: `constant`, or down to `final_ratio` at the last step along a line or a
    half cosine."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises linearly from 0."""
    final_ratio: Fraction = 0.0
    """Learning rate at the last step as a share of `optimizer.lr` (`linear` and `cosine`)."""


class ValidationConfig(Section):
    every_steps: Count = 0
    """Optimizer steps between validations; 0 turns them off. Needs `data.validation_fraction`."""
    timesteps: Annotated[list[Annotated[int, Field(ge=0, le=999)]], Field(min_length=1)] = [100, 300, 500, 700, 900]
    """Timesteps at which every held-out image is scored, with noise fixed by its key."""
    max_images: PositiveInt = 256
    """Held-out images that are scored, at most."""
    train_images: Literal["auto"] | Count = "auto"
    """Images that are trained on and scored as held-out ones are, to see how far both part; 0: none. `auto`: as many,
    before the first step, and later where that keeps to `max_time_share`."""
    max_time_share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Part of the run's time that validation may cost; where it costs more, a line says with which `every_steps` it
    would not. 1: never."""


class MemoryConfig(Section):
    budget: Size = "auto"
    """What a worker may use of its card, such as `23GiB`; the rest of this section follows from it. `auto`: what is
    free on the card at the start, less 0.25 GiB; on the CPU, nothing limits it."""
    strategy: Literal["auto", "ddp", "zero2", "zero3"] = "auto"
    """How several workers share the model. `ddp`: each holds all of it and all optimizer state. `zero2` (FSDP2):
    weights, gradients and optimizer state are spread over the workers; each computes on a whole copy in the precision
    of the passes. `zero3`: that copy is spread as well, and fetched block by block. One worker holds everything.
    `auto`: the fastest that fits; on the CPU without a budget, `ddp`."""
    shard_within: Literal["all", "host"] | Annotated[int, Field(ge=2)] = "all"
    """Over how many workers `zero2` and `zero3` spread. `all`: over all of them. `host`: over those of one host, and
    each host has the whole model (HSDP): only gradients cross the link between hosts, once a step, at the price of
    memory; see `docs/hosts.md`. A number: over so many, which must divide all workers."""
    recompute: Literal["auto", "none", "all"] = "auto"
    """Blocks whose activations are computed again in the backward pass: less memory, up to a third more time. `auto`:
    as few as fit."""
    offload_activations: Literal["auto", "some"] | Flag | PositiveInt = "auto"
    """Activations wait in the host's memory for the backward pass. `some`: those of as many blocks as cost less time
    than recomputing others, by the plan, also if copies take twice as long as it assumes; they are copied while others
    compute. A number: of so many blocks, of those that are not recomputed and not among the last of a pass. `true`: all
    that is kept, which nothing hides. `auto`: all, where nothing else fits."""
    link_gb_s: Annotated[float, Field(gt=0, le=10_000)] = 12.0
    """GB/s that a card copies to the host's memory, and as much back at the same time, with which `offload_activations`
    counts: 12 is PCIe 3.0 x16, 24 PCIe 4.0 x16."""
    release_gradients: Flag = False
    """Update each block of the model as its gradients arrive in the backward pass, so that they never exist all at
    once; `train.max_grad_norm` is then of each block's gradients. For one worker without accumulation."""
    offload_optimizer: Literal["auto"] | Flag = "auto"
    """The optimizer's state lies in the host's memory, and comes to the card block by block for its update. Needs
    `release_gradients`. `auto`: with it, where nothing else fits."""
    offload_weights: Literal["auto"] | Flag = "auto"
    """The weights of the transformer and residual blocks lie in the host's memory too, and come to the card block by
    block to compute; all blocks are recomputed then. Needs `release_gradients`, and `offload_optimizer` not to be
    `false`. `auto`: with it, where nothing else fits, and nothing forbids it."""


class Config(Section):
    """One run of sdxl-train."""

    run: RunConfig
    """The run directory, the seed, and how to go on."""
    launch: LaunchConfig = LaunchConfig()
    """Worker processes on this host."""
    model: ModelConfig
    """The SDXL model to start from."""
    data: DataConfig
    """Images, captions, buckets and how they are read."""
    captions: CaptionsConfig = CaptionsConfig()
    """From captions and tags to the text of each draw; all of it is a function of seed, epoch and image."""
    trainable: TrainableConfig = TrainableConfig()
    """What of the model trains, how fast and when. The VAE is always frozen. See `docs/what_trains.md`."""
    adapter: AdapterConfig = AdapterConfig()
    """A LoRA or one of its kin in place of the weights themselves; see `docs/adapters.md`."""
    new_tokens: NewTokensConfig = NewTokensConfig()
    """Words of your own with vectors that train in both text encoders (textual inversion), beside all else or alone;
    see `docs/new_tokens.md`."""
    train: TrainConfig = TrainConfig()
    """Length, batch and precision."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is predicted, at which noise levels, and how errors count; see `docs/objectives.md`."""
    optimizer: OptimizerConfig
    """AdamW."""
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    """The learning rate as a function of the step."""
    ema: EmaConfig = EmaConfig()
    """Running averages of the weights; off where `ema.averages` is empty. See `docs/ema.md`."""
    guard: GuardConfig = GuardConfig()
    """What is done about numbers that cannot be right; see `docs/reliability.md`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When weights and training state are saved."""
    validation: ValidationConfig = ValidationConfig()
    """The loss on held-out images."""
    samples: SamplesConfig = SamplesConfig()
    """Images drawn while training, and by `sample` and `eval`; see `docs/samples.md`."""
    memory: MemoryConfig = MemoryConfig()
    """What is held where."""
    exchange: ExchangeConfig = ExchangeConfig()
    """How gradients travel between workers that each hold the whole model; see `docs/wire.md`."""
    log: LogConfig = LogConfig()
    """Records of the run."""
    notify: NotifyConfig = NotifyConfig()
    """Messages to whoever is away; see `docs/tracking.md`."""
    limits: LimitsConfig = LimitsConfig()
    """What is read of files from outside; see `docs/untrusted-files.md`."""
