#!/usr/bin/env bash
# From nothing to a trained tiny SDXL: installs, makes a tiny model and a data set of real photographs,
# trains it with four workers, and says where to look. Run it again at any time.
source "$(dirname "$0")/venv.sh"
sdxl-train make-tiny --out data/tiny
sdxl-train configs/tiny.yaml "$@"
scripts/eval.sh runs/tiny --weights ema
sdxl-train report runs/tiny
cat <<'TXT'

Look at these:
  runs/tiny/report.html                   the run on one page, for a browser: losses, samples, time, data set, settings
  runs/tiny/eval/*/samples.png            drawn by the model, above the data seen through the VAE
  runs/tiny/checkpoints/step-*/unet/      the weights, as diffusers opens them; in unet_ema their average
  runs/tiny/metrics.jsonl                 every number of the run; TensorBoard: tensorboard --logdir runs/tiny

Next: README.md, "Train on your own images".
TXT
