"""A run's power averages where they lie, and one of any length from them, written as a folder that commands take.

averages/step-00001000-length-0.05/unet/...    what `sdxl-train ema RUN --length 0.05` writes: `export`, `eval` and
                                               `sample` take it as they take a checkpoint
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.ema_folders import SNAPSHOTS, average_folder, components_of
from trainer.checkpoint.manifest import STATE, Damage, manifest_entry, read_manifest
from trainer.checkpoint.run_dir import CHECKPOINTS, RESOLVED_CONFIG, checkpoint_step, list_checkpoints
from trainer.checkpoint.write import WEIGHTS_FILES, publish_folder
from trainer.errors import UserError
from trainer.guards import Refused, read_json
from trainer.model_files.header import read_header
from trainer.optim.ema_profile import Reconstruction
from trainer.publish.reconstruct_ema import StoredAverage, plan_reconstruction, write_reconstruction

FOLDER = "averages"


@dataclass(frozen=True)
class KeptAverage:
    """One power average as a checkpoint or a snapshot holds it.

    Attributes:
        place: the checkpoint or snapshot; `name`: of the average.
        began_at: step of the run after which it began.
        age: steps that it holds, by which its profile counts.
        sigma_rel: its length.
    """

    place: Path
    name: str
    began_at: int
    age: int
    sigma_rel: float

    @property
    def step(self) -> int:
        """Of the run."""
        return checkpoint_step(self.place)

    def stored(self, component: str) -> StoredAverage | None:
        """Its file of one component; None where that did not train yet."""
        file = self.place / average_folder(component, self.name) / WEIGHTS_FILES[component]
        return StoredAverage(file, self.age, self.sigma_rel) if file.is_file() else None


@dataclass(frozen=True)
class ComponentPlan:
    """How one component's average is made.

    Attributes:
        used: the files that go into it; `found`: with which weights.
        config: its `config.json`.
    """

    component: str
    used: tuple[StoredAverage, ...]
    found: Reconstruction
    config: Path


@dataclass(frozen=True)
class AveragePlan:
    """An average of a length that was not kept, as it was after a step of the run.

    Attributes:
        kept: what it is made from.
        total_bytes: of the tensors that are written.
    """

    run_dir: Path
    length: float
    step: int
    kept: tuple[KeptAverage, ...]
    components: tuple[ComponentPlan, ...]
    total_bytes: int

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"step-{self.step:08d}-length-{self.length:g}"

    def describe(self) -> str:
        """What it is made from, and how well."""
        steps, lengths = sorted({each.step for each in self.kept}), sorted({each.sigma_rel for each in self.kept})
        error = max(each.found.relative_error for each in self.components)
        told = " and ".join(f"{length:g}" for length in lengths)
        text = f"length {self.length:g} at step {self.step} from {len(self.kept)} stored averages of length {told}"
        text += f", steps {steps[0]} to {steps[-1]}: its profile is met to {100 * error:.2g} %"
        return text + ("; more snapshots (ema.snapshots) would meet it better" if error > 0.05 else "")


def kept_averages(run_dir: Path) -> list[KeptAverage]:
    """The power averages in a run's checkpoints and snapshots that began together, by steps.

    Of several beginnings that the newest step knows, the earliest counts.
    """
    found: dict[tuple[int, float, int], KeptAverage] = {}
    for folder in (SNAPSHOTS, CHECKPOINTS):  # of the same step the checkpoint's counts, which is fp32
        for place in list_checkpoints(run_dir, folder):
            for each in _averages_at(place):
                found[each.step, each.sigma_rel, each.began_at] = each
    newest = max((each.step for each in found.values()), default=0)
    began = min((each.began_at for each in found.values() if each.step == newest), default=0)
    return sorted(
        (each for each in found.values() if each.began_at == began), key=lambda each: (each.step, each.sigma_rel)
    )


def _averages_at(place: Path) -> Iterator[KeptAverage]:
    try:
        averages = read_json(place / STATE)["ema"]["averages"]
    except (OSError, Refused, KeyError, TypeError):
        return
    for name, each in averages.items():
        if each["kind"] == "power" and each["steps"] > 0:
            yield KeptAverage(place, name, each["began_at"], each["steps"], each["sigma_rel"])


def nothing_kept(run_dir: Path) -> UserError:
    """That a run holds no power averages."""
    mend = "`ema.averages: [{kind: power}]` and `ema.snapshots.every_steps` keep some from the next start on"
    return UserError(f"{run_dir}: holds no power average from which others could be computed; {mend}")


def plan_average(run_dir: Path, length: float, step: int | None = None) -> AveragePlan:
    """What an average of this length is made from; reads headers alone.

    Args:
        step: of the run, one of those of which something is stored; None: the last.

    Raises:
        UserError: nothing is stored from which it could be computed, or the length is out of range.
    """
    kept = kept_averages(run_dir)
    if not kept:
        raise nothing_kept(run_dir)
    if "adapter" in components_of(kept[-1].place, kept[-1].name):
        raise UserError(f"{run_dir}: its averages are of an adapter, of which other lengths are not computed")
    steps = sorted({each.step for each in kept})
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: nothing is stored of it; steps are {', '.join(map(str, steps))}")
    last = steps[-1] if step is None else step
    kept = [each for each in kept if each.step <= last]
    newest = kept[-1]
    plans, total = [], 0
    for component in components_of(newest.place, newest.name):
        stored = [found for each in kept if (found := each.stored(component))]
        used, found = plan_reconstruction(stored, length)
        config = newest.place / average_folder(component, newest.name) / "config.json"
        plans.append(ComponentPlan(component, tuple(used), found, config))
        total += 4 * sum(entry.count for entry in read_header(used[-1].path).tensors.values())
    return AveragePlan(run_dir, length, last, tuple(kept), tuple(plans), total)


def check_files(plan: AveragePlan) -> Iterator[Path]:
    """Compare every file that goes into the average with its manifest; gives each when it is checked.

    Raises:
        UserError: one is damaged.
    """
    for file in sorted({stored.path for each in plan.components for stored in each.used}):
        place = file.parent.parent
        mend = f"remove {place}, and compute from the others"
        try:
            entries = read_manifest(place)
        except Damage as damage:
            raise UserError(f"{place}: {damage}; {mend}") from None
        if entries.get(file.relative_to(place).as_posix()) != manifest_entry(file):
            raise UserError(f"{file}: is not what was written (checksum); {mend}")
        yield file


def write_average(plan: AveragePlan, out_dir: Path | None, on_written: Callable[[int], None]) -> Path:
    """Write the average as a folder in `out_dir`, whole or not at all; returns the folder.

    Args:
        out_dir: None: `averages` in the run's directory. Elsewhere the folder carries the run's configuration.
        on_written: told of every tensor's bytes.

    Raises:
        UserError: it is there already, or could not be written.
    """
    path = (out_dir or plan.run_dir / FOLDER) / plan.name
    if path.exists():
        raise UserError(f"{path}: exists; remove it, or give another folder by -o")
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for each in plan.components:
            folder = temporary / each.component
            folder.mkdir(parents=True)
            shutil.copyfile(each.config, folder / "config.json")
            weights = folder / WEIGHTS_FILES[each.component]
            write_reconstruction(each.used, plan.length, weights, on_written=on_written)
        if out_dir is not None:
            shutil.copyfile(plan.run_dir / RESOLVED_CONFIG, temporary / RESOLVED_CONFIG)
        publish_folder(temporary, path, {"average": _told(plan.length, plan.step, plan.kept)})
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _told(length: float, step: int, kept: Sequence[KeptAverage]) -> dict[str, object]:
    stored = [{"step": each.step, "sigma_rel": each.sigma_rel} for each in kept]
    return {"kind": "power", "sigma_rel": length, "step": step, "from": stored}
