"""One of several workers that validate; arguments: CONFIG.json OUT_DIR. Each writes what it came to."""

import json
import sys
from pathlib import Path

from trainer.config.schema import Config
from trainer.config.sections.ema_config import LIVE
from trainer.data.store.snapshot import PreparedSet
from trainer.evaluate.validating.validation_result import as_record, record_values
from trainer.model_files.run_model import open_model
from trainer.optim.precision import set_fp32_arithmetic
from trainer.parallel.comm import close, init_comm
from trainer.train.build import load_denoiser, make_scorer

if __name__ == "__main__":
    config = Config.model_validate(json.loads(Path(sys.argv[1]).read_text()))
    comm, model = init_comm(), open_model(config.model.path)
    set_fp32_arithmetic(config.train.precision)
    prepared = PreparedSet.open(config.data.prepared)
    denoiser = load_denoiser(config, model, Path(str(config.model.path)), LIVE, prepared, comm.device)
    result = make_scorer(config, model, comm, denoiser, prepared).validate_fully()
    told = {"record": as_record(result), "values": record_values(result)}
    told["images"] = [[i.key, i.bucket, i.copies, i.losses] for i in result.held_out.images]
    (Path(sys.argv[2]) / f"rank-{comm.rank}.json").write_text(json.dumps(told))
    close(comm)
