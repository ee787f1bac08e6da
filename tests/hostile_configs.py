"""Hostile configurations and overrides, and run directories that somebody passed on."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.hostile_files import CANARY, Hostile, kind
from trainer.config.prompt_file import read_prompts

ESCAPES = ("\x1b[2J\x1b[31mred", "a\u202eexe.safe", "\x9b2J", "\u2028line")
BASE = "run: {dir: r}\nmodel: {path: m}\ndata: {sources: [{type: folder, path: i}], prepared: p}\ntrain: {steps: 1}\n"


def laughs(levels: int) -> str:
    """Aliases of aliases: a small file of 9^levels values."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


TEXTS: tuple[Callable[[Random, Path], str | bytes], ...] = (
    lambda r, f: laughs(r.randrange(5, 12)),
    lambda r, f: "run: " + "[" * r.randrange(10**4, 10**5),
    lambda r, f: "run: " + "{a: " * r.randrange(10**4, 10**5),
    lambda r, f: "".join(" " * n + "a:\n" for n in range(1000)),
    lambda r, f: "- " * 10**5,
    lambda r, f: "? " * 10**5,
    lambda r, f: "run: &a [*a, *a]\n",
    lambda r, f: "run: &a {b: *a}\n",
    lambda r, f: "x" * 600_000,
    lambda r, f: "a: b\n" * 100_000,
    lambda r, f: "".join(f"k{n}: 1\n" for n in range(60_000)),
    lambda r, f: 'run: "' + "\\x41" * 100_000 + '"\n',
    lambda r, f: "run: " + "9" * 500_000 + "\n",
    lambda r, f: "run: 0x" + "f" * 500_000 + "\n",
    lambda r, f: "run: 1e" + "9" * 1000 + "\n",
    lambda r, f: f"run: !!python/object/apply:os.mkdir [{f / CANARY}]\n",
    lambda r, f: f"!!python/object/new:os.system ['mkdir {f / CANARY}']\n",
    lambda r, f: f"run: !<tag:yaml.org,2002:python/name:os.system> x\ncanary: {f / CANARY}\n",
    lambda r, f: "%YAML 1.2\n" * 10_000 + "---\na: 1\n",
    lambda r, f: "---\na: 1\n" * 10_000,
    lambda r, f: f'"{r.choice(ESCAPES)[:1].encode("unicode_escape").decode()}key": 1\n' + BASE,
    lambda r, f: f"model: {{path: {json.dumps(r.choice(ESCAPES))}}}\n",
    lambda r, f: f"{json.dumps(r.choice(ESCAPES))}: {json.dumps(r.choice(ESCAPES))}\n",
    lambda r, f: f"train: {{precision: {json.dumps(r.choice(ESCAPES))}}}\n",
    lambda r, f: "run:\n\tdir: x\n",
    lambda r, f: b"run: \xff\xfe\n",
    lambda r, f: b"run: \x00\x1b[2J\n",
    lambda r, f: r.randbytes(10_000),
    lambda r, f: "[[]]: 1\n{a: b}: 2\n? [x]\n: y\n",
    lambda r, f: "<<: {a: 1}\nrun: {<<: [1, 2]}\n",
    lambda r, f: 'run: {dir: "\\ud800"}\n' + BASE,
    lambda r, f: BASE + "optimizer: {lr: .nan}\nsamples: {prompts: [" + "a, " * 15_000 + "]}\n",
    lambda r, f: BASE + f"optimizer: {{lr: 1{'_0' * 1000}}}\n",
    lambda r, f: BASE + "optimizer: {lr: 1e-6}\nlimits: {json_depth: 999999999999, image_bytes: -1}\n",
    lambda r, f: "".join(r.choice("ab:-[]{},&*!|>'\"%@`#?\n\t 19~<.\\") for _ in range(20_000)),
    lambda r, f: "".join(r.choice((BASE, "a: ", "- ", "{", "]", "\n", "&a ", "*a", "|\n", '"')) for _ in range(300)),
)  # fmt: skip


@kind("yaml")
def yaml_file(random: Random, seed: int, folder: Path) -> Hostile:
    text = TEXTS[seed % len(TEXTS)](random, folder)
    path = folder / f"run{random.choice(('', *ESCAPES[:3]))}.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return Hostile(path, argv=("plan" if seed % 2 else "train", str(path)))


@kind("no-yaml")
def no_yaml_file(random: Random, seed: int, folder: Path) -> Hostile:
    path = folder / "run.yaml"
    ways: tuple[Callable[[], object], ...] = (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to("/proc/self/mem"),
        lambda: path.symlink_to("/dev/stdin"),
        lambda: None,
    )
    ways[seed % len(ways)]()
    if seed % len(ways) == 5:  # what is there depends on who runs the tests
        path.unlink()
        os.mkfifo(path)
    return Hostile(path, argv=(random.choice(("train", "plan", "prepare")), str(path)))


