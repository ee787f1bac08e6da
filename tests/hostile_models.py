"""Hostile files of models: safetensors, pickles, folders with their configurations, indexes and tokenizers."""

import importlib
import json
import os
import pickle
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.hostile_files import CANARY, Hostile, kind

ESCAPES = ("\x1b[2J\x1b[31mred", "a\u202eexe.safe", "bell\x07\x08", "two\nlines\r", "\x9b2J", "\ud800half")


_BUILDERS = (
    "accelerate.big_modeling",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)


def inspected(path: Path, may_pass: bool = False) -> Hostile:
    return Hostile(path, argv=("inspect", str(path), "--quick"), may_pass=may_pass)


def tried(path: Path, folder: Path, random: Random, may_pass: bool = False) -> Hostile:
    """By any of the commands that take a model."""
    out = ("-o", str(folder / "out.safetensors"))
    ways: tuple[Callable[[], Hostile], ...] = (
        lambda: inspected(path, may_pass),
        lambda: started(path, folder, may_pass),
        lambda: started(Path(os.environ["HOSTILE_MODEL"]), folder, may_pass, vae=path),
        lambda: Hostile(path, argv=("export", str(path), *out, "--no-thumbnail"), may_pass=may_pass),
        lambda: Hostile(path, argv=("merge", str(path), str(path), "--alpha", "0.5", *out), may_pass=may_pass),
    )
    return random.choice(ways)()


def started(
    model: Path, folder: Path, may_pass: bool = False, builds: bool = False, vae: Path | None = None
) -> Hostile:
    """A run that starts from a model: what every command with a configuration does first."""
    (folder / "images").mkdir(exist_ok=True)
    config = folder / "run.yaml"
    config.write_text(
        f"run: {{dir: {folder / 'run'}}}\nmodel: {{path: {json.dumps(str(model))}"
        f"{f', vae: {json.dumps(str(vae))}' if vae else ''}}}\n"
        f"data: {{sources: [{{type: folder, path: {folder / 'images'}}}], prepared: {folder / 'prepared'}}}\n"
        "train: {steps: 1}\noptimizer: {lr: 1e-6}\n"
    )

    for module in _BUILDERS if builds else ():
        importlib.import_module(module)  # which takes seconds, and is no work on this file

    def start() -> None:
        from trainer.cli.arguments import read_run

        _, opened = read_run(config, [])
        if builds:
            from trainer.model.load_weights import empty_text_encoders, empty_unet, empty_vae
            from trainer.model.text import load_tokenizers

            load_tokenizers(opened.tokenizers)
            for build in (empty_unet, empty_vae, empty_text_encoders):
                build(opened)

    return Hostile(model, call=start, may_pass=may_pass)


