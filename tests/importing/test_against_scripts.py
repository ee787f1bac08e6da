"""No option of the scripts themselves is unknown, where a copy of them is at hand; and prompts are read alike.

    SD_SCRIPTS=~/sd-scripts DIFFUSERS=~/diffusers ONETRAINER=~/OneTrainer pytest tests/importing/test_against_scripts.py

Only their text is read; of it runs what reads prompts.
"""

import ast
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trainer.config.prompt_file import read_prompts
from trainer.guards import parse_toml
from trainer.importing.diffusers_options import ADVANCED_TABLE, DREAMBOOTH_TABLE, TABLE
from trainer.importing.kohya_data import known_dataset_keys
from trainer.importing.kohya_options import FLAG, NOTHING_HERE, NUMBER, TEXT, TYPES, WHOLE, WORDS
from trainer.importing.onetrainer_settings import draft_of
from trainer.importing.recognised import import_any

_OF_KOHYA = (
    "sdxl_train.py", "sdxl_train_network.py", "train_network.py", "library/train_util.py", "library/utils.py",
    "library/sdxl_train_util.py", "library/custom_train_functions.py", "library/deepspeed_utils.py",
    "library/sai_model_spec.py",
)  # fmt: skip
_KINDS = {"int": WHOLE, "float": NUMBER, "str": TEXT, "int_or_float": NUMBER}


def copy_of(variable: str) -> Path:
    """The folder that an environment variable names."""
    if not (place := os.environ.get(variable)):
        pytest.skip(f"no copy of it: {variable} names none")
    return Path(place)


def options_of(files: list[Path]) -> dict[str, str]:
    """The kind of each option, by the calls of `add_argument` in the files."""
    found: dict[str, str] = {}
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their escapes
            tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
                continue
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            kind = _KINDS.get(keywords.get("type", "str"), TEXT)
            kind = FLAG if "store_true" in keywords.get("action", "") else kind
            kind = WORDS if keywords.get("nargs") in ("'*'", "'+'") else kind
            for name in node.args:
                if isinstance(name, ast.Constant) and str(name.value).startswith("--"):
                    found[str(name.value)[2:]] = kind
    return found


