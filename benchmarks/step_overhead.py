"""What our step costs beyond the bare arithmetic, and what the start costs beyond imports and weights.

    python benchmarks/step_overhead.py configs/tiny.yaml [section.key=value ...]

Prints CPU seconds (they are steady where wall time is not) of:
  - an optimizer step of the training loop (data order, reading, checksums, text, noise, reduction, clipping, AdamW)
    against UNet forward + backward + AdamW on tensors in memory, in turns within one process;
  - everything before the first step, command included, against importing torch, diffusers and transformers and
    loading the same weights.
The data set must be prepared (`sdxl-train prepare CONFIG`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS, STEPS = 7, 4
SCRATCH = Path(tempfile.gettempdir()) / f"step-overhead-{os.getpid()}"


def main() -> None:
    """Print both comparisons as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--part", choices=["ours-start", "bare-start", "steps"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    overrides = [*arguments.overrides, "launch.workers=1"]
    if arguments.part:
        part = {"ours-start": ours_start, "bare-start": bare_start, "steps": steps}[arguments.part]
        print(json.dumps(part(arguments.config, overrides)))
        return
    steps_found = run_part("steps", arguments.config, overrides)
    print(f"CPU seconds per optimizer step, medians of {ROUNDS} rounds of {STEPS} steps each")
    print(f"  bare UNet forward + backward + AdamW   {steps_found['bare']:.4f}")
    print(f"  our training step                      {steps_found['ours']:.4f}")
    print(f"  ratio (median of the rounds' ratios)   {steps_found['ratio']:.3f}")
    print("CPU seconds before the first step, medians of 3 runs")
    starts = {name: median_of_3(name, arguments.config, overrides) for name in ("bare-start", "ours-start")}
    print(f"  import torch, diffusers, transformers; load the weights   {starts['bare-start']:.2f}")
    print(f"  sdxl-train, up to its first step                          {starts['ours-start']:.2f}")
    extra_s = starts["ours-start"] - starts["bare-start"]
    print(f"  difference                                                {extra_s:+.2f}")


def run_part(name: str, config: Path, overrides: list[str]) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, str(config), *overrides, "--part", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def median_of_3(name: str, config: Path, overrides: list[str]) -> float:
    """Median CPU seconds of a start."""
    return statistics.median(run_part(name, config, overrides)["cpu_s"] for _ in range(3))