def write_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS: tuple[Callable[[Random], tuple[object, bytes]], ...] = (
    lambda r: (b'{"a":' * r.randrange(10**5, 10**6), b""),
    lambda r: (b'{"a":' + b"[" * r.randrange(10**5, 10**6), b""),
    lambda r: (b'{"a":[' + b"0," * 8_000_000 + b"0]}", b""),
    lambda r: (b'{"a":"' + b'","b":"' * 4_000_000 + b'"}', b""),
    lambda r: (b'{"a":' + b"9" * r.randrange(10**5, 10**7) + b"}", b""),
    lambda r: (b'{"a":%b,"a":%b}' % (ONE, ONE), b"1234"),
    lambda r: ({"a": tensor([10**30], 0, 4)}, b"1234"),
    lambda r: ({"a": tensor([10**14] * 8, 0, 4)}, b"1234"),
    lambda r: ({"a": tensor([1] * 1000, 0, 4)}, b"1234"),
    lambda r: ({"a": tensor([-1], -4, 0)}, b"1234"),
    lambda r: ({"a": tensor([2], 0, 8), "b": tensor([2], r.randrange(1, 8), 12)}, b"1" * 12),
    lambda r: ({"a": tensor([1], 10**18, 10**18 + 4)}, b"1234"),
    lambda r: ({"a": tensor([1], 0, 10**400)}, b"1234"),
    lambda r: ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
    lambda r: ({"a": {"dtype": r.choice(ESCAPES), "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    lambda r: ({"a": {"dtype": ["F32"], "shape": {}, "data_offsets": None}}, b"1234"),
    lambda r: ({r.choice(ESCAPES): tensor([3], 0, 4)}, b"1234"),
    lambda r: ({"x" * 10_000_000: tensor([3], 0, 4)}, b"1234"),
    lambda r: ({str(n): tensor([], 0, 0) for n in range(150_000)}, b""),
    lambda r: ({"__metadata__": {"a": {"b": 1}}}, b""),
    lambda r: ({"__metadata__": "text"}, b""),
    lambda r: (b'{"a\xff\xfe": 1}', b""),
    lambda r: (b"{" + r.randbytes(5000), b""),
    lambda r: (b'{"a": NaN, "b": 1e999}', b""),
    lambda r: ([1, 2], b""),
)  # fmt: skip


@kind("safetensors-header")
def safetensors_header(random: Random, seed: int, folder: Path) -> Hostile:
    header, data = HEADERS[seed % len(HEADERS)](random)
    path = write_header(
        folder / f"{random.choice(('model', *ESCAPES[:4]))}.safetensors".replace("\n", ""), header, data
    )
    return tried(path, folder, random)


LENGTHS = (0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, 99_999_999)


@kind("safetensors-length")
def safetensors_length(random: Random, seed: int, folder: Path) -> Hostile:
    """The header's length is a lie, or the file ends somewhere, or some of its bytes are others."""
    path = folder / "model.safetensors"
    whole = {f"{name}.{n}": tensor([4], 4 * 4 * n, 4 * 4 * (n + 1)) for n, name in enumerate("abcdef")}
    write_header(path, whole, bytes(96), LENGTHS[seed] if seed < len(LENGTHS) else None)
    data = bytearray(path.read_bytes())
    if seed >= len(LENGTHS):
        if random.random() < 0.3:
            data = data[: random.randrange(len(data))]
        for _ in range(random.randrange(1, 4)):
            if data:
                data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data)
    if seed == len(LENGTHS):  # a hole of 40 MB that says to be a header
        with path.open("wb") as stream:
            stream.write((40_000_000).to_bytes(8, "little") + b"{")
            stream.truncate(50_000_000)
    return inspected(path, may_pass=seed > len(LENGTHS))


@kind("safetensors-names")
def safetensors_names(random: Random, seed: int, folder: Path) -> Hostile:
    """Whole files whose names and metadata steer a terminal, or are of no sensible size."""
    name = random.choice(ESCAPES[:5])
    metadata = {
        0: {f"modelspec.title{name}": name, "modelspec.prediction_type": name},
        1: {"ss_tag_frequency": "[" * 10**6},
        2: {"ss_tag_frequency": json.dumps({"a": {name: 10**40 - 1, "b": "x"}})},
        3: {str(n): name for n in range(200_000)},
        4: {"sdxl_train.configs": "[" * 10**5},
        5: {"sdxl_train.configs": json.dumps({"unet": {"block_out_channels": [3_200_000_000]}})},
        6: {"description": name * 10**6, "ss_training_comment": name},
        7: {"modelspec.hash_sha256": name, "modelspec.thumbnail": "data:image/png;base64," + "A" * 10**6},
    }[seed % 8]
    unet = {"model.diffusion_model.input_blocks.0.0.weight": tensor([320, 4, 3, 3], 0, 320 * 36 * 4)}
    ends = 320 * 36 * 4
    header = {"__metadata__": metadata, **unet, f"model.diffusion_model.{name}": tensor([1], ends, ends + 4)}
    path = write_header(folder / "model.safetensors", header, bytes(ends) + struct.pack("<f", float("nan")))
    if seed % 3 == 0:
        return Hostile(path, argv=("inspect", str(path), "--json"), may_pass=True)
    return Hostile(path, argv=("inspect", str(path)), may_pass=True) if seed % 3 == 1 else started(path, folder)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, _inside(path.parent):
        listener.bind(path.name)


class _inside:
    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, Path.cwd()

    def __enter__(self) -> None:
        os.chdir(self.folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)


OTHERS: tuple[Callable[[Path, Random], object], ...] = (
    lambda path, r: path.write_bytes(pickle.dumps(Runs(path.parent / CANARY), r.randrange(6))),
    lambda path, r: path.write_bytes(f"<html><title>{r.choice(ESCAPES[:5])}</title>".encode()),
    lambda path, r: path.write_bytes(f'{{"error": "{r.choice(ESCAPES[:5])}"}}'.encode()),
    lambda path, r: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize " + b"9" * 10**5),
    lambda path, r: path.write_bytes(bytes(100_000)),
    lambda path, r: path.write_bytes(r.randbytes(100_000)),
    lambda path, r: path.write_bytes(b"\x1f\x8b" + r.randbytes(1000)),
    lambda path, r: path.write_bytes(b"\x89PNG\r\n\x1a\n" + r.randbytes(1000)),
    lambda path, r: path.write_bytes(b"PK\x03\x04" + r.randbytes(1000)),
    lambda path, r: path.write_bytes(b"<" * 1_000_000 + b"title>" * 1000),
    lambda path, r: _fifo(path),
    lambda path, r: path.symlink_to("/dev/zero"),
    lambda path, r: path.symlink_to("/dev/urandom"),
    lambda path, r: path.symlink_to(path.name),
    lambda path, r: _socket(path),
    lambda path, r: path.mkdir(),
    lambda path, r: path.symlink_to("/proc/self/mem"),
    lambda path, r: path.symlink_to("/proc/self/environ"),
)


@kind("no-model")
def no_model(random: Random, seed: int, folder: Path) -> Hostile:
    """Something else under a model's name."""
    path = folder / f"model{random.choice(('.safetensors', '.ckpt', '.pt'))}"
    OTHERS[seed % len(OTHERS)](path, random)
    return tried(path, folder, random)


class Runs:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path, by: int = 0) -> None:
        self.canary, self.by = canary, by

    def __reduce__(self) -> tuple[object, ...]:
        ways = ((os.mkdir, (str(self.canary),)), (eval, (f"__import__('os').mkdir({str(self.canary)!r})",)),
                (os.system, (f"mkdir {self.canary}",)), (Path.mkdir, (self.canary,)))  # fmt: skip
        return ways[self.by % len(ways)]


def _op(op: bytes, text: bytes = b"") -> bytes:
    return op + struct.pack("<I", len(text)) + text


def _programs(canary: Path) -> tuple[Callable[[Random], bytes], ...]:
    mkdir = f"mkdir {canary}".encode()
    return (
        *(lambda r, p=p, by=by: pickle.dumps({"a": Runs(canary, by)}, p) for p in (0, 1, 2, 4, 5) for by in range(4)),
        lambda r: b"cos\nsystem\n(S'" + mkdir + b"'\ntR.",
        lambda r: b"(S'" + mkdir + b"'\nios\nsystem\n.",
        lambda r: b"(cos\nsystem\nS'" + mkdir + b"'\no.",
        lambda r: b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + b"\x8c" + bytes([len(mkdir)]) + mkdir + b"\x85R.",
        lambda r: b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n\x86R.",
        lambda r: b"\x80\x02ctorch.hub\nload\n)R.",
        lambda r: b"\x80\x02ctorch\nload\n)R.",
        lambda r: b"\x80\x02}" + b"]" * 900_000 + b".",
        lambda r: b"\x80\x02" + b"]0" * 4_000_000 + b".",
        lambda r: b"\x80\x04" + b"\x8f" * 8_000_000 + b".",
        lambda r: b"\x80\x02})" + b"2\x86" * 200 + b"K\x01s.",
        lambda r: b"\x80\x02})" + b"\x85" * 900_000 + b"K\x01s.",
        lambda r: b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x40\x85R.",
        lambda r: b"\x80\x02ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x40\x85\x81.",
        lambda r: b"\x80\x02c_codecs\nencode\n" + _op(b"X", b"x" * 10**6) + _op(b"X", b"punycode") + b"\x86R.",
        lambda r: b"\x80\x02I" + b"9" * 5_000_000 + b"\n.",
        lambda r: b"\x80\x02\x8b\xff\xff\xff\x7f.",
        lambda r: b"\x80\x02" + _op(b"X", "\x1b[2J\u202e".encode()) + b"ctorch\n\x1b[2Jevil\n.",
        lambda r: b"\x80\x02" + r.randbytes(2000),
        lambda r: bytes(r.choice(b"()]}0122tRsuqh\x85\x86\x87KN.") for _ in range(5000)),
    )  # fmt: skip


def write_archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@kind("pickle-program")
def pickle_program(random: Random, seed: int, folder: Path) -> Hostile:
    programs = _programs(folder / CANARY)
    program = programs[seed % len(programs)](random)
    path = folder / f"model{random.choice(('.ckpt', '.safetensors', '.pt'))}"
    if seed % 5 == 4:
        path.write_bytes(program)  # torch's old format has no archive around it
    else:
        write_archive(path, {"model/data.pkl": program, "model/byteorder": b"little", "model/data/0": bytes(64)})
    return tried(path, folder, random)


def _view(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 16, key: str = "0") -> bytes:
    """A state with one tensor, as torch pickles it."""
    numbers = [pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"") for value in (shape, stride)]
    integer = pickle.dumps(offset, 2)[2:-1], pickle.dumps(count, 2)[2:-1]
    stored = b"(" + _op(b"X", b"storage") + b"ctorch\nFloatStorage\n" + _op(b"X", key.encode()) + _op(b"X", b"cpu")
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + integer[1] + b"tQ" + integer[0] + b"".join(numbers)
    return b"\x80\x02}" + _op(b"X", b"a.weight") + made + b"\x89}tRs."