def assert_same_kinds(theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Each option is known, and takes a value, several or none as it does there."""
    assert not theirs.keys() - ours.keys()
    shape = {FLAG: "none", WORDS: "several"}
    assert {n: shape.get(kind, "one") for n, kind in theirs.items()} == {
        n: shape.get(ours[n], "one") for n in theirs
    }  # fmt: skip


def test_sd_scripts() -> None:
    root = copy_of("SD_SCRIPTS")
    theirs = options_of([root / file for file in _OF_KOHYA])
    assert len(theirs) > 190
    assert_same_kinds(theirs, TYPES)
    read = {name: kind for name, kind in theirs.items() if name not in NOTHING_HERE}
    # A number may be given where a whole one is asked for, not the other way round.
    assert not [n for n, kind in read.items() if kind == NUMBER and TYPES[n] == WHOLE]


def test_dataset_files_of_sd_scripts() -> None:
    """By the tables of its own checks, `*_SCHEMA`."""
    tree = ast.parse((copy_of("SD_SCRIPTS") / "library/config_util.py").read_text(encoding="utf-8"))
    keys: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and str(getattr(node.targets[0], "id", "")).endswith("_SCHEMA"):
            if node.targets[0].id == "ARGPARSE_SPECIFIC_SCHEMA":  # pyright: ignore[reportAttributeAccessIssue]
                continue
            assert isinstance(node.value, ast.Dict)
            for key in node.value.keys:
                constant = key.args[0] if isinstance(key, ast.Call) else key
                assert isinstance(constant, ast.Constant)
                keys.add(str(constant.value))
    assert len(keys) > 30
    assert not keys - known_dataset_keys()


def test_prompts_of_sd_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own two functions read the same files; names are those that it looks up when it draws."""
    tree = ast.parse((copy_of("SD_SCRIPTS") / "library/train_util.py").read_text(encoding="utf-8"))
    wanted = ("line_to_prompt_dict", "load_prompts")
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    toml = SimpleNamespace(load=lambda file: parse_toml(file.read(), "file"))
    module = ModuleType("library.train_util")  # the whole would import all that it trains with
    module.__dict__.update({"re": re, "json": json, "toml": toml, "List": list, "Dict": dict})
    monkeypatch.setitem(sys.modules, "library", ModuleType("library"))
    monkeypatch.setitem(sys.modules, "library.train_util", module)  # where one looks for the other
    exec(compile(ast.Module([*functions], []), "train_util.py", "exec"), module.__dict__)
    lines = ["a fox, 1girl --w 832 --h 1216 --d 42 --s 28 --l 6.5 --n low quality, (worst:1.2) --ss ddim",
             "a cat or 3--4 dogs --D 7 --L 5", "# no comment in JSON", "a house"]  # fmt: skip
    table = {"prompt": "a cat --w 8", "width": 832, "scale": 5, "seed": 0, "sample_steps": 9, "negative_prompt": "",
             "sample_sampler": "euler_a", "height": 64}  # fmt: skip
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n\n#\n")
    (tmp_path / "p.json").write_text(json.dumps([*lines, table]))
    toml_text = (
        "[prompt]\nwidth = 64\nscale = 2.5\n[[prompt.subset]]\nprompt = 'a'\nseed = 3\n[[prompt.subset]]\nheight = 8\n"
    )
    (tmp_path / "p.toml").write_text(toml_text + "prompt = 'a --d 4'\n")
    names = {"width": "width_px", "height": "height_px", "sample_steps": "steps", "scale": "guidance_scale",
             "sample_sampler": "sampler"}  # fmt: skip
    for name, count in (("p.txt", 3), ("p.json", 5), ("p.toml", 2)):
        found = module.__dict__["load_prompts"](str(tmp_path / name))
        assert len(found) == count
        expected = [{names.get(key, key): said for key, said in each.items() if key != "enum"} for each in found]
        read = [image.model_dump(exclude_unset=True) for image in read_prompts(tmp_path / name).values()]
        assert read == expected


def test_scripts_of_diffusers() -> None:
    root = copy_of("DIFFUSERS") / "examples"
    names = ("train_text_to_image_sdxl.py", "train_text_to_image_lora_sdxl.py")
    assert_same_kinds(options_of([root / "text_to_image" / name for name in names]), {**TABLE.types})
    dreambooth = options_of([root / "dreambooth/train_dreambooth_lora_sdxl.py"])
    assert_same_kinds(dreambooth, {**DREAMBOOTH_TABLE.types})
    assert dreambooth.keys() == DREAMBOOTH_TABLE.types.keys()
    advanced = options_of([root / "advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py"])
    assert_same_kinds(advanced, {**ADVANCED_TABLE.types})
    assert advanced.keys() == ADVANCED_TABLE.types.keys()


def settings_of(file: Path) -> Iterator[tuple[str, str, str]]:
    """(class, name, type) of each setting: `data.append((name, default, type, nullable))`."""
    for part in ast.parse(file.read_text(encoding="utf-8")).body:
        for node in ast.walk(part) if isinstance(part, ast.ClassDef) else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "data.append":
                entry = node.args[0]
                assert isinstance(entry, ast.Tuple) and isinstance(entry.elts[0], ast.Constant)
                yield part.name, str(entry.elts[0].value), ast.unparse(entry.elts[2])


def test_settings_of_onetrainer() -> None:
    values: dict[str, Any] = {"bool": True, "int": 2, "float": 0.5, "dict": {}}
    classes: dict[str, dict[str, Any]] = {}
    for owner, name, kind in settings_of(copy_of("ONETRAINER") / "modules/util/config/TrainConfig.py"):
        classes.setdefault(owner, {})[name] = values.get(kind, "WORD")
    settings, part = classes["TrainConfig"], classes["TrainModelPartConfig"]
    parts = dict.fromkeys(("unet", "text_encoder", "text_encoder_2", "vae"), part)
    given = (
        settings | parts | {"optimizer": classes["TrainOptimizerConfig"], "embedding": classes["TrainEmbeddingConfig"]}
    )
    folder = Path(__file__).parents[2] / "trainer/importing"
    read = "".join(file.read_text(encoding="utf-8") for file in folder.glob("onetrainer_*.py"))
    draft = draft_of(given)
    assert len(draft.given) > 300
    unknown = [name for name, reason in draft.reasons.items() if reason.startswith("nothing like it here")]
    assert not [name for name in unknown if f'"{name}"' not in read and f'{name.rpartition(".")[2]}"' not in read]


def test_presets_of_onetrainer(tmp_path: Path) -> None:
    """Those for SDXL, with a file of concepts where OneTrainer has it."""
    (tmp_path / "training_concepts").mkdir()
    (tmp_path / "training_concepts/concepts.json").write_text(json.dumps([{"path": "/data/a"}]))
    (tmp_path / "training_presets").mkdir()
    presets = (copy_of("ONETRAINER") / "training_presets/SDXL").glob("*.json")
    used = [file for file in presets if "inpaint" not in file.name]
    assert len(used) >= 3
    for preset in used:
        file = tmp_path / "training_presets" / preset.name
        file.write_bytes(preset.read_bytes())
        draft = import_any(file)
        assert draft.became.keys() == draft.given.keys()
