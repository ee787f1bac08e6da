"""One worker of several that draw together. Arguments: FOLDER MODEL PREPARED, then strategies.

Of each strategy, the images lie in FOLDER/STRATEGY/drawn; which of them this worker drew is in
FOLDER/STRATEGY/rank-N.json.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from tests.evaluate.drawing.drawn_run import drawn_config
from trainer.evaluate.drawing import draw
from trainer.model_files.run_model import open_model
from trainer.optim.precision import set_fp32_arithmetic
from trainer.parallel.comm import close, init_comm
from trainer.parallel.worker import end_process
from trainer.train.build import build_run, make_scorer
from trainer.train.saved.averages import scored_weights


def main() -> None:
    folder, model, prepared, *strategies = sys.argv[1:]
    comm = init_comm(timeout_s=1200)
    set_fp32_arithmetic("fp32")
    own: list[str] = []
    sample_images = draw.sample_images

    def noted(**settings: object) -> object:
        own.append(str(settings["prompts"]))
        return sample_images(**settings)  # type: ignore[arg-type]

    draw.sample_images = noted  # type: ignore[assignment]
    for strategy in strategies:
        config = drawn_config(Path(model), Path(prepared), Path(folder) / strategy, memory={"strategy": strategy})
        run_model = open_model(config.model.path)
        run = build_run(config, run_model, comm)
        scorer = make_scorer(config, run_model, comm, run.parts.denoiser, run.prepared)
        with scored_weights(config.ema, run.parts)["live"]():
            scorer.draw(Path(folder) / strategy / "drawn", "step-00000000")
            fewer = replace(scorer, samples=scorer.samples.model_copy(update={"images": scorer.samples.images[:2]}))
            fewer.draw(Path(folder) / strategy / "fewer", "step-00000000")
        (Path(folder) / strategy / f"rank-{comm.rank}.json").write_text(json.dumps(own))
        own.clear()
    close(comm)
    end_process()


if __name__ == "__main__":
    main()