def _bomb(mebibytes: int) -> tuple[bytes, int, int]:
    """Zeros in raw deflate: (bytes, what they unpack to, checksum)."""
    packer, block, checksum = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20), 0
    data = b""
    for _ in range(mebibytes):
        data += packer.compress(block)
        checksum = zlib.crc32(block, checksum)
    return data + packer.flush(), mebibytes << 20, checksum


def _write_bomb(path: Path, name: str, mebibytes: int, declared: int | None) -> None:
    data, size, checksum = _bomb(mebibytes)
    told = size if declared is None else declared
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 8, 0, 0, checksum, len(data), told, len(name), 0)
    local += name.encode() + data
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, checksum, len(data), told,
                        len(name), 0, 0, 0, 0, 0, 0) + name.encode()  # fmt: skip
    path.write_bytes(local + entry + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(local), 0))


def _changed(path: Path, members: dict[str, bytes], change: Callable[[bytearray], object]) -> None:
    write_archive(path, members)
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def _flip(data: bytearray, random: Random) -> None:
    for _ in range(random.randrange(1, 5)):
        data[random.randrange(len(data))] = random.randrange(256)


GOOD = {"m/data.pkl": _view((4, 4), (4, 1)), "m/byteorder": b"little", "m/data/0": bytes(64)}


