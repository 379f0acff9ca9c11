"""The common tests of transformers that every model upstream has to pass, on Megalodon's classes and on Mamba2's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

from support import upstream_tests

SUITE = Path(upstream_tests.__file__).with_name("upstream_suite.py")

TINY = ("MegalodonModel", "MegalodonForCausalLM", "Mamba2Model", "Mamba2ForCausalLM")

# Slow: half a minute of a process, and a download; some minutes more with the mixin for exports. It buys what a stock
# transformers user takes for granted.
pytestmark = pytest.mark.slow

# Why tests skip, under any version of transformers: what it says, and why that does not concern Megalodon, or not here.
SKIPS = {
    r"requires (multiple |torch |)accelerator|requires MPS|requires CUDA": "the suite runs on a CPU",
    r"requires Flash Attention|requires the kernels library|on flash|FlashAttention|Flash Attention": (
        "attention is a part of the model, and is not taken from transformers' attention functions"
    ),
    r"support sdpa|attn_implementation=|does not support attentions|not output attentions|support output_attentions": (
        "the same; weights of attention are not returned, as no recurrent model upstream does"
    ),
    r"grouped_mm|no sparse experts|output_router_logits": "the model has no mixture of experts",
    r"RoPE": "rotary positions are those inside a chunk, and have no options",
    r"requires deepspeed": "DeepSpeed is not installed",
    r"not composite|No subconfigs|No sequence-to-sequence|position embeddings": "the model is one decoder for text",
    r"No conversion found": "checkpoints have the names that the classes have",
    r"TP plan": "tensor parallelism is not offered; docs/training.md has what is",
    r"not in `self.pipeline_model_mapping`|requires (vision|PyTesseract|Timm)|`run_pipeline_test` is currently not": (
        "the pipelines are those for features and for generating text"
    ),
    r"static cache format|compilation without graph breaks": (
        "there is one cache, of constant size; tests/model/test_compile.py has the passes over it as one graph each"
    ),
    r"doesn't use `position_ids`": (
        "they follow from the mask; tests/model/test_transformers_arguments.py passes them to generate()"
    ),
    r"No MTP keys": "the model predicts one token at a time",
    r"optimum-quanto": "the cache holds no keys and values beyond a chunk, and is not quantised",
    r"requires ExecuTorch": "ExecuTorch is not installed",
    r"capture_outputs|Cannot capture hidden states": "hidden states are collected by the passes, not by hooks",
    r"Not returning cache or non standard Cache": "the cache is a class of its own, under both names",
}


class Report:
    """What happened to each test of a class: its failures and why it skipped."""

    def __init__(self, path: Path, missing: str = "") -> None:
        self.missing = missing  # a sentence about mixins that could not be had
        self.failed: dict[str, list[str]] = {}
        self.skipped: dict[str, dict[str, list[str]]] = {}
        self.ran: dict[str, set[str]] = {}
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            suite, name = case.attrib["classname"].rsplit(".", 1)[-1], case.attrib["name"]
            reasons = [child.attrib.get("message", "") for child in case if child.tag == "skipped"]
            failures = [child.attrib.get("message", "") for child in case if child.tag in ("failure", "error")]
            if reasons:
                self.skipped.setdefault(suite, {})[name] = reasons
            else:
                self.ran.setdefault(suite, set()).add(name)
            if failures:
                self.failed.setdefault(suite, []).append(f"{name}: {failures[0]}")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    pytest.importorskip("parameterized", reason="transformers' tests need parameterized: pip install parameterized")
    folder = tmp_path_factory.mktemp("upstream")
    try:
        missing = upstream_tests.make_package(folder)
    except upstream_tests.NotToBeHad as reason:
        pytest.skip(str(reason))
    upstream_tests.write_summary(folder / "tiny", dict.fromkeys(TINY, "PreTrainedTokenizerFast"))
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-c", str(folder / "pytest.ini"), "--junitxml", str(folder / "report.xml"), str(SUITE)]
    path = os.pathsep.join([str(folder), *sys.path])
    own = {"PYTHONPATH": path, "TRANSFORMERS_TINY_MODEL_PATH": str(folder / "tiny")}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RUN_SLOW": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode in (0, 1), run.stdout + run.stderr  # 1: tests failed
    return Report(folder / "report.xml", missing)


def test_none_fails(report: Report) -> None:
    assert report.failed.get("MegalodonTest", []) == []


def test_every_skip_is_explained(report: Report) -> None:
    for name, reasons in report.skipped["MegalodonTest"].items():
        assert all(any(re.search(known, reason) for known in SKIPS) for reason in reasons), (name, reasons)


# What Mamba2 runs and Megalodon does not: tests of caches that transformers makes (see SKIPS), compiled or not.
NOT_RUN = {
    *("test_bc_cache_name_forward", "test_generate_with_static_cache", "test_generate_compilation_all_outputs"),
    *("test_generate_from_inputs_embeds_with_static_cache", "test_generate_compile_model_forward_fullgraph"),
    "test_static_cache_no_recompile_with_smaller_length",
}


def test_as_many_run_as_of_mamba2(report: Report) -> None:
    ran, of_mamba2 = report.ran["MegalodonTest"], report.ran["Mamba2Test"]
    assert len(ran) >= len(of_mamba2)
    assert of_mamba2 - ran <= NOT_RUN
    for name in report.ran:
        failed = len({failure.split(":")[0] for failure in report.failed.get(name, [])})  # a test may fail in parts
        print(f"{name}: {len(report.ran[name]) - failed} passed, {failed} failed, {len(report.skipped[name])} skipped")


def test_all_mixins_are_there(report: Report) -> None:
    if report.missing:
        pytest.skip(report.missing)
    assert "test_greedy_generate" in report.ran["MegalodonTest"]
    assert "test_pipeline_text_generation" in report.ran["MegalodonTest"]
    assert "test_torch_export_dynamic" in report.ran["MegalodonTest"]


@pytest.mark.parametrize(
    ("version", "said"), [("0.1", "is transformers 0.1, and"), (None, "mixins for generation, exp")]
)
def test_what_cannot_be_had_is_said(
    version: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    for name, text in (
        ("src/transformers/__init__.py", f'__version__ = "{version or transformers.__version__}"\n'),
        ("tests/test_modeling_common.py", ""),
    ):
        (checkout / name).parent.mkdir(parents=True)
        (checkout / name).write_text(text)
    monkeypatch.setenv(upstream_tests.SOURCE, str(checkout))
    try:
        sentence = upstream_tests.make_package(tmp_path / "made")
    except upstream_tests.NotToBeHad as reason:
        sentence = str(reason)
    assert said in sentence
    assert f"git clone --depth 1 --branch v{transformers.__version__} " in sentence
    assert "\n" not in sentence
