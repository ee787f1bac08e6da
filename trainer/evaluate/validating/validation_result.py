"""A validation in full: held-out images, images that are trained on, the gap; as numbers, as JSON, as a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.evaluate.validating.intervals import LEVEL, Estimate, difference
from trainer.evaluate.validating.scored_images import by_bucket, by_source, by_timestep, over
from trainer.evaluate.validation import ValidationLoss

MOST_GROUPS = 20
"""Of buckets, and of sources, that records of a run have: those of the most images."""


@dataclass(frozen=True)
class ValidationResult:
    """What one set of weights scores.

    Attributes:
        held_out: images that are held out.
        training: as many that are trained on; None: they were not scored.
        further: the held-out images once more, at each further resolution at which they are held.
    """

    timesteps: Sequence[int]
    held_out: ValidationLoss
    training: ValidationLoss | None = None
    further: Mapping[int, ValidationLoss] = field(default_factory=dict)

    @property
    def loss(self) -> Estimate:
        """Over all timesteps."""
        return over(self.held_out.images, lambda image: image.loss)

    @property
    def training_loss(self) -> Estimate | None:
        """The same of images that are trained on."""
        return over(self.training.images, lambda image: image.loss) if self.training else None

    @property
    def gap(self) -> Estimate | None:
        """How much greater the loss is where nothing was learnt by heart."""
        return difference(self.loss, self.training_loss) if self.training_loss else None

    @property
    def at_timesteps(self) -> dict[int, Estimate]:
        """Of held-out images."""
        return by_timestep(self.held_out.images, self.timesteps)

    @property
    def training_at_timesteps(self) -> dict[int, Estimate]:
        """Of images that are trained on; {} where they were not scored."""
        return by_timestep(self.training.images, self.timesteps) if self.training else {}

    @property
    def buckets(self) -> dict[str, Estimate]:
        """Of held-out images."""
        return by_bucket(self.held_out.images)

    @property
    def sources(self) -> dict[str, Estimate]:
        """Of held-out images."""
        return by_source(self.held_out.images)

    @property
    def resolutions(self) -> dict[int, Estimate]:
        """Of held-out images at each further resolution, over all timesteps, the largest first."""
        return {at: over(found.images, lambda image: image.loss) for at, found in self.further.items()}

    @property
    def further_buckets(self) -> dict[int, dict[str, Estimate]]:
        """The same in each bucket."""
        return {at: by_bucket(found.images) for at, found in self.further.items()}


def record_values(result: ValidationResult) -> dict[str, float]:
    """What a record of a run has beside the losses: no name begins with `loss_t`, which is a timestep's.

    `ci95` and `ci95/...` are half the width of the interval of what the name says without them.
    """
    found: dict[str, float] = {"images": result.loss.images}
    _put(found, "", result.loss, with_mean=False)
    for t, estimate in result.at_timesteps.items():
        _put(found, f"t{t}", estimate, with_mean=False)
    for kind, groups in (("bucket", result.buckets), ("source", result.sources)):
        largest = sorted(groups, key=lambda name: -groups[name].images)[:MOST_GROUPS]
        for name in groups if len(groups) > 1 else ():
            if name in largest:
                _put(found, f"{kind}/{name}", groups[name])
    for at, estimate in result.resolutions.items():
        _put(found, f"resolution/{at}", estimate)
    if result.training and result.gap:
        found["train_loss"] = result.training.loss
        _put(found, "gap", result.gap)
        for t, mean in result.training.at_timestep.items():
            found[f"gap/t{t}"] = result.held_out.at_timestep[t] - mean
    return found


def _put(found: dict[str, float], name: str, estimate: Estimate, *, with_mean: bool = True) -> None:
    if with_mean:
        found[name] = estimate.mean
    if estimate.half_width is not None:
        found[f"ci95/{name}" if name else "ci95"] = estimate.half_width


def as_record(result: ValidationResult) -> dict[str, Any]:
    """JSON-able; `loss`, `loss_at_timestep` and `images` as they have always been."""
    held_out, training = result.held_out, result.training
    record: dict[str, Any] = {
        "loss": held_out.loss,
        "loss_at_timestep": held_out.at_timestep,
        "images": held_out.num_images,
        "level": LEVEL,
        "overall": _plain(result.loss),
        "by_timestep": _all_plain(result.at_timesteps),
        "by_bucket": _all_plain(result.buckets),
        "by_source": _all_plain(result.sources),
    }
    if result.further:
        record["by_resolution"] = {
            str(at): {**_plain(estimate), "by_bucket": _all_plain(result.further_buckets[at])}
            for at, estimate in result.resolutions.items()
        }
    if training and result.training_loss and result.gap:
        record["training"] = {
            "loss": training.loss,
            "overall": _plain(result.training_loss),
            "by_timestep": _all_plain(result.training_at_timesteps),
        }
        record["gap"] = _plain(result.gap)
    return record


def _plain(estimate: Estimate) -> dict[str, float | int | None]:
    return {"loss": estimate.mean, "plus_minus": estimate.half_width, "images": estimate.images}


def _all_plain(groups: Mapping[Any, Estimate]) -> dict[str, Any]:
    return {str(name): _plain(estimate) for name, estimate in groups.items()}


def table(result: ValidationResult) -> Iterator[str]:
    """Lines for a terminal: by timestep, bucket and source, with half the interval and the number of images."""
    named = [(f"timestep {t:3d}", estimate) for t, estimate in result.at_timesteps.items()]
    named += [(f"bucket {name.replace('x', ' x ')}", estimate) for name, estimate in result.buckets.items()]
    for at, estimate in result.resolutions.items():
        named += [(f"all at {at} px", estimate)]
        buckets = result.further_buckets[at].items()
        named += [(f"bucket {name.replace('x', ' x ')} of {at} px", of_bucket) for name, of_bucket in buckets]
    named += [(f"source {name}", estimate) for name, estimate in result.sources.items()]
    if result.training_loss and result.gap:
        named += [("training images", result.training_loss), ("held out less training", result.gap)]
    width = max(len(name) for name, _ in named)
    yield f"  {'':{width}}     loss  ± 95 %  images"
    for name, estimate in named:
        yield f"  {name:{width}}  {estimate.mean:7.4f}  {_half(estimate)}  {estimate.images:6,}"


def told_loss(result: ValidationResult, of: str = "") -> str:
    """In a line: the loss and its interval, and the gap. `of`: whose, if not of the weights that train."""
    told = (
        f"validation loss{of} {result.held_out.loss:.4f}{_interval(result.loss)} ({result.held_out.num_images} images)"
    )
    if result.further:
        told += "".join(f", {estimate.mean:.4f} at {at} px" for at, estimate in result.resolutions.items())
    if result.gap:
        told += f", {result.gap.mean:+.4f}{_interval(result.gap)} to images that are trained on"
    return told


def _interval(estimate: Estimate) -> str:
    return "" if estimate.half_width is None else f" ± {estimate.half_width:.4f}"


def _half(estimate: Estimate) -> str:
    return f"{'-':>6}" if estimate.half_width is None else f"{estimate.half_width:6.4f}"
