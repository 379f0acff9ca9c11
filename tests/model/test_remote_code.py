"""Folders that transformers loads with `trust_remote_code=True` where nobody has imported this package."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import megalodon_export.model as m
from megalodon_export.bundles.checkpoints import default_checkpoint
from megalodon_export.model.transformers_api.remote_code import AUTO_MAP
from support.small_models import SMALL, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
FILE = "modeling_megalodon.py"
ROOT = Path(__file__).parents[2]

# `transformers serve` loads the processor, the config, and the class that config.json names under "architectures".
WITHOUT_THE_PACKAGE = """
import sys, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, pipeline
folder, copy = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    sys.exit("loaded without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
assert "megalodon_export" not in sys.modules
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
served = getattr(transformers, config.architectures[0])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model) is served, type(model)
model.save_pretrained(copy)
generate = pipeline("text-generation", model=copy, tokenizer=folder, trust_remote_code=True)
print(generate("In the beginning", do_sample=False, max_new_tokens=12)[0]["generated_text"])
"""


def test_a_folder_loads_where_nobody_imported_the_package(tmp_path: Path) -> None:
    folder, copy = default_checkpoint(), tmp_path / "copy"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("In the beginning", return_tensors="pt")
    assert done.stdout.rstrip("\n") == tokenizer.decode(model.generate(**prompt, do_sample=False, max_new_tokens=12)[0])
    stored, again = (load_file(one / "model.safetensors") for one in (folder, copy))
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("made_by", ["recipe", "folders", "tiny_onnx_bundle"])
def test_folders_have_the_file_and_the_map(request: pytest.FixtureRequest, made_by: str) -> None:
    made = default_checkpoint() if made_by == "recipe" else request.getfixturevalue(made_by)
    place: Path = made("hf_base") if callable(made) else made
    assert json.loads((place / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert (place / FILE).read_text() == (ROOT / "model" / "transformers_api" / FILE).read_text()


def test_the_file_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = runpy.run_path(str(default_checkpoint() / FILE))
    assert {name: classes[name] for name in ("MegalodonConfig", "MegalodonModel", "MegalodonForCausalLM")} == {
        "MegalodonConfig": m.MegalodonConfig,
        "MegalodonModel": m.MegalodonModel,
        "MegalodonForCausalLM": m.MegalodonForCausalLM,
    }
    for name in ("megalodon_export", "megalodon_export.model"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ImportError, match="is in the package megalodon-export; install it first: pip install"):
        runpy.run_path(str(default_checkpoint() / FILE))


def test_a_missing_dependency_is_not_taken_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megalodon_export.model", None)
    with pytest.raises(ModuleNotFoundError, match=r"import of megalodon_export\.model halted"):
        runpy.run_path(str(default_checkpoint() / FILE))


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}], ids=["plain", "trusted"])
def test_the_file_is_not_run_where_the_package_is_imported(tmp_path: Path, options: dict[str, Any]) -> None:
    """Whatever it says: the Auto classes know the model then."""
    make_model(torch.float32).save_pretrained(tmp_path)
    (tmp_path / FILE).write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, **options)) is m.MegalodonForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path, **options)) is m.MegalodonConfig
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 8}], ids=["chunks", "window"])
def test_registered_classes_are_saved_as_before(tmp_path: Path, options: dict[str, Any]) -> None:
    """transformers registers the classes that `trust_remote_code` loads; so may a user."""
    model = make_model(torch.float32, **options)
    for one in (model.config, model, model.model):
        type(one).register_for_auto_class()
    type(model).register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    model.config.save_pretrained(tmp_path / "config")
    for name, files in {
        "whole": {"generation_config.json", "model.safetensors"},
        "base": {"model.safetensors"},
    }.items():
        assert {path.name for path in (tmp_path / name).iterdir()} == {FILE, "config.json", *files}
    assert json.loads((tmp_path / "config" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "whole", trust_remote_code=True)) is type(model)
    assert type(AutoModel.from_pretrained(tmp_path / "base", trust_remote_code=True)) is type(model.model)
    (tmp_path / "file").touch()
    with pytest.raises(AssertionError, match="should be a directory, not a file"):
        model.config.save_pretrained(tmp_path / "file")


def test_a_subclass_elsewhere_is_saved_as_upstream_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model.py").write_text(
        "from megalodon_export.model import MegalodonForCausalLM\nclass MyModel(MegalodonForCausalLM): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    MyModel = import_module("my_model").MyModel
    MyModel.register_for_auto_class("AutoModelForCausalLM")
    MyModel(m.MegalodonConfig(**SMALL)).save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").auto_map == {
        **AUTO_MAP,
        "AutoModelForCausalLM": "my_model.MyModel",
    }
    assert (tmp_path / "saved" / "my_model.py").is_file()
    assert PreTrainedModel._auto_class is None
    assert m.MegalodonForCausalLM._auto_class is None


def test_the_map_names_the_folders_own_file_again() -> None:
    """A config of a repository has its name before the file's."""
    theirs = {key: f"owner/name--{name}" for key, name in AUTO_MAP.items()}
    assert m.MegalodonConfig(auto_map=theirs).auto_map == AUTO_MAP
    other = {"AutoModel": "owner/name--other.Model", "AutoTokenizer": "tokens.Tokenizer"}
    assert m.MegalodonConfig(auto_map=other).auto_map == {**AUTO_MAP, **other}


# ---- chat ------------------------------------------------------------------------------------------------------------

CHATS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"role": "user", "content": "In the beginning"}], "In the beginning"),
    (
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": " c "}],
        "a\nb\n c ",
    ),
    ([{"role": "user", "content": [{"type": "text", "text": "In"}, {"type": "text", "text": " the"}]}], "In the"),
]


@pytest.mark.parametrize(("messages", "text"), CHATS, ids=["one", "several", "parts"])
def test_the_default_checkpoint_continues_a_chat_as_text(messages: list[dict[str, Any]], text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == list(text.encode())
    assert "is a base model" in tokenizer.chat_template
    recipe = ROOT / "artifacts" / "recipe" / "chat_template.jinja"
    assert recipe.read_text() == (default_checkpoint() / recipe.name).read_text()
