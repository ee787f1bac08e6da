"""Steps of a real run on two hosts that a slow link joins, two workers on each: seconds and bytes, as a table.

    sdxl-train make-tiny --out data/tiny
    python benchmarks/hosts_speed.py [--mbit 100,400,1600] [--ways plain,int8] [--passes 1,4] [--steps 12]
    python benchmarks/hosts_speed.py --hidden 0.5 --batch 4 --passes 1

The hosts are network namespaces on this machine, whose link `tc tbf` limits (benchmarks/two_hosts.py);
`scripts/hosts.sh` starts the workers on each, torchrun and all. The model is the tiny SDXL of 15.6M weights at 64 px in
fp32. "s/step" is the median of whole steps, "MB/step" what has left the first host by its link in one, headers and all.
Beside the ways of `benchmarks/wire_bytes.py`, `--ways "zero2,zero2 within hosts"` spreads the weights over all workers,
or over those of each host; "one bucket" lets all gradients travel together, when the last one is known, and "buckets of
2 MiB" (1, 8, 16) so much of them. `--json` prints the rows for `benchmarks/scaling_points.py`. Linux only.

`--hidden SHARE` asks how much of the exchange hides behind the backward pass: each way is measured once over a link
that limits nothing, and then over one on which the same bytes take that share of that step. "alone" is a step of
workers who exchange nothing. All workers share this machine's cores with what sends: let the pass be long beside its
bytes (`--batch`), or the cores decide and not the link.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.two_hosts import ADDRESSES, TwoHosts, environment_of_hosts, sent_bytes
from benchmarks.wire_bytes import WAYS
from trainer.measure.telemetry import read_metrics

_SCRIPT = Path(__file__).parents[1] / "scripts" / "hosts.sh"
_SPREAD = {"zero2": {"strategy": "zero2"}, "zero2 within hosts": {"strategy": "zero2", "shard_within": "host"}}
_NO_LIMIT = 40_000  # Mbit/s: more than this machine sends
_ALONE = "alone"
_EXCHANGES = {
    **WAYS,
    "one bucket": {"bucket_mib": 65536},
    **{f"buckets of {size} MiB": {"bucket_mib": size} for size in (1, 2, 8, 16)},
    _ALONE: {"average_every": 1000},
}
_SETTLED = 2  # steps after which time and bytes are counted


def main() -> None:
    """Train in each way over each link and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", type=Path, default=Path("data/tiny"), help="folder of make-tiny (data/tiny)")
    parser.add_argument("--mbit", default="100,400,1600", help="of the link, each way")
    parser.add_argument("--ways", default="plain,int8")
    parser.add_argument("--passes", default="1,4", help="of accumulation")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1, help="images of a worker in a pass")
    parser.add_argument("--hidden", type=float, metavar="SHARE", help="of a step that its bytes shall take on the link")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no host is left running
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        rows = (print_hidden if arguments.hidden else print_speeds)(Path(folder), arguments)
    if arguments.json:
        print(json.dumps(rows))


def print_speeds(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each way over each link, a line each."""
    rows: list[dict[str, Any]] = []
    print("| link, Mbit/s | exchange | passes | s/step | MB/step |\n|---|---|---|---|---|")
    for mbit in map(int, arguments.mbit.split(",")):
        with TwoHosts(mbit) as hosts:
            for way in arguments.ways.split(","):
                for passes in map(int, arguments.passes.split(",")):
                    seconds, sent = train(hosts, folder, arguments, way, passes)
                    rows.append({"mbit": mbit, "way": way, "passes": passes, "step_s": seconds, "bytes": sent})
                    print(f"| {mbit:,} | {way} | {passes} | {seconds:.2f} | {sent / 1e6:.1f} |", flush=True)
    return rows


def print_hidden(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each way over a link on which its bytes take a share of its step, a line each."""
    rows: list[dict[str, Any]] = []
    print("| exchange | passes | alone, s | no limit, s | link, Mbit/s | on the link, s | s/step | of the longer |")
    print("|---|---|---|---|---|---|---|---|")
    for passes in map(int, arguments.passes.split(",")):
        with TwoHosts(_NO_LIMIT) as hosts:
            alone, _ = train(hosts, folder, arguments, _ALONE, passes)
        for way in arguments.ways.split(","):
            with TwoHosts(_NO_LIMIT) as hosts:
                free, sent = train(hosts, folder, arguments, way, passes)
            wire = arguments.hidden * free
            mbit = round(sent * 8 / 1e6 / wire)
            with TwoHosts(mbit) as hosts:
                seconds, sent = train(hosts, folder, arguments, way, passes)
            wire, longer = sent * 8 / 1e6 / mbit, max(free, sent * 8 / 1e6 / mbit)
            rows.append({"mbit": mbit, "way": way, "passes": passes, "step_s": seconds, "free_s": free, "bytes": sent})
            print(
                f"| {way} | {passes} | {alone:.2f} | {free:.2f} | {mbit:,} | {wire:.2f} | {seconds:.2f} "
                f"| {seconds / longer:.2f} |",
                flush=True,
            )
    return rows


def train(hosts: TwoHosts, folder: Path, arguments: argparse.Namespace, way: str, passes: int) -> tuple[float, float]:
    """Seconds of a step, and bytes that leave the first host in one."""
    run_dir, config = folder / "run", folder / "config.yaml"
    config.write_text(json.dumps(fields(arguments, run_dir, way, passes)))  # JSON is YAML
    env, log = environment_of_hosts() | {"WORKERS": "2"}, folder / "log.txt"
    with log.open("wb") as output:
        running = [
            hosts.start(host, [str(_SCRIPT), str(host), "2", ADDRESSES[0], str(config)], output, env) for host in (0, 1)
        ]
    seen: list[tuple[int, int]] = []
    while running[0].poll() is None:
        time.sleep(0.02)
        try:
            steps = (run_dir / "metrics.jsonl").read_bytes().count(b'"kind": "train"')
            sent = sent_bytes(running[0])
        except OSError:
            continue
        if steps >= _SETTLED and (not seen or steps > seen[-1][0]):
            seen.append((steps, sent))
    if any(host.wait() for host in running) or len(seen) < 2:
        raise RuntimeError(log.read_text()[-3000:])
    (first, before), (last, after) = seen[0], seen[-1]
    records = [record for record in read_metrics(run_dir) if record["kind"] == "train"]
    shutil.rmtree(run_dir)
    return median(record["step_s"] for record in records[_SETTLED:]), (after - before) / (last - first)


def fields(arguments: argparse.Namespace, run_dir: Path, way: str, passes: int) -> dict[str, Any]:
    """The run's configuration."""
    tiny = arguments.tiny.resolve()
    return {
        "run": {"dir": str(run_dir), "seed": 7},
        "launch": {"threads_per_worker": 1},
        "model": {"path": str(tiny / "model")},
        "data": {
            "sources": [{"path": str(tiny / "photos"), "repeats": 50}],
            "prepared": str(run_dir.parent / "prepared"),
            "buckets": {"resolution": 64, "min_px": 64, "max_px": 64, "step_px": 64},
            "workers": 0,
        },
        "train": {
            "steps": arguments.steps,
            "batch_size_per_gpu": arguments.batch,
            "global_batch_size": 4 * arguments.batch * passes,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"every": "never"},
        "memory": _SPREAD.get(way, {"strategy": "ddp"}),
        "exchange": {} if way in _SPREAD else _EXCHANGES[way],
    }


if __name__ == "__main__":
    main()
