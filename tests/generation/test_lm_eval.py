"""The model of lm-evaluation-harness: the numbers of one pass of the model, the texts of a session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_export.bundles.checkpoints import load_model
from megalodon_export.generation.session import Session
from megalodon_export.measure.evaluation import Target, score, score_continuations

pytestmark = pytest.mark.usefixtures("one_thread")
START = 256  # of the tiny models, whose other token ids are bytes
ADAPTER = "megalodon_export.measure.lm_eval_adapter"
# More than a chunk of 64 and than a batch; every length of continuation; context and continuation empty in turn.
PAIRS = [
    ("In the beginning God created the heaven and the earth. " * 3, "And the earth was without form"),
    ("And", " God"),
    ("And God said, ", "Let there be light"),
    ("", "In the beginning"),
    ("a", ""),
    (" ", "b"),
    ("And God saw the light, that it was good: " * 5, "a"),
]
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def adapter() -> Any:
    """The module, which needs the package."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megalodon-export[lm-eval]'")
    return import_module(ADAPTER)


@pytest.fixture
def make(adapter: Any, checkpoints: dict[str, Path]) -> Make:
    """An instance of the registered class on the tiny checkpoint; `can_score=False` scores by decode steps."""
    from lm_eval.api.registry import get_model

    def lm(folder: Path = checkpoints["tiny"], can_score: bool = True, **options: Any) -> Any:
        made = get_model("megalodon").create_from_arg_obj({"pretrained": folder, "device": "cpu"}, options)
        made.target.runtime.can_score = can_score
        return made

    return lm


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """As the harness makes them."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def one_pass(folder: Path, context: str, continuation: str) -> tuple[float, bool]:
    """The continuation's log-probability in one pass of the model, and whether its tokens are the likeliest.

    Spaces at the end of a context belong to the continuation: the harness's rule.
    """
    whole, context = context + continuation, context.rstrip(" ")
    ids = torch.tensor([[*([] if context else [START]), *whole.encode()]])
    first = max(len(context.encode()), 1)
    with torch.no_grad():
        logits = load_model(folder, torch.float32)(ids).logits[0, first - 1 : -1].double()
    targets = ids[0, first:]
    return logits.log_softmax(-1).gather(1, targets[:, None]).sum().item(), torch.equal(logits.argmax(-1), targets)


@pytest.mark.parametrize("can_score", [True, False])
@pytest.mark.parametrize("batch", [1, 3, "auto"])
def test_loglikelihood(make: Make, checkpoints: dict[str, Path], batch: int | str, can_score: bool) -> None:
    found = make(batch_size=batch, can_score=can_score).loglikelihood(requests("loglikelihood", PAIRS), True)
    for (context, continuation), (nats, greedy) in zip(PAIRS, found, strict=True):
        expected, likeliest = one_pass(checkpoints["tiny"], context, continuation)
        assert nats == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert greedy == likeliest


@pytest.mark.parametrize("can_score", [True, False])
def test_greedy_continuations_are_known(checkpoints: dict[str, Path], can_score: bool) -> None:
    """The model's own continuation is greedy, at every length; with any of its tokens changed it is not."""
    target = Target.open(checkpoints["tiny"], device="cpu")
    target.runtime.can_score = can_score
    context = list(b"And God said")
    own = list(Session(target.runtime).generate_ids(context, 5, eos_token_id=-1))
    changed = [[(t + (i == j)) % 256 for j, t in enumerate(own)] for i in range(5)]
    rows = [(context, row) for row in [*(own[:n] for n in range(1, 6)), *changed]]
    assert [greedy for _, greedy in score_continuations(target.runtime, rows)] == [True] * 5 + [False] * 5


@pytest.mark.parametrize("can_score", [True, False])
def test_rolling_is_the_score_of_the_document(make: Make, can_score: bool) -> None:
    texts = [context + continuation for context, continuation in PAIRS] + [""]
    lm = make(batch_size=3, can_score=can_score)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]), True)
    runtime = make().target.runtime
    expected = [-score(runtime, [[START, *text.encode()]]).nats for text in texts]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_programs_score_what_the_model_scores(make: Make, onnx_bundles: dict[str, Path]) -> None:
    pairs = [(context[:40], continuation[:4]) for context, continuation in PAIRS]
    for name, folder in onnx_bundles.items():
        lm = make(folder, can_score=False, runtime="onnx", batch_size=64)
        assert lm.batch_size == 8  # what the programs take
        found = lm.loglikelihood(requests("loglikelihood", pairs), True)
        expected = [one_pass(folder, *pair)[0] for pair in pairs]
        assert [nats for nats, _ in found] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_generate_until_is_the_text_of_a_session(make: Make, checkpoints: dict[str, Path]) -> None:
    session = Session(Target.open(checkpoints["tiny"], device="cpu").runtime, make().target.tokenizer)

    def alone(context: str, count: int, stop: tuple[str, ...] = ()) -> str:
        session.reset()
        return "".join(session.generate(context, count, stop))

    contexts = ["And God said", "", "In the beginning God created the heaven and the earth. " * 2, "a"]
    whole = [alone(context, 24) for context in contexts]
    stop = whole[0][7:9]
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"max_gen_toks": 24}, whole),
        ({"max_new_tokens": 5, "do_sample": False, "temperature": 0.7}, [alone(text, 5) for text in contexts]),
        ({"until": [stop, ""], "max_gen_toks": 24}, [alone(text, 24, (stop,)) for text in contexts]),
        ({"until": stop, "max_gen_toks": 24}, [alone(text, 24, (stop,)) for text in contexts]),
        ({"until": None, "temperature": 0.0, "max_tokens": 3}, [alone(text, 3) for text in contexts]),
    ]
    asked = requests("generate_until", [(text, options) for options, _ in cases for text in contexts])
    found = make(batch_size=3).generate_until(asked, True)
    assert found == [text for _, expected in cases for text in expected]
    assert whole[0].split(stop)[0] == found[len(contexts) * 2] != whole[0]
    assert import_module(ADAPTER).generation_options({}) == {"max_new_tokens": 256, "stop": []}


def test_repeated_samples_differ(make: Make) -> None:
    """Rows of one batch and of the next; all of them again with the same seed."""
    sampled = [("And", {"max_gen_toks": 12, "do_sample": True, "seed": 3})] * 5
    found, again = (make(batch_size=2).generate_until(requests("generate_until", sampled), True) for _ in range(2))
    assert found == again
    assert len(set(found)) == 5


def test_failures(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"generation options \['num_beams'\] do not exist here; expected some of"):
        make().generate_until(requests("generate_until", [("a", {"num_beams": 4})]), True)
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1, or auto"):
        make(batch_size=0)
    lm = make()
    for name in ("bos_token_id", "eos_token_id"):
        monkeypatch.setattr(lm.target.runtime.config, name, None)
    with pytest.raises(ValueError, match="has neither bos_token_id nor eos_token_id"):
        lm.loglikelihood(requests("loglikelihood", [("", "a")]), True)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    with pytest.raises(ImportError, match=r"pip install 'megalodon-export\[lm-eval\]'"):
        import_module(ADAPTER)