def _set(end: int, form: str, value: int) -> Callable[[bytearray], object]:
    return lambda data: struct.pack_into(form, data, len(data) - end, value)


ARCHIVES: tuple[Callable[[Path, Random], object], ...] = (
    lambda path, r: _write_bomb(path, "m/data.pkl", 1024, None),
    lambda path, r: _write_bomb(path, "m/data.pkl", 100, 1000),
    lambda path, r: _write_bomb(path, "m/data.pkl", 60, None),
    lambda path, r: write_archive(path, {**GOOD, **{f"m/{n}": b"" for n in range(120_000)}}),
    lambda path, r: write_archive(path, {**GOOD, "M/DATA.PKL": b"x", "other/data.pkl": b"y"}),
    lambda path, r: write_archive(path, {**GOOD, "m/data/0": bytes(64), "x" * 60_000: b""}, zipfile.ZIP_DEFLATED),
    lambda path, r: write_archive(path, {**GOOD, "m/byteorder": b"big\x1b[2J"}),
    lambda path, r: write_archive(path, {**GOOD, "m/byteorder": bytes(10**7)}),
    lambda path, r: write_archive(path, {**GOOD, "m/data.pkl": _view((1 << 40,), (0,))}),
    lambda path, r: write_archive(path, {**GOOD, "m/data.pkl": _view((1 << 20, 1 << 20), (1, 1))}),
    lambda path, r: write_archive(path, {**GOOD, "m/data.pkl": _view((4,), (1,), offset=-4)}),
    lambda path, r: write_archive(path, {**GOOD, "m/data.pkl": _view((4,), (1,), offset=14)}),
    lambda path, r: write_archive(path, {**GOOD, "m/data.pkl": _view((4,), (1,), key="../../../etc/passwd")}),
    lambda path, r: write_archive(path, {**GOOD, "m/data.pkl": _view((4,), (1,), count=1 << 60, key="\x1b[2J")}),
    lambda path, r: _changed(path, GOOD, _set(6, "<I", 0xFFFFFFF0)),  # where the directory begins
    lambda path, r: _changed(path, GOOD, _set(10, "<I", 0xFFFFFFFF)),  # bytes of the directory
    lambda path, r: _changed(path, GOOD, _set(12, "<H", 0xFFFF)),  # members
    lambda path, r: _changed(path, GOOD, lambda data: data.extend(b"PK\x05\x06" + bytes(10))),
    lambda path, r: _changed(path, GOOD, lambda data: data.__delitem__(slice(-r.randrange(1, 200), None))),
    lambda path, r: _changed(path, GOOD, lambda data: _flip(data, r)),
    lambda path, r: _changed(path, GOOD, lambda data: _flip(data, r)),
    lambda path, r: _changed(path, GOOD, lambda data: _flip(data, r)),
)


