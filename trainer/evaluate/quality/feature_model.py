"""A local model by whose features sets of images are compared: FID's Inception weights, or DINOv2; what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.errors import UserError, printable
from trainer.evaluate.quality.clip_folder import of_channels
from trainer.evaluate.quality.inception_file import inception_tensors, is_published
from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.model_files.config_bounds import ConfigFault, require_bounded
from trainer.model_files.diffusers_folder import object_or_nothing, read_config, weight_files

_WANTED = "wanted FID's Inception weights (pt_inception-2015-12-05-6726825d.pth) or a folder with a DINOv2 model"
_LAYERS = ("Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_2.conv.weight", "Mixed_7c.branch_pool.bn.running_var")
_CLASSES, _FEATURES, _INCEPTION_PX = 1008, 2048, 299
_DINO_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "qkv_bias", "layerscale_value", "use_swiglu_ffn",
)  # fmt: skip
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_PX = 224  # as dgm-eval, the code of Stein et al., shows it images


@dataclass(frozen=True)
class FeatureModel:
    """What is known of the model without its weights.

    Attributes:
        weights: a checkpoint of torch or safetensors file for `inception`, safetensors files for `dinov2`.
        config: of `dinov2`, of known keys alone.
        published: of `inception`: whether these are the weights that FID is defined by, by their checksum.
        image_px: side of the square that images are resized to.
        features: numbers of each image.
        mean, std: of each channel, in images of values from 0 to 1; of `dinov2`.
    """

    kind: Literal["inception", "dinov2"]
    path: Path
    weights: tuple[Path, ...]
    config: dict[str, Any]
    published: bool
    image_px: int
    features: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def score(self) -> str:
        """What Fréchet's distance over its features is called."""
        return "FD-DINOv2" if self.kind == "dinov2" else "FID" if self.published else "FID of other Inception weights"


def read_feature_model(path: Path, limits: Limits = DEFAULT_LIMITS) -> FeatureModel:
    """Look at a file with Inception's weights, or a folder such as a copy of `facebook/dinov2-large`.

    Raises:
        UserError: there is nothing, or neither of the two.
    """
    if path.is_dir():
        return _dinov2(path, limits)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {_WANTED}")
    tensors = inception_tensors(path, limits)
    missing = next((name for name in _LAYERS if name not in tensors), None)
    if missing is not None:
        raise UserError(f"{path}: no Inception weights: holds no {missing}; {_WANTED}")
    classes = tensors.get("fc.weight")
    if classes is not None and tuple(classes.meta.shape) != (_CLASSES, _FEATURES):
        told = f"fc.weight has shape {list(classes.meta.shape)}, and FID's network {[_CLASSES, _FEATURES]}"
        raise UserError(f"{path}: Inception weights of another kind: {told}; {_WANTED}")
    return FeatureModel("inception", path, (path,), {}, is_published(path), _INCEPTION_PX, _FEATURES)


def _dinov2(folder: Path, limits: Limits) -> FeatureModel:
    config = read_config(folder, limits)
    if config.get("model_type") != "dinov2":
        found = printable(str(config.get("model_type")), 60)
        raise UserError(f"{folder / 'config.json'}: model_type is `{found}`, not `dinov2`; {_WANTED}")
    kept = {key: config[key] for key in _DINO_KEYS if config.get(key) is not None}
    try:
        require_bounded("clip_vision", kept)
    except ConfigFault as fault:
        raise UserError(f"{folder / 'config.json'}: {fault}") from None
    patch, features = kept.get("patch_size", 14), kept.get("hidden_size", 768)
    if type(patch) is not int or _DINO_PX % patch or kept.get("num_channels", 3) != 3 or type(features) is not int:
        raise UserError(f"{folder / 'config.json'}: wanted images of three channels, and a patch_size that divides 224")
    weights = weight_files(folder, limits)
    if not weights:
        raise UserError(f"{folder}: holds no weights as safetensors, such as model.safetensors")
    seen = object_or_nothing(folder / "preprocessor_config.json", limits)
    mean, std = of_channels(seen.get("image_mean"), _IMAGENET_MEAN), of_channels(seen.get("image_std"), _IMAGENET_STD)
    return FeatureModel("dinov2", folder, weights, kept, False, _DINO_PX, features, mean, std)
