"""The run's records, and what mirrors them, as the configuration wishes it."""

import json

from trainer.config.schema import Config
from trainer.measure.telemetry import MetricsWriter
from trainer.measure.trackers.tracked_run import TrackedRun


def open_records(config: Config, resume_step: int | None) -> MetricsWriter:
    """The writer of the run's records; see there for `resume_step`."""
    run_dir, log = config.run.dir, config.log
    settings = json.loads(config.model_dump_json(exclude={"notify", "limits"}))
    beside = [
        TrackedRun(kind, run_dir, log.name or run_dir.absolute().name, settings["log"].get(kind, {}), settings)
        for kind in log.trackers
        if kind != "tensorboard"
    ]
    return MetricsWriter(run_dir, resume_step, tensorboard="tensorboard" in log.trackers, trackers=beside)
