"""lm-evaluation-harness by its command, and the model arguments that it gives to every model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_export import cli
from megalodon_export.bundles.checkpoints import default_checkpoint
from megalodon_export.generation.session import Session
from megalodon_export.measure.evaluation import Target, score_continuations

pytestmark = pytest.mark.usefixtures("one_thread")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megalodon-export[lm-eval]'")
BOS = 256
TASK = """
task: verses
dataset_path: json
dataset_kwargs: {{data_files: "{data}"}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
VERSES = [
    {"start": "In the beginning God created the heaven and the", "ends": ["earth", "zebra"]},
    {"start": "And God said, Let there be", "ends": ["light", "qqqqq"]},
]
Make = Callable[..., Any]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task "verses", whose data need no network."""
    monkeypatch.setattr(import_module("datasets.config"), "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "verses.jsonl").write_text("".join(json.dumps(verse) + "\n" for verse in VERSES))
    (tmp_path / "verses.yaml").write_text(TASK.format(data=tmp_path / "verses.jsonl"))
    return tmp_path


@pytest.fixture
def make() -> Make:
    """The model by its name, with arguments as `--model_args` gives them."""
    import_module("megalodon_export.lm_eval_adapter")
    from lm_eval.api.registry import get_model

    def made(arguments: str = "", **config: Any) -> Any:
        return get_model("megalodon").create_from_arg_string(arguments, {"device": "cuda:0", "batch_size": 1, **config})

    return made


# A run takes 6 s of CPU, of which the harness reads the files of its own tasks most of the time.
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--apply_chat_template"], marks=pytest.mark.slow),
        pytest.param(["run", "--model", "megalodon"], marks=pytest.mark.slow),
        pytest.param(["run", "--batch_size", "auto", "--device", "cpu"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_the_command_runs_a_task(tasks: Path, words: list[str]) -> None:
    """The default checkpoint, on this machine's device."""
    options = ["--tasks", "verses", "--include_path", str(tasks), "--output_path", str(tasks / "out.json")]
    before = list(sys.argv)
    assert cli.run(["lm-eval", *words, *options]) == 0
    assert sys.argv == before
    (report,) = tasks.glob("out*.json")
    results = json.loads(report.read_text())
    assert results["results"]["verses"]["acc,none"] == 1.0
    assert results["config"]["model"] == "megalodon"


@pytest.mark.slow  # a process that imports all of it: 10 s of CPU
def test_the_real_command(tasks: Path, command: Callable[..., subprocess.Popen[str]]) -> None:
    arguments = ["--model_args", f"pretrained={default_checkpoint()},dtype=float32", "--tasks", "verses"]
    process = command("lm-eval", *arguments, "--include_path", tasks, env={"HF_DATASETS_CACHE": str(tasks / "cache")})
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "|verses|" in output


@pytest.mark.slow
def test_their_own_command_runs_a_folder(tasks: Path) -> None:
    """`--model hf` with `trust_remote_code`, in a process that does not import this package."""
    arguments = ["--model", "hf", "--model_args", f"pretrained={default_checkpoint()},trust_remote_code=True"]
    command = [sys.executable, "-m", "lm_eval", *arguments, "--tasks", "verses", "--include_path", str(tasks)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|verses|" in done.stdout


def test_the_harness_answers_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["lm-eval"]) == 0
    assert "usage: lm-eval" in capsys.readouterr().out
    for arguments in (["--help"], ["run", "--help"], ["run"]):
        with pytest.raises(SystemExit) as ended:
            cli.run(["lm-eval", *arguments])
        assert not ended.value.code
        assert "usage: lm-eval" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.run(["lm-eval", "--no_such_option", "x"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks", "a"], ["run", "--model", "megalodon", "--tasks", "a"]),
        (["run", "-t", "a"], ["run", "--model", "megalodon", "-t", "a"]),
        *(([*run, *model, "-t", "a"], [*run, *model, "-t", "a"]) for run in ([], ["run"]) for model in
          (["--model", "hf"], ["--model=hf"], ["-M", "hf"], ["-Mhf"], ["--config", "x.yaml"], ["-C", "x.yaml"])),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["validate", "--tasks", "a"], ["validate", "--tasks", "a"]),
    ],
)  # fmt: skip
def test_the_model_is_ours_unless_another_is_named(arguments: list[str], expected: list[str]) -> None:
    assert import_module("megalodon_export.commands.harness").with_model(arguments) == expected


def test_the_others_models_stay() -> None:
    code = "import megalodon_export.lm_eval_adapter\nfrom lm_eval.api.registry import get_model\nget_model('dummy')"
    found = f"{code}\nfrom lm_eval.api.registry import model_registry\nprint('hf' in model_registry.keys())"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# ---- model arguments -------------------------------------------------------------------------------------------------


