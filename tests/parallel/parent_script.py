"""A launching process for the tests to send signals to: `python parent_script.py MODE FOLDER WORKERS`."""

import contextlib
import os
import sys
from pathlib import Path

from trainer.parallel.launch import run_workers
from trainer.parallel.worker_template import WorkerTemplate

HERE = Path(__file__).parent


def launch(*modules: str) -> None:
    """Workers that are forks of a template with these modules; of none, new processes."""
    mode, folder, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    code = f"import runpy; runpy.run_path({str(HERE / 'worker_script.py')!r}, run_name='__main__')"
    with WorkerTemplate(modules, str(HERE.parents[1])) if modules else contextlib.nullcontext() as template:
        result = run_workers(
            [sys.executable, "-c", code, mode, str(folder)],
            workers=workers,
            log_dir=folder,
            env=os.environ,
            threads=1,
            gpu=False,
            template=template,
        )
    if result.failure is not None:
        print(result.failure.message(), file=sys.stderr)
    sys.exit(result.exit_code)


if __name__ == "__main__":
    launch(*["trainer.parallel.worker"] * (os.environ.get("WAY") == "forked"))
