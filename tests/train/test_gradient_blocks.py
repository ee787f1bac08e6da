from pathlib import Path

import pytest
import torch

from tests.train.real_run import ALONE, model_of, run_config
from trainer.data.buckets import Bucket
from trainer.memory.run_choice import MemoryChoice
from trainer.train.build import build_parts
from trainer.train.step import batch_losses, train_step
from trainer.train.workers.bench_worker import SyntheticData, synthetic_batch


def test_norms_by_block_add_up_to_the_whole(model_folder: Path, tmp_path: Path) -> None:
    """Each block's is that of its own gradients; and the step is the same step."""
    config = run_config(model_folder, tmp_path / "prepared", tmp_path / "run", data={"cache_text": True})
    told = config.model_copy(update={"log": config.log.model_copy(update={"block_norms": True})})
    data = SyntheticData(Bucket(64, 64), 0.13025, (77, 40, 24), holds_images=False, chunks=1, words=518)
    batch = synthetic_batch(data, 4, 4, seed=0)
    plain, parts = (build_parts(c, model_of(c), ALONE, data, MemoryChoice("single")) for c in (config, told))
    results = [train_step(of, [batch], 1, 4.0, 1.0, False, loss_scale=8.0) for of in (plain, parts)]
    assert results[0].block_norms == {} and results[0].grad_norm == results[1].grad_norm
    norms = results[1].block_norms
    assert {"unet.conv_in", "unet.down_blocks.1", "unet.mid_block", "unet.up_blocks.0"} <= set(norms)
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(results[1].grad_norm ** 2, rel=1e-5)
    again = build_parts(config, model_of(config), ALONE, data, MemoryChoice("single"))
    batch_losses(again, batch, 0, 4.0).losses.mean().backward()
    of_block = [p.grad.norm() for n, p in again.strategy.parameters.items() if n.startswith("unet.mid_block.")]
    assert norms["unet.mid_block"] == pytest.approx(float(torch.stack(of_block).norm()), rel=1e-5)
