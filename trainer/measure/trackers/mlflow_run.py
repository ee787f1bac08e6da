"""MLflow: one run there for a run here, in a folder of the run's or on a server."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.measure.trackers.tracked_run import Mark, Record, TrackedRun, Tracker, values_of, write_mark

MLFLOW_FOLDER = "mlflow"
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 500  # of one call; all servers take so many


class MlflowRun:
    """A run of the library `mlflow`."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.id = run_id

    def add(self, records: Sequence[Record]) -> None:
        """Send their numbers."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        metrics = [
            Metric(_name(key), float(value), int(1000 * record.get("time", 0)), record["step"])
            for record in records
            for key, value in values_of(record).items()
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _MOST_METRICS])

    def close(self) -> None:
        """The run rests until it is gone on with."""
        self._client.set_terminated(self.id)


def open_mlflow(run: TrackedRun, mark: Mark) -> tuple[Tracker, Mark]:
    """The run of the mark's id, new or gone on with.

    Of a store in the run's directory, steps that are to be replaced are taken out of its files. Elsewhere nothing can
    be taken back: another run takes the place of the old one, which is deleted (MLflow keeps it in its bin), and gets
    all records once more.
    """
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for it
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    uri = run.options.get("uri") or os.environ.get("MLFLOW_TRACKING_URI")
    own = None if uri else run.run_dir / MLFLOW_FOLDER
    client = MlflowClient(uri or (run.run_dir / MLFLOW_FOLDER).absolute().as_uri())
    old = mark.id if mark.id and _is_there(client, mark.id) else ""
    if old and mark.replaces and own is not None:
        _empty_metrics(own, old)
        mark = Mark(id=old)
    elif old and mark.replaces:
        client.delete_run(old)
        old = ""
    if not old:
        mark = Mark(id=_new_run(client, run))
        write_mark(run.run_dir, run.kind, mark)  # at once: who is ended now leaves no run that nobody knows
    if not client.get_run(mark.id).data.params:
        _send_settings(client, mark.id, run)
    client.update_run(mark.id, status="RUNNING")
    return MlflowRun(client, mark.id), replace(mark, replaces=False)


def _name(key: str) -> str:
    """With one slash: a store of files has no room for `train/lr` beside `train/lr/unet`."""
    kind, _, rest = key.partition("/")
    return f"{kind}/{rest.replace('/', '.')}"


def _is_there(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _new_run(client: Any, run: TrackedRun) -> str:
    name = str(run.options.get("experiment") or "sdxl-train")
    found = client.get_experiment_by_name(name)
    return client.create_run(
        found.experiment_id if found else client.create_experiment(name),
        run_name=run.name,
        tags={"mlflow.source.name": "sdxl-train"},
    ).info.run_id


def _send_settings(client: Any, run_id: str, run: TrackedRun) -> None:
    from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

    params = [Param(key, text[:_LONGEST_PARAM]) for key, text in _flat(run.settings)]
    for start in range(0, len(params), _MOST_PARAMS):
        client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        elif value not in (None, "", []):
            yield f"{above}{key}", str(value)


def _empty_metrics(store: Path, run_id: str) -> None:
    """Of a run in a store of files, which has one for each metric."""
    for folder in store.glob(f"*/{run_id}/metrics"):
        for file in folder.rglob("*"):
            if file.is_file():
                file.unlink()