OVERRIDES = (
    "train.steps=" + "[" * 10_000,
    "train.steps=" + "9" * 10_000,
    "\x1b[2J.a=1",
    "train.\x1b[2J=\x1b[31m",
    "train.precision=\u202efp16",
    "a" * 100_000 + "=1",
    ".".join(["a"] * 5000) + "=1",
    "data.sources.99999999999999999999=1",
    "data.sources.0.\x9b=1",
    "train.steps=&a [*a]",
    "train.steps=!!python/object/apply:os.system [true]",
    "samples.prompts=" + "- " * 1000,
)


@kind("override")
def override(random: Random, seed: int, folder: Path) -> Hostile:
    path = folder / "run.yaml"
    path.write_text(BASE)
    return Hostile(path, argv=("plan", str(path), OVERRIDES[seed % len(OVERRIDES)]))


PROMPTS: tuple[Callable[[Random], tuple[str, str | bytes]], ...] = (
    lambda r: ("json", "[" * 10**6),
    lambda r: ("json", "[" + '{"prompt": "a"},' * 60_000 + "3]"),
    lambda r: ("json", json.dumps([{r.choice(ESCAPES): r.choice(ESCAPES)}, r.choice(ESCAPES)])),
    lambda r: ("json", '[{"prompt": "\\ud800"}, {"prompt": "a", "seed": ' + "9" * 10**5 + "}]"),
    lambda r: ("json", r.randbytes(10_000)),
    lambda r: ("toml", "prompt=" + "[" * r.randrange(10**4, 10**6)),
    lambda r: ("toml", ".".join("a" * 5 * 10**5) + "=1"),
    lambda r: ("toml", "[prompt]\n" + "[[prompt.subset]]\n" * 40_000),
    lambda r: ("toml", "[prompt]\nseed = " + "9" * 10**6),
    lambda r: ("toml", f"[prompt]\n{json.dumps(r.choice(ESCAPES))} = 1\n[[prompt.subset]]\n"),
    lambda r: ("toml", "".join(r.choice("ab=[]{}.,\"'#\n\\ 19_") for _ in range(20_000))),
    lambda r: ("txt", "a --w 9" * 10**5),
    lambda r: ("txt", f"a --{r.choice('nwhdsl')}{r.choice(ESCAPES)} {r.choice(ESCAPES)}\n" * 400),
    lambda r: ("txt", b"a\x00\xff --w 8"),
)


@kind("prompts")
def prompts(random: Random, seed: int, folder: Path) -> Hostile:
    ending, text = PROMPTS[seed % len(PROMPTS)](random)
    file = folder / f"prompts.{ending}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return Hostile(file, call=lambda: read_prompts(file))


MANIFESTS: tuple[Callable[[Random], bytes], ...] = (
    lambda r: b"[" * 10**6,
    lambda r: b'{"files": ' + b'{"a":' * 10**5,
    lambda r: b'{"files": null}',
    lambda r: b'{"files": {"../../../../etc/passwd": {"size": 1, "xxh3_128": "0"}}}',
    lambda r: b'{"files": {"/dev/zero": {"size": 1, "xxh3_128": "0"}}}',
    lambda r: json.dumps({"files": {"\x1b[2J\u202e": {"size": 1, "xxh3_128": "0"}}}).encode(),
    lambda r: json.dumps({"files": {"a\x00b": {"size": 1, "xxh3_128": "0"}}}).encode(),
    lambda r: b'{"files": {"a": {"size": ' + b"9" * 10**6 + b', "xxh3_128": "0"}}}',
    lambda r: b'{"files": {"a": {"size": 1e999, "xxh3_128": []}}}',
    lambda r: json.dumps({"files": {str(n): {"size": 1, "xxh3_128": "0"} for n in range(200_000)}}).encode(),
    lambda r: b'{"files": {"fifo": {"size": 0, "xxh3_128": "0"}}}',
    lambda r: b'{"files": {"a": 1}, "files": {"b": 2}}',
    lambda r: bytes(20_000_000),
    lambda r: r.randbytes(1000),
)


@kind("manifest")
def manifest(random: Random, seed: int, folder: Path) -> Hostile:
    """A run directory whose newest checkpoint has this manifest."""
    checkpoint = folder / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    os.mkfifo(checkpoint / "fifo")
    (folder / "run" / "config.resolved.yaml").write_text(BASE + "optimizer: {lr: 1e-6}\n")
    path = checkpoint / "manifest.json"
    path.write_bytes(MANIFESTS[seed % len(MANIFESTS)](random))
    if seed % 2:
        return Hostile(path, argv=("export", str(folder / "run"), "-o", str(folder / "out.safetensors")))

    def damage() -> None:
        from trainer.checkpoint.manifest import find_damage
        from trainer.errors import UserError

        found = find_damage(checkpoint)
        if found:
            raise UserError(f"{checkpoint}: {found}")

    return Hostile(path, call=damage)
