"""One worker of runs over a small UNet and two small text encoders, shared in several ways.

Arguments: FOLDER STEPS, then the runs as STRATEGY[@WITHIN]:PRECISION:ACCUMULATION[:OBJECTIVE], or `rates` in place of
an objective, for parameters with learning rates and weight decays of their own, some of them frozen; or `moved`, for
activations of every second block in the host's memory, others recomputed beside them. `zero2+` exchanges
gradients in each pass, `@2` spreads over two workers at a time. Of each, rank 0 saves losses and whole weights under
that name into FOLDER. The weights of the start and the 12 images of each step are the same for any number of workers.
"""

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.config.schema import Config, OptimizerConfig
from trainer.data.loader import Batch
from trainer.diffusion.importance import BINS, LossHistory
from trainer.diffusion.losses import absolute, huber, snr_delta
from trainer.diffusion.masking import area_mean
from trainer.diffusion.noise import Draws, NoiseRecipe
from trainer.diffusion.objective import Objective, taught
from trainer.diffusion.prediction import edm, epsilon, flow, v_prediction
from trainer.diffusion.timesteps import beta, laplace, logit_normal, stratified
from trainer.diffusion.uncertainty import LearnedWeights
from trainer.diffusion.weighting import min_snr, p2, soft_min_snr
from trainer.model.denoiser import Denoiser, TrainedModel, image_losses
from trainer.model.freeze import never_used, original_unet_names
from trainer.model.recompute import apply_recompute, embeddings, gathered_units, repeated_blocks
from trainer.model.selection.model_blocks import text_encoder_blocks, unet_blocks
from trainer.model.selection.weight_rates import PartNames, weight_rates
from trainer.model.text import TextEncoders
from trainer.optim.hosted import hosted_activations
from trainer.optim.hosted.hosted_activations import HostedActivations
from trainer.optim.optimizers import make_optimizer
from trainer.optim.precision import precision_of, set_fp32_arithmetic
from trainer.parallel.comm import Comm, close, init_comm
from trainer.parallel.sharding import copy_share
from trainer.parallel.strategy import Sharing, Strategy, make_strategy, warm_up
from trainer.parallel.worker import end_process
from trainer.train.build import optimizer_for
from trainer.train.step import StepParts, all_alike, by_loss_weight, train_step
from trainer.train.step_companions import meeting_of

IMAGES = 12  # of a step
LR = 1.5e-6  # a usual one: AdamW turns rounding of a gradient near zero into a step of up to this
LEARNERS = ("importance", "learned")
_PLAIN = Objective(epsilon())
# Between them, what can hang on how a step is cut.
OBJECTIVES = {
    "flow": Objective(flow(3.0), logit_normal(0.0, 1.0), stratified, loss=absolute, noise=NoiseRecipe(candidates=3)),
    "v": Objective(
        v_prediction(with_zero_terminal_snr=True),
        laplace(v_prediction().log_snr, 0.0, 1.0),
        weigh=min_snr(5.0),
        loss=huber,
        delta=snr_delta(0.1),
    ),
    "noises": Objective(
        epsilon(),
        beta(2.0, 1.0, 0.1, 0.9),
        stratified,
        p2(1.0, 1.0),
        noise=NoiseRecipe(offset=0.05, offset_probability=0.5, pyramid_levels=3, perturbation=0.1),
    ),
    "edm": Objective(edm(), weigh=soft_min_snr(5.0)),
    "companions": Objective(flow(2.0), pairs=True, contrast=0.05),
    "masked": Objective(epsilon(), mean=area_mean(0.1)),
    "loss_weights": Objective(epsilon(), spread=stratified),  # and images that count more or less
    "rates": Objective(epsilon()),
    "moved": Objective(epsilon()),
}

RATES = {
    "unet": {
        "lr_scale": {"attn2": 0.5, "mid_block": 20.0, "down_blocks.0": 0, "conv_in.bias": 0},
        "layer_decay": 0.9,
        "weight_decay": 0.1,
        "weight_decay_scale": {"ff": 0.5},
    },
    "text_encoder_1": {"train": True, "only": ["mlp"], "layer_decay": 0.8},
    "text_encoder_2": {"train": True, "lr": 3 * LR, "freeze": ["embeddings"]},
}
RATED = Config.model_validate(
    {
        "run": {"dir": "run"},
        "model": {"path": "model"},
        "data": {"sources": [{"path": "."}], "prepared": "prepared"},
        "optimizer": {"lr": LR, "decay_norms_and_biases": False},
        "trainable": RATES,
    }
)