def test_arguments_of_their_own_models(make: Make, checkpoints: dict[str, Path]) -> None:
    """Those of `--model hf` that ask for what is done here anyway."""
    folder = checkpoints["tiny"]
    common = "dtype=auto,trust_remote_code=True,revision=main,backend=causal,use_fast_tokenizer=True,parallelize=False"
    lm = make(f"pretrained={folder},{common},max_gen_toks=7,logits_cache=False", max_batch_size=None)
    assert (lm.target.name, str(lm.target.runtime.device)) == (
        "eager",
        "cuda:0" if torch.cuda.is_available() else "cpu",
    )
    from lm_eval.api.instance import Instance

    (text,) = lm.generate_until([Instance("generate_until", {}, ("And God said", {}), 0)], True)
    session = Session(Target.open(folder, device=str(lm.target.runtime.device)).runtime, lm.target.tokenizer)
    assert text == "".join(session.generate("And God said", 7))
    half = make(f"pretrained={folder},dtype=bfloat16", device="cpu").target.runtime
    assert half.new_cache(1).layers[0].key.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("no_such=1", r"model arguments \['no_such'\] do not exist here; expected some of \['add_bos_token', 'batch"),
        ("parallelize=True", "parallelize is True, expected False or None"),
        ("peft=adapter", "peft is 'adapter', expected None: the model megalodon has no such option"),
        ("revision=v2", "revision is 'v2', expected 'main' or None"),
        ("max_length=0", "max_length is 0, expected a whole number from 1 on"),
        ("max_gen_toks=-1", "max_gen_toks is -1, expected"),
        ("prefix_token_id=x", "prefix_token_id is 'x', expected"),
        ("tokenizer=/nowhere", "tokenizer is '/nowhere', expected a folder with tokenizer.json"),
    ],
)
def test_arguments_that_are_refused(make: Make, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(arguments)


def test_add_bos_token(make: Make, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["tiny"]
    plain, with_bos, without = (make(f"pretrained={folder}{more}") for more in
                                ("", ",add_bos_token=True", ",add_bos_token=False"))  # fmt: skip
    assert plain.tok_encode("ab") == without.tok_encode("ab") == [97, 98]
    assert with_bos.tok_encode("ab") == [BOS, 97, 98]
    assert with_bos.tok_encode("ab", add_special_tokens=False) == [97, 98]
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, ("And", " God"), 0)]
    expected = score_continuations(plain.target.runtime, [([BOS, *b"And"], list(b" God"))])
    assert with_bos.loglikelihood(asked, True)[0][0] == pytest.approx(expected[0][0], rel=1e-5)


def test_prefix_token_id(make: Make, checkpoints: dict[str, Path]) -> None:
    lm = make(f"pretrained={checkpoints['tiny']},prefix_token_id=65")
    assert lm.prefix_token_id == 65
    from lm_eval.api.instance import Instance

    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("bc",), 0)], True)
    assert found == pytest.approx(score_continuations(lm.target.runtime, [([65], list(b"bc"))])[0][0], rel=1e-5)


def test_max_length_is_that_of_their_own_model(make: Make, checkpoints: dict[str, Path]) -> None:
    """The numbers of `--model hf` with the same limit, and its cut of a prompt."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = checkpoints["tiny"]
    tokenizer = default_checkpoint()  # of the same bytes, with what transformers needs
    options = {"dtype": "float32", "max_length": 16, "tokenizer": str(tokenizer)}
    theirs = HFLM(pretrained=str(folder), device="cpu", **options)
    ours = make(f"pretrained={folder},tokenizer={tokenizer},max_length=16", device="cpu", batch_size="auto")
    pairs = [("In the beginning God created the heaven and the", " earth"), ("And", " God said"), ("x" * 30, "y" * 16)]
    for kind, arguments in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [("In the beginning God created the heaven and the earth.",), ("a",)]),
    ):
        asked = [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]
        found, expected = (getattr(lm, kind)(asked, disable_tqdm=True) for lm in (ours, theirs))
        assert torch.tensor(found).flatten().tolist() == pytest.approx(
            torch.tensor(expected).flatten().tolist(), rel=1e-4
        ), kind
    asked = [Instance("generate_until", {}, (text, {"max_gen_toks": 6, "until": []}), 0) for text, _ in pairs]
    assert ours.generate_until(asked, True) == [
        "".join(Session(ours.target.runtime, ours.target.tokenizer).generate(text[-10:], 6)) for text, _ in pairs
    ]


def test_a_chat_template(make: Make) -> None:
    lm = make("", device="cpu")
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert lm.apply_chat_template(chat) == "a\nb"
    assert "is a base model" in lm.chat_template(True)
    assert lm.chat_template(False) is None
    assert "default" in lm.tokenizer_name
