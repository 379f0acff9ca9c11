"""`eval`: perplexity is that of one pass of the model, in every runtime and any segmentation; prompts as `generate`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import megalodon_export
from megalodon_export import cli
from megalodon_export.bundles.checkpoints import default_checkpoint, load_model
from megalodon_export.export.onnx import export_onnx
from megalodon_export.measure.evaluation import (
    Score,
    Target,
    encode,
    perplexity,
    score,
    score_continuations,
    texts,
)
from megalodon_export.runtimes.eager import ModelRuntime
from support.golden_data import convert, load, write_checkpoint
from support.slow import slow_except

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters.",
    "",
    "And God said, Let there be light: and there was light.",
]
Eval = Callable[..., list[dict[str, float]]]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Eval:
    """`eval ... --json` in this process: the objects that it prints."""

    def run(*arguments: object) -> list[dict[str, float]]:
        capsys.readouterr()
        status = cli.run(["eval", *map(str, arguments), "--json"])
        output = capsys.readouterr()
        assert status == 0, output.err
        return [json.loads(line) for line in output.out.splitlines()]

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The texts as JSON lines, with a blank one and fields that nobody asked for."""
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "texts.jsonl"


def one_pass(folder: Path) -> tuple[float, int]:
    """Perplexity and scored tokens of TEXTS, each in one forward pass of the model, bytes between two end tokens."""
    model = load_model(folder, torch.float32)
    config, nats, count = model.config, 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[config.bos_token_id, *text.encode(), config.eos_token_id]])
        nats += F.cross_entropy(model(ids[:, :-1]).logits[0].double(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(nats / count), count


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_perplexity_of_a_checkpoint(evaluate: Eval, file: Path, batch: int) -> None:
    expected, count = one_pass(default_checkpoint())
    (found,) = evaluate(default_checkpoint(), "--ppl", file, "--batch", batch, "--device", "cpu")
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert math.exp(found["nats_per_token"]) == pytest.approx(expected, rel=1e-5)
    assert (found["tokens"], found["documents"], found["runtime"]) == (count, len(TEXTS), "eager")


# ONNX is slow: it exports the default checkpoint once more, with logits of every token.
@pytest.mark.parametrize("runtime", slow_except(["eager", "aoti", "onnx"], "eager", "aoti"))
def test_perplexity_of_the_default_bundles(
    evaluate: Eval, file: Path, default_bundle: Path, tmp_path: Path, runtime: str
) -> None:
    """AOTInductor's programs return the last logits alone, so they decode; the graphs of ONNX return all."""
    folder = default_bundle
    if runtime == "onnx":
        folder = tmp_path / "onnx"
        export_onnx(default_checkpoint(), folder, all_logits=True)
    (found,) = evaluate(folder, "--ppl", file, "--runtime", runtime, "--batch", 2)
    assert found["perplexity"] == pytest.approx(one_pass(default_checkpoint())[0], rel=1e-4)
    assert found["runtime"] == runtime


@pytest.mark.parametrize("segment", [7, 31, 128, 129, 1000])
def test_any_segmentation_scores_the_same(segment: int) -> None:
    target = Target.open(default_checkpoint(), device="cpu")
    documents = [encode(target, text) for text in TEXTS]
    found = score(target.runtime, documents, segment)
    expected, count = one_pass(default_checkpoint())
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.tokens == count


def test_documents_score_alone_what_they_score_together() -> None:
    target = Target.open(default_checkpoint(), device="cpu")
    documents = [encode(target, text) for text in TEXTS]
    alone = sum((score(target.runtime, [document]) for document in documents), Score())
    assert score(target.runtime, documents).nats == pytest.approx(alone.nats, rel=1e-5)


@pytest.mark.parametrize(("chunks", "golden"), [(0, "plain.loss"), (8, "inference.loss")])
def test_losses_of_the_originals_inference(tmp_path: Path, chunks: int, golden: str) -> None:
    """The original always truncates the statistics, at 8 chunks; here that is an option."""
    name = "model_inference_longdoc"
    convert(name)(write_checkpoint(name, tmp_path / "src"), tmp_path / "dst")
    runtime = ModelRuntime(load_model(tmp_path / "dst"))
    tensors = load(name)[1]
    found = score(runtime, list(tensors["tokens"]), truncate_chunks=chunks)
    assert found.nats == pytest.approx(tensors[golden].double().sum().item(), rel=1e-6)
    assert abs(tensors["plain.loss"].sum() - tensors["inference.loss"].sum()) > 1e-4 * found.nats


@pytest.mark.parametrize("runtime", ["eager", "aoti"])
def test_prompts_are_continued_as_generate_does(evaluate: Eval, file: Path, tiny_bundle: Path, runtime: str) -> None:
    options = {"temperature": 0.8, "seed": 3}
    flags = ("--max-new-tokens", 20, "--temperature", 0.8, "--seed", 3)
    found = evaluate(tiny_bundle, "--prompts", file, "--runtime", runtime, *flags)
    for text, line in zip(TEXTS, found, strict=True):
        session = megalodon_export.load(tiny_bundle, runtime=runtime, device="cpu")
        assert line == {"prompt": text, "generation": "".join(session.generate(text, 20, **options))}


def test_results_for_people(file: Path, capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    arguments = ["eval", str(tiny_bundle), "--ppl", str(file), "--prompts", str(file), "--max-new-tokens", "5"]
    assert cli.run(arguments) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"{file}: perplexity ")
    assert TEXTS[0] in output.out
    assert "exported with --all-logits is scored faster" in output.err


@pytest.mark.parametrize("line", ["nonsense", '{"txt": "a"}', '{"text": 3}', "[1]"])
def test_a_line_without_a_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r'x\.jsonl, line 2: expected an object like {"text": "..."}, got'):
        list(texts(tmp_path / "x.jsonl"))


LINES: dict[str, tuple[bytes, str]] = {
    "latin-1": (b'{"text": "caf\xe9"}', "line 2 is not UTF-8 at byte 13"),
    "cut": (b'{"text": "a\xe2\x82"}', "line 2 is not UTF-8 at byte 11"),
    "half a character": (rb'{"text": "\u00e9\ud83d"}', "line 2: the text is not UTF-8 at byte 2"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    line, message = LINES[name]
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xc3\xa9"}\r\n' + line + b"\n")
    found = texts(tmp_path / "x.jsonl")
    assert next(found) == "é"
    with pytest.raises(ValueError, match=rf"x\.jsonl, {message}$"):
        next(found)


WRONG: dict[str, tuple[Callable[[Target], object], str]] = {
    "an id": (lambda t: score(t.runtime, [[1, 2], [3, 300]]), r"token id 300 of document 1 is outside 0\.\.256"),
    "a float": (lambda t: score(t.runtime, [torch.tensor([1.5])]), r"token id 1\.5 of document 0 is of type float"),
    "a text": (lambda t: score(t.runtime, ["abc"]), "token ids of document 0 are 'abc', expected a sequence"),
    "segment": (lambda t: score(t.runtime, [[1, 2]], segment=0), "segment is 0, expected at least 1"),
    "truncation": (
        lambda t: score(t.runtime, [[1, 2]], truncate_chunks=2),
        r"truncate_chunks is 2, expected 0 \(off\)",
    ),
    "no truncation": (
        lambda t: score(t.runtime, [[1]], truncate_chunks=True),
        "truncate_chunks is True, expected an int",
    ),
    "a context": (
        lambda t: score_continuations(t.runtime, [([1], [2]), ([3, -1], [4])]),
        r"token id -1 of request 1 is outside 0\.\.256",
    ),
    "batch": (lambda t: perplexity(t, Path("none"), batch=0), "batch is 0, expected at least 1"),
    "bytes": (lambda t: encode(t, b"abc"), "the document is b'abc' of type bytes, expected text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_before_anything_is_scored(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(Target.open(default_checkpoint(), device="cpu"))


def test_failures(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    checkpoint = default_checkpoint()
    cases: list[tuple[int, list[object], str]] = [
        (2, [checkpoint], "nothing to do; give --ppl FILE, --prompts FILE or both"),
        (1, [checkpoint, "--ppl", tmp_path / "none.jsonl"], "No such file"),
        (1, [checkpoint, "--ppl", tmp_path / "empty.jsonl"], "has no token to score"),
        (1, [checkpoint, "--ppl", file, "--runtime", "aoti"], "is a checkpoint, which runs in eager mode"),
        (1, [tiny_bundle, "--ppl", file, "--dtype", "bfloat16"], "is a bundle in float32; leave out the dtype"),
        (1, [tmp_path, "--ppl", file], "has no tokenizer.json"),
    ]
    for status, arguments, message in cases:
        assert cli.run(["eval", *map(str, arguments)]) == status
        output = capsys.readouterr()
        assert output.out == ""
        assert message in output.err
