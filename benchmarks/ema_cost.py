"""CPU time of averaging the weights after each step, against the step itself, as a Markdown table.

    python benchmarks/ema_cost.py [--rounds 15]

The tiny SDXL (15.6M weights in 1,680 tensors), one thread, steps of 2 images of 128 x 128 px: forward, backward and
AdamW. Step and updates take turns in one process; medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.optim.ema_profile import Profile

CASES = (
    ("fp32, plain", "fp32", "device", ("ema",)),
    ("fp32, two power functions", "fp32", "device", ("short", "long")),
    ("fp32, plain, as for the host's memory", "fp32", "host", ("ema",)),
    ("bf16, plain", "bf16", "device", ("ema",)),
)


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    import torch

    from trainer.optim.ema import start_averages, update_averages
    from trainer.optim.ema_profile import PlainEma, PowerEma
    from trainer.optim.ema_swap import averaged_weights
    from trainer.optim.precision import DTYPES
    from trainer.tiny.tiny_model import make_tiny_unet

    torch.set_num_threads(1)
    profiles: dict[str, Profile] = {"ema": PlainEma(0.999), "short": PowerEma(0.05), "long": PowerEma(0.10)}
    step = make_step()
    works: dict[str, Callable[[int], None]] = {"step": lambda _: step()}
    for label, dtype, place, names in CASES:
        parameters = dict(make_tiny_unet().to(DTYPES[dtype]).named_parameters())
        averages = start_averages(parameters, {name: profiles[name] for name in names}, place=place)
        works[label] = lambda n, a=averages, p=parameters: update_averages(a, p, n)
        if label == CASES[0][0]:

            def swap(_: int, a=averages, p=parameters) -> None:
                with averaged_weights(a, "ema", p):
                    pass

            works["fp32, into the model and back"] = swap
    times: dict[str, list[float]] = {label: [] for label in works}
    for number in range(1, rounds + 2):
        for label, work in works.items():
            begin = time.process_time()
            work(number)
            if number > 1:  # the first warms up
                times[label].append(time.process_time() - begin)
    print("| what | CPU ms | share of a step |")
    print("|---|---|---|")
    for label, found in times.items():
        share = statistics.median(mine / whole for mine, whole in zip(found, times["step"], strict=True))
        print(f"| {label} | {statistics.median(found) * 1e3:.1f} | {share:.1%} |")


def make_step() -> Callable[[], None]:
    """A training step of the tiny UNet, on tensors in memory."""
    import torch

    from trainer.tiny.tiny_model import make_tiny_unet

    unet = make_tiny_unet().train()
    config = unet.config
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    pooled_dim = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, config["cross_attention_dim"])
    added = {"text_embeds": torch.randn(2, pooled_dim), "time_ids": torch.zeros(2, 6)}

    def step() -> None:
        found = unet(latents, torch.tensor([3, 700]), text, added_cond_kwargs=added).sample
        found.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
