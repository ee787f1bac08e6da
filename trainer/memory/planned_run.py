"""What a run's memory hangs on, as plain values: made once from its configuration, and changed to look for advice."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config.sections.adapter_config import AdapterConfig, only_additions_train, trains_adapter
from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.config.sections.new_tokens_config import NewTokenConfig
from trainer.config.sections.optimizer_config import OptimizerKind
from trainer.config.sections.trainable_config import TrainableConfig
from trainer.config.values import FrozenWeights
from trainer.model_files.run_model import RunModel


@dataclass(frozen=True)
class PlannedRun:
    """A run as its memory plan sees it.

    Attributes:
        trainable: which weights train; with an adapter, which parts have one.
        precision: `train.precision`; `vae_precision`, `text_encoder_precision`: of what is frozen.
        optimizer: `optimizer.kind`.
        batch_size: images in a pass of one worker.
        chunks, chunk_join: of a caption: how many pieces of 75 tokens, and how they are put together.
        cache_text: captions are not encoded while training.
        holds_images: the data are images, and the VAE encodes `vae_batch_size` of them at a time.
        validates: there is validation between steps.
        sample_px: height and width of the samples that are drawn between steps; None: none are drawn.
        budget, strategy, recompute, offload_activations: wishes, as in the configuration's `memory`.
        link_bytes_per_s: of a card to the host's memory, and as much back at the same time.
        data_workers: reader processes of each worker.
        checkpoints: how many the disk holds at once.
        extra_noises: of an image, that lie on the card beside its own while it is trained on; fp32.
        averages: running averages of what trains, and where they are held; `snapshot_averages`: of which snapshots are
            kept, each element in so many bytes.
        scores_averages: one of them is put into the model between steps.
        adapter: what trains in place of the weights, if it is of a kind.
        new_tokens: whose vectors train beside all else, or alone.
        releases_gradients: each block is updated when its gradients have arrived; `offload_optimizer`: and the state
            for that lies in the host's memory, as wished in `memory`; `offload_weights`: and the blocks' weights.
        frozen_weights: in how many bits a base is held that does not train.
        exchange: how gradients travel; all but the plain way is for `ddp`.
        shard_within: over how many workers weights are spread, as wished in `memory`.
    """

    model: RunModel
    trainable: TrainableConfig
    precision: str
    vae_precision: str
    text_encoder_precision: str
    optimizer: OptimizerKind
    batch_size: int
    chunks: int
    chunk_join: Literal["a1111", "kohya"]
    cache_text: bool
    holds_images: bool
    vae_batch_size: int
    validates: bool
    sample_px: tuple[int, int] | None
    budget: str
    strategy: Literal["auto", "ddp", "zero2", "zero3"]
    recompute: Literal["auto", "none", "all"]
    offload_activations: Literal["auto", "some"] | bool | int
    link_bytes_per_s: float
    data_workers: int
    checkpoints: int
    extra_noises: int = 0
    averages: int = 0
    averages_place: Literal["device", "host"] = "device"
    scores_averages: bool = False
    snapshot_averages: int = 0
    snapshot_bytes: int = 4
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    new_tokens: tuple[NewTokenConfig, ...] = ()
    releases_gradients: bool = False
    offload_optimizer: Literal["auto"] | bool = "auto"
    offload_weights: Literal["auto"] | bool = False
    frozen_weights: FrozenWeights = "compute"
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    shard_within: Literal["all", "host"] | int = "all"

    @property
    def text_encoders_train(self) -> bool:
        """Whether anything in them does."""
        texts = self.trainable.text_encoder_1.train or self.trainable.text_encoder_2.train
        return texts or bool(self.new_tokens)

    @property
    def only_additions_train(self) -> bool:
        """Whether what trains is an adapter beside frozen weights, or new tokens alone."""
        return only_additions_train(self.trainable, self.adapter)

    @property
    def may_be_spread(self) -> bool:
        """Whether workers may have shares of the weights: a base that is packed is no parameter, and each has it."""
        return not self.only_additions_train or (trains_adapter(self.adapter) and self.frozen_weights == "compute")

    def values(self) -> dict[str, Any]:
        """All of it as plain values, the model by its components' configurations."""
        own = {
            name: value
            for name, value in vars(self).items()
            if name not in ("model", "trainable", "adapter", "new_tokens", "exchange")
        }
        configs = {name: self.model.config(name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")}
        sections = {name: getattr(self, name).model_dump(mode="json") for name in ("trainable", "adapter", "exchange")}
        tokens = [each.model_dump(mode="json") for each in self.new_tokens]
        return own | sections | {"configs": configs, "new_tokens": tokens}
