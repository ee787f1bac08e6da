"""Pieces of adapters by themselves: dropout, targets, initial values, names."""

import re
from pathlib import Path

import pytest
import torch

from tests.train.real_run import run_config
from trainer.adapters.adapter_file import open_adapter
from trainer.adapters.initial_values import AdapterStart
from trainer.adapters.keyed_dropout import KeyedDropout
from trainer.adapters.parameters import adapter_parameters
from trainer.config.schema import TrainableConfig
from trainer.config.sections.adapter_config import AdapterConfig
from trainer.errors import UserError
from trainer.model.adapted import fill_adapted, lay_out_run
from trainer.model.denoiser import TrainedModel
from trainer.model_files.run_model import RunModel, open_model
from trainer.parallel.sharding import materialize


@pytest.fixture(scope="module")
def files(model_folder: Path) -> RunModel:
    return open_model(model_folder)


def laid_out(files: RunModel, seed: int = 0, **adapter: object) -> TrainedModel:
    config = AdapterConfig.model_validate({"kind": "lora", "rank": 2, **adapter})
    return lay_out_run(files, TrainableConfig(), AdapterStart(config, seed), torch.float32, torch.float32)


def filled(files: RunModel, seed: int = 0, **adapter: object) -> TrainedModel:
    model = laid_out(files, seed, **adapter)
    materialize(model, torch.device("cpu"))
    fill_adapted(files, None, model)
    return model


def layers(model: TrainedModel) -> set[str]:
    return {re.sub(r"\.lora_[AB]\.default\.weight$", "", name) for name in adapter_parameters(model)}


def test_dropout_hangs_on_the_image_and_the_place_alone() -> None:
    dropout, latents = KeyedDropout(0.3), torch.randn(4, 4, 8, 8)
    timesteps, values = torch.tensor([1, 2, 3, 4]), torch.ones(4, 200, 16)
    dropout.note(latents, timesteps)
    whole, other = dropout.masked(values, 7), dropout.masked(values, 8)
    dropout.note(latents[2:], timesteps[2:])
    assert torch.equal(dropout.masked(values[2:], 7), whole[2:])
    assert whole.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    shares = (whole == 0).double().mean(dim=(1, 2))
    assert (shares - 0.3).abs().max() < 0.03
    both = ((whole == 0) & (other == 0)).double().mean().item()  # of two layers, independent
    assert abs(both - 0.09) < 0.02
    assert abs(((whole[0] == 0) & (whole[1] == 0)).double().mean().item() - 0.09) < 0.03
    along = ((whole[:, 1:] == 0) & (whole[:, :-1] == 0)).double().mean().item()
    assert abs(along - 0.09) < 0.02


def test_chosen_layers(files: RunModel) -> None:
    usual = layers(laid_out(files))
    assert all(".attentions." in name for name in usual) and any(name.endswith("proj_in") for name in usual)
    with_convolutions = layers(laid_out(files, kind="locon"))
    assert usual < with_convolutions and "unet.down_blocks.0.resnets.0.time_emb_proj" in with_convolutions
    chosen = layers(laid_out(files, targets=["input_blocks.3.1", "*.attn2.to_k", "mid_block.attentions.0.proj_out"]))
    assert "unet.mid_block.attentions.0.proj_out" in chosen and "unet.mid_block.attentions.0.proj_in" not in chosen
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k" in chosen
    assert {name for name in usual if name.startswith("unet.down_blocks.1.attentions.0.")} < chosen
    texts = layers(laid_out(files, text_encoders=True)) - usual
    assert not any(".layers.2." in name for name in texts if name.startswith("text_encoder_1"))  # nothing depends on it
    assert any(".layers.3." in name for name in texts if name.startswith("text_encoder_2"))
    with pytest.raises(UserError, match=r"`input_block.3` is the beginning of no layer .*; did you mean `input_blocks"):
        laid_out(files, targets=["input_block.3"])
    with pytest.raises(UserError, match=r"adapter.rank = 12: blocks of `oft` must divide"):
        laid_out(files, kind="oft", rank=12)


def test_initial_values_hang_on_seed_and_name_alone(files: RunModel) -> None:
    one, few = adapter_parameters(filled(files)), adapter_parameters(filled(files, targets=["mid_block.attentions"]))
    other = adapter_parameters(filled(files, seed=1))
    assert few.keys() < one.keys()
    assert all(torch.equal(one[name], few[name]) for name in few)
    first = next(name for name in one if "lora_A" in name)
    assert not torch.equal(one[first], other[first])
    assert one[first].std().item() == pytest.approx(one[first].shape[1] ** -0.5 / 3**0.5, rel=0.5)
    assert all(not tensor.any() for name, tensor in one.items() if "lora_B" in name)


def test_an_adapter_is_put_where_text_encoders_alone_are_meant(files: RunModel) -> None:
    model = laid_out(files, text_encoders=True, targets=["text_encoder_2"])
    assert {name.split(".")[0] for name in adapter_parameters(model)} == {"text_encoder_2"}


def test_a_file_that_is_no_adapter(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"which is no tensor of an adapter that is known here"):
        open_adapter(model_folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_rules(model_folder: Path, tmp_path: Path) -> None:
    from trainer.config.rules import broken_rules
    from trainer.config.schema import Config

    def problems(adapter: dict[str, object], **sections: dict[str, object]) -> str:
        fields = run_config(model_folder, tmp_path / "p", tmp_path / "r", steps=5).model_dump(
            mode="json", exclude_unset=True
        )
        fields["adapter"] = adapter
        for name, values in sections.items():
            fields[name] = fields.get(name, {}) | values
        return "\n".join(problem.text for problem in broken_rules(Config.model_validate(fields)))

    assert problems({"kind": "lora", "text_encoders": True}) == ""
    assert "has no effect; name a kind" in problems({"rank": 8})
    assert "convolutions are changed by" in problems({"kind": "lora", "conv_rank": 4})
    assert "a rotation has no scale" in problems({"kind": "oft", "alpha": 4.0})
    assert "is for lora, locon and dora" in problems({"kind": "loha", "dropout": 0.1})
    for kind in ("lora", "locon", "loha", "lokr"):
        assert problems({"kind": kind}, train={"precision": "bf16_kahan"}) == ""
    for kind in ("lora", "locon", "dora"):
        assert problems({"kind": kind}, train={"compile": "blocks"}) == ""
    assert "layers of the others in small pieces" in problems({"kind": "loha"}, train={"compile": "blocks"})
    assert "would start up to 0.4 % off" in problems({"kind": "dora"}, train={"precision": "bf16_kahan"})
    assert "solved for, which has no bf16" in problems({"kind": "oft"}, train={"precision": "bf16_stochastic"})
    assert "would leave out the same" in problems({"kind": "lora", "dropout": 0.1}, train={"compile": "blocks"})
    for strategy in ("zero2", "zero3"):
        assert problems({"kind": "dora"}, memory={"strategy": strategy}) == ""
        packed = problems({"kind": "lora"}, memory={"strategy": strategy}, model={"frozen_weights": "nf4"})
        assert "must be auto or ddp; packed weights are no parameters" in packed
    assert "with an adapter nothing else trains" in problems(
        {"kind": "lora"}, trainable={"text_encoder_1": {"train": True}}
    )
    cached = problems({"kind": "lora", "text_encoders": True}, data={"cache_text": True})
    assert "the text encoders' outputs change" in cached