@kind("pickle-archive")
def pickle_archive(random: Random, seed: int, folder: Path) -> Hostile:
    path = folder / "model.ckpt"
    ARCHIVES[seed % len(ARCHIVES)](path, random)
    return tried(path, folder, random, may_pass=True)


def sound_model(folder: Path) -> Path:
    """A copy of a sound model, its files linked; they are replaced and never written to."""
    return Path(shutil.copytree(os.environ["HOSTILE_MODEL"], folder / "model", copy_function=os.link))


def replaced(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def edited(path: Path, **changes: object) -> None:
    replaced(path, json.dumps({**json.loads(path.read_bytes()), **changes}).encode())


UNET_CHANGES: tuple[dict[str, object], ...] = (
    {"block_out_channels": [3_200_000_000, 32]},
    {"block_out_channels": [16] * 10**5},
    {"block_out_channels": 16},
    {"block_out_channels": []},
    {"block_out_channels": [16, "32"]},
    {"block_out_channels": [16, 10**400]},
    {"block_out_channels": None},
    {"layers_per_block": 10**6},
    {"layers_per_block": -1},
    {"layers_per_block": [1] * 40},
    {"layers_per_block": True},
    {"transformer_layers_per_block": [10**6, 10**6]},
    {"transformer_layers_per_block": [[1, 2], [[3]]]},
    {"transformer_layers_per_block": "\x1b[2J"},
    {"transformer_layers_per_block": [32, 32]},
    {"reverse_transformer_layers_per_block": [[[[1]]]]},
    {"down_block_types": ["DownBlock2D", "\x1b[2Jblock"]},
    {"down_block_types": "CrossAttnDownBlock2D"},
    {"down_block_types": [{"a": 1}, None]},
    {"up_block_types": ["UpBlock2D"]},
    {"attention_head_dim": [0, 0]},
    {"attention_head_dim": [3, 5]},
    {"attention_head_dim": {"a": 1}},
    {"norm_num_groups": 7},
    {"norm_num_groups": 0},
    {"act_fn": "__import__('os')"},
    {"time_embedding_type": "\x1b[2J"},
    {"cross_attention_dim": 10**9},
    {"cross_attention_dim": "40"},
    {"in_channels": 10**8},
    {"conv_in_kernel": 10**6},
    {"num_class_embeds": 10**12},
    {"num_class_embeds": 900_000, "class_embed_type": None},
    {"projection_class_embeddings_input_dim": 2**62},
    {"addition_time_embed_dim": 1e308},
    {"only_cross_attention": "maybe"},
    {"attn_implementation": "somebody/kernel"},
    {"": 1, "\x1b[2J": {"\u202e": [1]}},
    {str(n): n for n in range(20_000)},
    {"deep": [[[[[[[[[[1]]]]]]]]]]},
)


@kind("unet-config")
def unet_config(random: Random, seed: int, folder: Path) -> Hostile:
    model = sound_model(folder)
    edited(model / "unet/config.json", **UNET_CHANGES[seed % len(UNET_CHANGES)])
    return started(model, folder, may_pass=True, builds=True)


TEXT_CHANGES: tuple[dict[str, object], ...] = (
    {"vocab_size": 3_000_000},
    {"vocab_size": 10**30},
    {"vocab_size": 500},
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": "3"},
    {"num_hidden_layers": -3},
    {"hidden_size": 10**9},
    {"hidden_size": 17},
    {"intermediate_size": 10**12},
    {"max_position_embeddings": 10**9},
    {"max_position_embeddings": 0},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"hidden_act": "\x1b[2J"},
    {"hidden_act": ["gelu"]},
    {"layer_norm_eps": "1e-5"},
    {"projection_dim": 10**10},
    {"attn_implementation": "somebody/kernel"},
    {"_attn_implementation": "somebody/kernel:run"},
    {"auto_map": {"AutoModel": "evil.Model"}},
    {"quantization_config": {"quant_method": "bitsandbytes"}},
    {"eos_token_id": 10**15},
    {"eos_token_id": [[1]]},
    {"dtype": "os.system"},
)