def learning(name: str) -> Objective:
    """With a learner of its own, which is not at its start."""
    if name == "learned":
        return taught(Objective(v_prediction()), LearnedWeights(lr=0.1))
    history = LossHistory()
    squares = [(1 + part % 7 + part / 20) ** 2 for part in range(BINS)]
    history.take_up({"counts": [20.0] * BINS, "squares": squares})
    return taught(Objective(epsilon(), history.positions, stratified), history)


_TEXT = {"vocab_size": 64, "max_position_embeddings": 77, "num_attention_heads": 2}
_TEXT |= {"bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63}


def small_model(with_text: bool) -> TrainedModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[1, 2],
        cross_attention_dim=40,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    encoders = None
    if with_text:
        one = CLIPTextConfig(**_TEXT, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        two = CLIPTextConfig(**_TEXT, hidden_size=24, intermediate_size=48, num_hidden_layers=2, projection_dim=20)
        encoders = TextEncoders(CLIPTextModel(one), CLIPTextModelWithProjection(two))
    model = TrainedModel(unet, encoders)
    if encoders:
        unused = never_used([name for name, _ in encoders.one.named_parameters()], 2)
        for name, parameter in encoders.one.named_parameters():
            parameter.requires_grad_(name not in unused)
    return model


def image(number: int) -> dict[str, Tensor]:
    """One image's row of a batch; all that is random is its own."""
    generator = torch.Generator().manual_seed(number)
    return {
        "latents": (torch.randn(4, 8, 8, generator=generator) * 7).half(),
        "input_ids": torch.randint(63, (2, 1, 77), generator=generator),
        "text_hidden": torch.randn(77, 40, generator=generator).half(),
        "pooled": torch.randn(20, generator=generator).half(),
        "time_ids": torch.tensor([1024.0, 768, 0, 0, 1024, 1024]),
        "weights": torch.tensor(1.0),
        "draw_seeds": torch.tensor(number),
        "masks": torch.randint(256, (8, 8), generator=generator, dtype=torch.uint8) * (number % 3 > 0),
        "loss_weights": torch.tensor([0.25, 1.0, 3.0][number % 3]),
    }


def batch_of(numbers: list[int], with_text: bool) -> Batch:
    rows = [image(number) for number in numbers]
    columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    absent = {"text_hidden": None, "pooled": None} if with_text else {"input_ids": None}
    return Batch(**{**columns, **absent}, pixels=None, vae_seeds=None, keys=tuple(map(str, numbers)), problems=())


def main() -> None:
    folder, steps, *runs = sys.argv[1:]
    comm = init_comm(timeout_s=1200)
    for name in runs:
        kind, precision, accumulation, *objective = name.split(":")
        wish = objective[0] if objective else ""
        objective = learning(wish) if wish in LEARNERS else OBJECTIVES.get(wish, _PLAIN)
        run(comm, kind, precision, int(accumulation), int(steps), Path(folder) / f"{name}.safetensors", objective)
    close(comm)
    end_process()


def start_weights(with_text: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = small_model(with_text)
    with torch.no_grad():  # else the output, and with it most gradients, are nearly zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def run(
    comm: Comm, kind: str, precision_name: str, accumulation: int, steps: int, out: Path, objective: Objective
) -> None:
    with_text = True
    precision, weights = precision_of(precision_name), start_weights(with_text)
    set_fp32_arithmetic(precision_name)  # on CUDA, convolutions are TF32's otherwise
    with init_empty_weights():
        model = small_model(with_text).to(precision.weights)

    if objective is OBJECTIVES["rates"]:
        rate(model)
    hosted = move(model, comm.device) if objective is OBJECTIVES["moved"] else None

    def fill(empty: nn.Module) -> None:
        for name, parameter in empty.named_parameters():
            copy_share(parameter, weights[name])

    dtype = precision.compute if kind.startswith("zero") and precision.autocast else None
    kind, _, within = kind.partition("@")
    each, groups = kind.endswith("+"), int(within) if within else None
    sharing = Sharing(kind.rstrip("+"), dtype, dtype, each, accumulation, within=groups)  # type: ignore[arg-type]
    strategy = make_strategy(model, sharing, gathered_units(model).values(), embeddings(model).values(), comm, fill)
    autocast = None if dtype else precision.autocast
    denoiser = Denoiser(model.train(), objective, None, None, 0.13025, dtype or precision.weights, autocast)
    optimizer = make_optimizer(strategy.parameters, OptimizerConfig(lr=LR))
    if model.rates:
        optimizer = optimizer_for(RATED, strategy, comm, model.rates)
    weigh, meet = by_loss_weight if objective is OBJECTIVES["loss_weights"] else all_alike, meeting_of(objective, comm)
    parts = StepParts(comm, strategy, optimizer, denoiser, max_grad_norm=1.0, weigh=weigh, meet=meet)
    warm_up(strategy, lambda wrapped: throw_away_loss(denoiser, wrapped, with_text, comm.device))
    losses = [take_step(parts, comm, step, accumulation, with_text) for step in range(steps)]
    # What travels hangs on the sharing, not on the objective; reading what was watched takes longer than the step.
    watches = comm.rank == 0 and comm.world > 1 and (objective is _PLAIN or objective is OBJECTIVES["rates"])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) if watches else nullcontext() as watched:
        take_step(parts, comm, steps, accumulation, with_text)
    assert hosted is None or (hosted.moved_bytes and all(hosted.moved_bytes.values())), "nothing has moved"
    trained = json.dumps([*strategy.parameters])
    told = {
        "losses": json.dumps(losses),
        "trained": trained,
        "traffic": json.dumps(traffic(watched)) if watched else "",
    }
    save(strategy, model, comm, out, told | {"trained": trained})


def move(model: TrainedModel, device: torch.device) -> HostedActivations:
    """Also of tensors as small as this model's."""
    hosted_activations.SMALLEST_BYTES = 256
    blocks = repeated_blocks(model)
    apply_recompute(model, [*blocks][1::4])
    return HostedActivations(blocks, [*blocks][::2], device)


def rate(model: TrainedModel) -> None:
    """Let parameters train as `RATES` says."""
    for part in RATES:
        module = getattr(model, part)
        names = [name for name, _ in module.named_parameters()]
        original = original_unet_names(dict(model.unet.config)) if part == "unet" else {}
        blocks = unet_blocks(names, original) if part == "unet" else text_encoder_blocks(names, 2)
        unused = never_used(names, 2) if part == "text_encoder_1" else ()
        rates = weight_rates(getattr(RATED.trainable, part), PartNames(part, names, blocks, original, unused))
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in rates)
        model.rates |= {f"{part}.{name}": found for name, found in rates.items()}


