"""One worker of a run with an adapter. Arguments: the run's configuration, as YAML files."""

import sys
from pathlib import Path

from tests.train.real_run import model_of
from trainer.config.load import load_config
from trainer.parallel.comm import close, init_comm
from trainer.parallel.worker import end_process
from trainer.train import loop


def main() -> None:
    comm = init_comm(timeout_s=1200)
    for file in sys.argv[1:]:
        config = load_config(Path(file), check_paths=False)
        loop.train(config, model_of(config), comm, lambda: False)
    close(comm)
    end_process()


if __name__ == "__main__":
    main()