@kind("text-encoder-config")
def text_encoder_config(random: Random, seed: int, folder: Path) -> Hostile:
    model = sound_model(folder)
    edited(model / random.choice(("text_encoder", "text_encoder_2")) / "config.json",
           **TEXT_CHANGES[seed % len(TEXT_CHANGES)])  # fmt: skip
    return started(model, folder, may_pass=True, builds=True)


TEXTS: tuple[Callable[[Random], bytes], ...] = (
    lambda r: b"[" * 10**6,
    lambda r: b'{"a":' * 10**6,
    lambda r: b"{}" if r.random() < 0.5 else b"[]",
    lambda r: b"",
    lambda r: b"\xff\xfe\x00",
    lambda r: b'{"a": "' + b"x" * 5_000_000 + b'"}',
    lambda r: b'{"\x1b[2J": 1}',
    lambda r: b'{"a": 1, "a": 2}',
    lambda r: b'{"a": ' + b"1" * 10**6 + b"}",
    lambda r: r.randbytes(3000),
)
SMALL_FILES = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
               "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
               "tokenizer_2/vocab.json")  # fmt: skip


@kind("model-folder-file")
def model_folder_file(random: Random, seed: int, folder: Path) -> Hostile:
    """One small file of a model folder holds something else, or is no file."""
    model = sound_model(folder)
    path = model / SMALL_FILES[seed % len(SMALL_FILES)]
    way = random.randrange(len(TEXTS) + 2)
    if way < len(TEXTS):
        replaced(path, TEXTS[way](random))
    else:
        path.unlink()
        _fifo(path) if way == len(TEXTS) else path.symlink_to("/dev/zero")
    may_pass = (
        path.parent.name in ("scheduler", "tokenizer_2") or path.name == "tokenizer_config.json"
    )  # defaults stand in for these
    return started(model, folder, may_pass=may_pass) if seed % 3 else inspected(model, may_pass=True)


