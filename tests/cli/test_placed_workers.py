"""Workers of the command run where `launch.cores` says, and their readers with them."""

import json
import os
import sys
from pathlib import Path

import pytest

from trainer.cli.crew import Crew
from trainer.cli.keep_running import keep_running
from trainer.config.load import load_config
from trainer.errors import UserError
from trainer.host.card_choice import CardsInUse
from trainer.parallel import worker
from trainer.parallel.launch import run_workers

RIGHT = Path(__file__).parents[1] / "config" / "right.yaml"
TELL = (
    "import json, os, sys\n"
    "from trainer.parallel.worker import run_worker\n"
    "run_worker(lambda stop: open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w')"
    ".write(json.dumps([sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']])))\n"
)


def crew(workers: int, *, gpu: bool = False, began_with: int | None = None) -> Crew:
    return Crew(workers, gpu, CardsInUse(()), began_with or workers)


def test_each_worker_stays_where_it_was_put(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    own = [{worker.CORES: str(cpus[0]), "OMP_NUM_THREADS": "3"}, {worker.CORES: ",".join(map(str, cpus))}]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", TELL, str(tmp_path)]
    result = run_workers(argv, workers=2, log_dir=tmp_path / "logs", env=env, threads=1, gpu=False, own_env=own)
    assert result.exit_code == 0, result
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert told == [[[cpus[0]], "3"], [cpus, "1"]]


def test_lists_of_the_configuration() -> None:
    first = min(os.sched_getaffinity(0))
    config = load_config(RIGHT, [f'launch.cores=["{first}", "{first}"]'], check_paths=False)
    assert [each.text for each in crew(2).placed(config)] == [str(first)] * 2
    assert len(crew(1, began_with=2).placed(config)) == 1  # a card is gone
    with pytest.raises(UserError, match=r"launch.cores: 2 lists for 3 workers"):
        crew(3).placed(config)
    with pytest.raises(UserError, match=r"launch.cores"):
        load_config(RIGHT, ['launch.cores=["0 to 3"]'], check_paths=False)
    with pytest.raises(UserError, match=r"launch.cores: 3-1: must be CPU numbers and ranges"):
        crew(1).placed(load_config(RIGHT, ['launch.cores=["3-1"]'], check_paths=False))


def test_without_cards_workers_are_left_to_the_kernel() -> None:
    config = load_config(RIGHT, [], check_paths=False)
    assert crew(2).placed(config) == []
    none = load_config(RIGHT, ["launch.cores=none"], check_paths=False)
    assert crew(2, gpu=True).placed(none) == []


def test_a_wrong_list_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    config = load_config(RIGHT, [f"run.dir={tmp_path / 'run'}", 'launch.cores=["0", "0"]'], check_paths=False)
    with pytest.raises(UserError, match=r"launch.cores: 2 lists for 1 workers"):
        keep_running("train", config, crew(1), tmp_path, {})
