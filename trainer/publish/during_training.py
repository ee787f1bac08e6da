"""`checkpoint.export`: files to publish, written beside the training in a thread of rank 0."""

import glob
import logging
import shutil
import threading
import time
from pathlib import Path
from types import TracebackType

from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.model_files.modelspec import Description
from trainer.publish.plan_export import Wish, prepare_export

_log = logging.getLogger(__name__)


def _keep_newest(folder: Path, name: str, count: int) -> None:
    """Delete the exports of all steps but the newest, embeddings with them."""
    of_steps: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"{glob.escape(name)}-step-????????*")):
        ending = path.name[len(f"{name}-step-00000000") :]
        if ending in (".safetensors", "-embeddings"):
            of_steps.setdefault(path.name.removesuffix(ending), []).append(path)
    for step in sorted(of_steps)[:-count]:
        for path in of_steps[step]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Cancelled(Exception):
    """The run ends before the file is written."""


class Exports:
    """Writes exports one after the other; no failure of theirs, such as a full disk, ends the run.

    Leaving the context waits for the export of a finished run; one that is under way when a run is stopped or fails
    is given up, and nothing is left of it.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._thread: threading.Thread | None = None
        self._give_up = threading.Event()
        self._is_finished = False
        self.checkpoint: Path | None = None
        """Which one is being read, and must not be deleted."""

    def __enter__(self) -> "Exports":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None or not self._is_finished:
            self._give_up.set()
        self._wait()

    def start_when_due(self, step: int, *, is_finished: bool) -> None:
        """Begin the export that `checkpoint.export` asks for at this step; call it when its checkpoint is whole.

        Args:
            is_finished: whether this was the run's last step.
        """
        wish, checkpoint = self._config.checkpoint, checkpoint_dir(self._config.run.dir, step)
        self._is_finished = is_finished
        by_step = any(every and step % every == 0 for every in (wish.every_steps, wish.keep_every_steps))
        due = is_finished or (wish.export.when == "checkpoints" and by_step)
        if wish.export.when == "never" or not due or not (checkpoint / MANIFEST).is_file():
            return
        if is_finished:
            self._wait()
        elif self._thread and self._thread.is_alive():
            _log.warning("step %d is not exported: the export before it is still being written", step)
            return
        self.checkpoint = checkpoint
        self._thread = threading.Thread(target=self._export, args=(checkpoint,), name="export", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the export of a finished run."""
        if self._is_finished:
            self._wait()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()

    def _export(self, checkpoint: Path) -> None:
        settings, run_dir = self._config.checkpoint.export, self._config.run.dir
        folder, name = settings.dir or run_dir / "exports", run_dir.absolute().name
        out = folder / f"{name}-{checkpoint.name}.safetensors"
        description = Description(settings.title or None, settings.author or None, license=settings.license or None)
        begin = time.perf_counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            dtype, weights = settings.dtype, settings.weights
            wish = Wish(out, dtype=dtype, weights=weights, description=description, overwrite=True)
            prepare_export(checkpoint, wish, self._config).write(self._go_on)
            if settings.keep:
                _keep_newest(folder, name, settings.keep)
        except _Cancelled:
            _log.warning("%s: given up, for the run ends; `sdxl-train export %s -o FILE` writes it", out, checkpoint)
        except (UserError, OSError) as error:
            _log.warning("not exported, training is not affected: %s", " ".join(str(error).split()))
        else:
            _log.info("exported %s in %.1f s", out, time.perf_counter() - begin)
        finally:
            self.checkpoint = None

    def _go_on(self, _: int) -> None:
        if self._give_up.is_set():
            raise _Cancelled