INDEXES: tuple[object, ...] = (
    {"weight_map": {"a": "../../../../etc/passwd"}},
    {"weight_map": {"a": "/dev/zero"}},
    {"weight_map": {"a": "\x1b[2J.safetensors"}},
    {"weight_map": {"a": 1, "b": None, "c": []}},
    {"weight_map": {str(n): f"{n}.safetensors" for n in range(50_000)}},
    {"weight_map": []},
    {"weight_map": {"a": "fifo.safetensors"}},
    {"weight_map": {"a": "a/../b.safetensors"}},
    [],
    {},
)


@kind("weights-index")
def weights_index(random: Random, seed: int, folder: Path) -> Hostile:
    model = sound_model(folder)
    (model / "unet/diffusion_pytorch_model.safetensors").unlink()
    _fifo(model / "unet/fifo.safetensors")
    index = model / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(INDEXES[seed % len(INDEXES)]))
    return started(model, folder) if seed % 2 else inspected(model)


def _words(random: Random, seed: int) -> dict[str, bytes]:
    """Files of a tokenizer, by name."""
    byte_words = {chr(200 + n): n for n in range(300)}
    changes: tuple[Callable[[], dict[str, bytes]], ...] = (
        lambda: {"vocab.json": json.dumps({str(n): n for n in range(800_000)}).encode()},
        lambda: {"vocab.json": b"{" + b",".join(b'"%d":%d' % (n, n) for n in range(3_000_000)) + b"}"},
        lambda: {"vocab.json": json.dumps({**byte_words, "\x1b[2J": -1}).encode()},
        lambda: {"vocab.json": json.dumps({**byte_words, "a": 10**30}).encode()},
        lambda: {"vocab.json": json.dumps({**byte_words, "a": "1"}).encode()},
        lambda: {"vocab.json": json.dumps(list(byte_words)).encode()},
        lambda: {"merges.txt": b"#version: 0.2\n\xff\xfe \xfd\n"},
        lambda: {"merges.txt": b"#version: 0.2\n" + b"a b\n" * 500_000},
        lambda: {"merges.txt": "#version: 0.2\n\x1b[2J \u202e\n".encode()},
        lambda: {"merges.txt": b"a" * 20_000_000},
        lambda: {"merges.txt": b"a b c d e\n"},
        lambda: {"tokenizer.json": b'{"model":' + b"[" * 10**5},
        lambda: {"tokenizer.json": json.dumps({"model": {"vocab": {"a": 10**9}}}).encode()},
        lambda: {"tokenizer.json": json.dumps({"model": None}).encode()},
        lambda: {"tokenizer_config.json": b'{"a":' * 10**5},
        lambda: {"special_tokens_map.json": json.dumps([1]).encode()},
    )
    return changes[seed % len(changes)]()


@kind("tokenizer")
def tokenizer(random: Random, seed: int, folder: Path) -> Hostile:
    model = sound_model(folder)
    for name, data in _words(random, seed).items():
        replaced(model / "tokenizer" / name, data)
    return started(model, folder)