def throw_away_loss(denoiser: Denoiser, wrapped: nn.Module, with_text: bool, device: torch.device) -> Tensor:
    row = batch_of([0], with_text).to(device)
    names = {"input_ids": row.input_ids} if with_text else {"text_hidden": row.text_hidden, "text_pooled": row.pooled}
    text = {name: value if name == "input_ids" else value.float() for name, value in names.items() if value is not None}
    zeros = torch.zeros(1, 4, 8, 8, device=device)
    mixture = denoiser.objective.prediction.mix(torch.zeros(1, dtype=torch.float64)).to(device)
    objective = Objective(denoiser.objective.prediction)
    return image_losses(denoiser, wrapped, zeros, Draws(zeros), mixture, text, row.time_ids, objective).mean()


def take_step(parts: StepParts, comm: Comm, step: int, accumulation: int, with_text: bool) -> float:
    numbers = list(range(step * IMAGES, (step + 1) * IMAGES))[comm.rank :: comm.world]
    size = len(numbers) // accumulation
    batches = [batch_of(numbers[i * size : (i + 1) * size], with_text) for i in range(accumulation)]
    return train_step(parts, batches, accumulation, float(IMAGES), 1.0, False).loss


def traffic(watched: profile) -> dict[str, int]:
    """Elements that went into gloo's collectives, by kind; of a gather, those that came out."""
    counts = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0}
    inputs = {"gloo:all_reduce": ("all_reduce", 0), "c10d::_allgather_base_": ("all_gather", 0)}
    inputs |= {"c10d::_reduce_scatter_base_": ("reduce_scatter", 1)}
    for event in watched.events() or ():
        if event.name in inputs:
            kind, argument = inputs[event.name]
            counts[kind] += math.prod(event.input_shapes[argument])
    counts["all_reduce"] -= counts["reduce_scatter"]  # gloo does the one by the other
    return counts


def save(strategy: Strategy, model: nn.Module, comm: Comm, out: Path, told: dict[str, str]) -> None:
    named = dict(model.named_parameters())
    wholes = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named.items()}  # all workers must ask
    whole = {name: tensor.detach().cpu().clone() for name, tensor in wholes.items()}
    if comm.rank == 0:
        save_file(whole, out, metadata=told)


main()
