"""What importing and opening import: a bundle runs without transformers and without a compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.slow import slow_except

# Packages and modules that take long to import, and that only training, exporting and the Auto classes need.
HEAVY = ("transformers", "triton", "torchao", "torch._inductor", "torch._dynamo", "onnxscript", "accelerate")


def imported_by(code: str, *arguments: object) -> set[str]:
    """The modules in `sys.modules` of a new process after it has run the code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> set[str]:
    return {name for name in HEAVY if name in modules}


def test_importing_the_package_imports_little() -> None:
    added = imported_by("import megalodon_export") - imported_by("")
    packages = {name.split(".")[0] for name in added}
    assert packages <= {"megalodon_export", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("runtime", "bundle"), [("aoti", "tiny_bundle"), ("onnx", "tiny_onnx_bundle"), ("eager", "tiny_bundle")]
)
def test_a_bundle_opens_and_runs_without_heavy_packages(
    request: pytest.FixtureRequest, runtime: str, bundle: str
) -> None:
    folder: Path = request.getfixturevalue(bundle)
    code = (
        "import sys, megalodon_export\n"
        "session = megalodon_export.load(sys.argv[1], runtime=sys.argv[2], device='cpu')\n"
        "assert ''.join(session.generate('In the beginning', 4)) is not None\n"
        "session.restore(session.snapshot())"
    )
    assert heavy(imported_by(code, folder, runtime)) == set()


REGISTERED = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
for auto, name in ((AutoModel, "MegalodonModel"), (AutoModelForCausalLM, "MegalodonForCausalLM")):
    for model in (auto.from_pretrained(sys.argv[1]), auto.from_config(config)):
        assert type(model).__name__ == name, type(model)
assert type(config).__name__ == "MegalodonConfig", type(config)
"""
ORDERS = {
    "ours first": "import megalodon_export",
    "transformers first": "import transformers, megalodon_export",
    "the Auto classes first": "from transformers import AutoConfig, AutoModelForCausalLM\nimport megalodon_export",
    "the config's Auto class first": "from transformers import AutoConfig\nimport megalodon_export",
    # Modules that import the Auto classes in the middle of their own import, or that the model needs.
    "a model of transformers' between": "import megalodon_export\nfrom transformers import LlamaForCausalLM",
    "generation between": "import megalodon_export\nfrom transformers import GenerationMixin, PreTrainedModel",
    "our classes between": "import megalodon_export\nfrom megalodon_export.model import MegalodonForCausalLM",
    "our classes alone": "from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM",
}


# The slow ones are the finer cases of the same hook; each starts a process that imports transformers.
@pytest.mark.parametrize("order", slow_except(ORDERS, "ours first", "transformers first"))
def test_the_auto_classes_know_the_model_in_every_order_of_imports(checkpoints: dict[str, Path], order: str) -> None:
    imported_by(f"import sys\n{ORDERS[order]}\n{REGISTERED}", checkpoints["tiny"])


def test_the_hook_leaves_when_its_work_is_done(checkpoints: dict[str, Path]) -> None:
    count = "print(sum(type(finder).__name__ == '_RegistrationHook' for finder in sys.meta_path), file=sys.stderr)"
    code = f"import sys, megalodon_export\n{count}\nfrom transformers import AutoModel\n{count}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["1", "0"]


@pytest.mark.slow
def test_a_failed_registration_is_a_warning() -> None:
    code = (
        "import sys, warnings, megalodon_export\n"
        "sys.modules['megalodon_export.model.transformers_api.modeling'] = None\n"
        "with warnings.catch_warnings(record=True) as found:\n"
        "    warnings.simplefilter('always')\n"
        "    from transformers import AutoModelForCausalLM\n"
        "assert any('Auto classes do not know Megalodon' in str(one.message) for one in found), found"
    )
    imported_by(code)
