"""A launching process for the tests to send signals to: `python parent_script.py MODE FOLDER WORKERS`."""

import os
import sys
from pathlib import Path

from trainer.parallel.launch import run_workers

if __name__ == "__main__":
    mode, folder, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    result = run_workers(
        [sys.executable, str(Path(__file__).with_name("worker_script.py")), mode, str(folder)],
        workers=workers,
        log_dir=folder,
        env=os.environ,
        threads=1,
        gpu=False,
    )
    if result.failure is not None:
        print(result.failure.message(), file=sys.stderr)
    sys.exit(result.exit_code)