def bare_start(config_path: Path, overrides: list[str]) -> dict[str, float]:
    """What nobody can do without: the libraries and the weights."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.set_num_threads(1)
    cpu_s = time.process_time()
    from trainer.config.load import load_config

    config = load_config(config_path, overrides)
    begin = time.process_time()
    path = config.model.path
    UNet2DConditionModel.from_pretrained(path / "unet", local_files_only=True)
    if not config.data.cache_text:
        CLIPTextModel.from_pretrained(path / "text_encoder", local_files_only=True)
        CLIPTextModelWithProjection.from_pretrained(path / "text_encoder_2", local_files_only=True)
    return {"cpu_s": cpu_s + time.process_time() - begin}


def ours_start(config_path: Path, overrides: list[str]) -> dict[str, float]:
    """The parent's work and the worker's, up to the moment the first step could begin."""
    from trainer.package_files import hold_back

    hold_back("bitsandbytes")  # as the program does
    from trainer.cli.arguments import read_run
    from trainer.cli.keep_running import write_resolved
    from trainer.cli.prepare_set import ensure_prepared
    from trainer.config.load import load_config

    config, model = read_run(config_path, [*overrides, "run.resume=false", f"run.dir={SCRATCH}"])
    ensure_prepared(config, model)
    resolved = write_resolved(config, config.run.dir)
    parent_s = time.process_time()
    from trainer.model_files.run_model import open_model
    from trainer.parallel.comm import init_comm
    from trainer.train.arithmetic import arithmetic_of
    from trainer.train.build import build_run
    from trainer.train.loop import open_training_loader
    from trainer.train.placement import starting_state

    # The worker reads the resolved file, and imports again what the parent has imported.
    config = load_config(resolved, check_paths=False)
    comm, model = init_comm(), open_model(config.model.path, config.model.vae, config.model.tokenizer)
    run = build_run(config, model, comm)
    arithmetic = arithmetic_of(config, 1, run.prepared.buckets("train"), run.prepared.rows_per_bucket("train"))
    state = starting_state(config, run, arithmetic.images_per_step)
    with open_training_loader(config, model, comm, run, state, 1) as loader:
        next(iter(next(loader).batches))
        return {"cpu_s": time.process_time() + parent_s}


def steps(config_path: Path, overrides: list[str]) -> dict[str, float]:
    """Our steps and bare steps in turns, on the same shapes."""
    import torch

    from trainer.config.load import load_config
    from trainer.model.load_weights import load_unet
    from trainer.model_files.run_model import open_model
    from trainer.optim.optimizers import make_optimizer
    from trainer.parallel.comm import init_comm
    from trainer.train.arithmetic import arithmetic_of
    from trainer.train.build import build_run
    from trainer.train.loop import open_training_loader
    from trainer.train.placement import starting_state
    from trainer.train.step import train_step

    config = load_config(config_path, [*overrides, "run.resume=false", f"run.dir={SCRATCH}"])
    comm, model = init_comm(), open_model(config.model.path, config.model.vae, config.model.tokenizer)
    run = build_run(config, model, comm)
    arithmetic = arithmetic_of(config, 1, run.prepared.buckets("train"), run.prepared.rows_per_bucket("train"))
    state = starting_state(config, run, arithmetic.images_per_step)
    bare = load_unet(model, torch.float32, comm.device).train()
    optimizer = make_optimizer(dict(bare.named_parameters()), config.optimizer)
    batch = config.train.batch_size_per_gpu
    text_dim = bare.config.cross_attention_dim
    pooled_dim = bare.config.projection_class_embeddings_input_dim - 6 * bare.config.addition_time_embed_dim
    shapes: list[tuple[int, ...]] = []

    with open_training_loader(config, model, comm, run, state, arithmetic.accumulation) as loader:

        def ours() -> None:
            shapes.clear()
            for _ in range(STEPS):
                step_batches = next(loader)
                batches = []
                for item in step_batches.batches:
                    batches.append(item)
                    shapes.append(tuple(item.latents.shape))
                train_step(run.parts, batches, arithmetic.accumulation, step_batches.weight, 1e-5, False)

        def bare_steps() -> None:
            for index in range(STEPS):
                for shape in shapes[index * arithmetic.accumulation : (index + 1) * arithmetic.accumulation]:
                    latents, noise, text, pooled, time_ids, timesteps = tensors[shape]
                    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
                        conditions = {"text_embeds": pooled, "time_ids": time_ids}
                        prediction = bare(latents, timesteps, text, added_cond_kwargs=conditions).sample
                    (prediction.float() - noise).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        tensors = {
            (batch, 4, b.height_px // 8, b.width_px // 8): (
                torch.randn(batch, 4, b.height_px // 8, b.width_px // 8),
                torch.randn(batch, 4, b.height_px // 8, b.width_px // 8),
                torch.randn(batch, 77, text_dim),
                torch.randn(batch, pooled_dim),
                torch.randn(batch, 6),
                torch.randint(0, 1000, (batch,)),
            )
            for b in run.prepared.buckets("train")
        }
        rounds = [(cpu_seconds(ours), cpu_seconds(bare_steps)) for _ in range(ROUNDS + 2)][2:]  # two to warm up
    return {
        "ours": statistics.median(o for o, _ in rounds) / STEPS,
        "bare": statistics.median(b for _, b in rounds) / STEPS,
        "ratio": statistics.median(o / b for o, b in rounds),
    }


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this process (all threads) and of its reader processes."""
    before = tree_cpu_seconds()
    work()
    return tree_cpu_seconds() - before


def tree_cpu_seconds() -> float:
    """CPU seconds of this process, to the microsecond, and of all its descendants, to the hundredth, so far."""
    import psutil

    others = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in others)


if __name__ == "__main__":
    main()
