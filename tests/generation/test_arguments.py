"""What callers give to a session: the right result, or one sentence before anything is fed, in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megalodon_export import Session
from megalodon_export.generation.arguments import text, token_ids
from megalodon_export.generation.sampling import SamplingParams
from megalodon_export.generation.text import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

OPENING = [73, 110, 32]


@pytest.fixture(params=["eager", "aoti", "onnx"])
def session(request: pytest.FixtureRequest, opened: dict[str, Session]) -> Session:
    """A fresh session; the runtime is shared."""
    return Session(opened[request.param].runtime, opened[request.param].tokenizer)


@pytest.fixture
def refuses(session: Session) -> Callable[..., None]:
    """Calls that must be refused while a stream is being generated. It then goes on as if they had not been made."""
    expected = list(session.fork().generate_ids(OPENING, 5, eos_token_id=-1))

    def check(message: str, *calls: Callable[[], object]) -> None:
        session.reset()
        generation = session.generate_ids(OPENING, 5, eos_token_id=-1)
        written = [next(generation) for _ in range(3)]
        for call in calls:
            with pytest.raises(ValueError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert [*written, *generation] == expected

    return check


# ---- token ids -------------------------------------------------------------------------------------------------------

OUTSIDE: dict[str, Any] = {
    **{str(one): one for one in (257, -1, 1_000_000, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1)},
    "numpy": np.int64(257),
    "numpy unsigned": np.uint64(2**64 - 1),
    "torch": torch.tensor(257),
}
NO_ID: dict[str, tuple[Any, str]] = {
    "True": (True, "True is of type bool"),
    "False": (False, "False is of type bool"),
    "1.0": (1.0, r"1\.0 is of type float"),
    "1.5": (1.5, r"1\.5 is of type float"),
    "NaN": (float("nan"), "nan is of type float"),
    "a string": ("1", "'1' is of type str"),
    "None": (None, "None is of type NoneType"),
    "a list": ([1], r"\[1\] is of type list"),
    "numpy float": (np.float32(1), r"1\.0 is of type float"),
    "numpy bool": (np.True_, "True is of type bool"),
    "numpy array": (np.array([1]), r"\[1\] is of type list"),
    "torch float": (torch.tensor(1.0), r"1\.0 is of type float"),
    "torch bool": (torch.tensor(True), "True is of type bool"),
    "torch vector": (torch.tensor([1]), r"\[1\] is of type list"),
}


def feeds(session: Session, one: Any) -> list[Callable[[], object]]:
    """Every call that takes the token id."""
    return [
        lambda: session.prefill([1, one]),
        lambda: session.decode(one),
        lambda: session.generate_ids([1, 2, one], 3),  # at the call, not at the first token
    ]


@pytest.mark.parametrize("name", OUTSIDE)
def test_ids_outside_the_vocabulary(session: Session, refuses: Callable[..., None], name: str) -> None:
    one = OUTSIDE[name]
    refuses(rf"^token id {int(one)} is outside 0\.\.256; is this the model's tokenizer\?$", *feeds(session, one))


def test_an_id_too_long_to_print(session: Session, refuses: Callable[..., None]) -> None:
    refuses(r"^token id a huge integer is outside 0\.\.256", *feeds(session, 10**5000))


@pytest.mark.parametrize("name", NO_ID)
def test_ids_that_are_no_integers(session: Session, refuses: Callable[..., None], name: str) -> None:
    one, message = NO_ID[name]
    refuses(rf"^token id {message}, expected an integer in 0\.\.256$", *feeds(session, one))


NO_PROMPT: dict[str, tuple[Any, str]] = {
    "a number": (5, "token ids are 5, expected a sequence"),
    "None": (None, "token ids are None, expected a sequence"),
    "text": ("abc", "token ids are 'abc', expected a sequence"),
    "bytes": (b"abc", "token ids are b'abc', expected a sequence"),
    "numpy scalar": (np.array(5), "token ids are 5, expected a sequence"),
    "torch scalar": (torch.tensor(5), "token ids are 5, expected a sequence"),
    "numpy rows": (np.array([[1, 2]]), r"token id \[1, 2\] is of type list"),
    "torch rows": (torch.tensor([[1, 2]]), r"token id \[1, 2\] is of type list"),
    "ragged": ([1, [2, 3]], r"token id \[2, 3\] is of type list"),
    "numpy floats": (np.array([1.0, 2.0]), r"token id 1\.0 is of type float"),
    "torch floats": (torch.tensor([1.5]), r"token id 1\.5 is of type float"),
    "torch booleans": (torch.tensor([True]), "token id True is of type bool"),
    "an encoding": ({"input_ids": [1]}, "token id 'input_ids' is of type str"),
}


@pytest.mark.parametrize("name", NO_PROMPT)
def test_prompts_that_are_no_rows_of_ids(session: Session, refuses: Callable[..., None], name: str) -> None:
    prompt, message = NO_PROMPT[name]
    refuses(message, lambda: session.prefill(prompt), lambda: session.generate_ids(prompt, 3))


SEQUENCES: dict[str, Callable[[list[int]], Any]] = {
    **{"tuple": tuple, "iterator": iter, "numpy": np.array, "torch": torch.tensor},
    "uint8": lambda ids: np.array(ids, dtype=np.uint8),
    "uint64": lambda ids: np.array(ids, dtype=np.uint64),
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "numpy scalars": lambda ids: list(map(np.int64, ids)),
    "torch scalars": lambda ids: list(map(torch.tensor, ids)),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("ids", [[0], [0, 1], OPENING], ids=str)
def test_any_sequence_of_integers_is_a_prompt(session: Session, name: str, ids: list[int]) -> None:
    """An array of one 0 too, which is false in Python, but no empty prompt."""
    expected = list(session.generate_ids(ids, 6, eos_token_id=-1))
    session.reset()
    assert list(session.generate_ids(SEQUENCES[name](ids), 6, eos_token_id=-1)) == expected
    session.reset()
    logits = session.prefill(ids)
    session.reset()
    assert torch.equal(session.prefill(SEQUENCES[name](ids)), logits)


@pytest.mark.parametrize("one", [np.int64(7), np.uint8(7), np.array(7), torch.tensor(7)], ids=repr)
def test_any_integer_is_a_token_id(session: Session, one: Any) -> None:
    session.prefill(OPENING)
    fork = session.fork()
    assert torch.equal(session.decode(one), fork.decode(7))


def test_empty_arrays_are_empty_prompts(session: Session) -> None:
    expected = list(session.fork().generate_ids([], 4))
    for empty in (np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64), ()):
        assert list(session.fork().generate_ids(empty, 4)) == expected


def test_a_text_of_unknown_ids_names_its_row(opened: dict[str, Session]) -> None:
    session = Session(opened["aoti"].runtime, byte_tokenizer(("<|endoftext|>", "<|more|>")))
    with pytest.raises(ValueError, match=r"^token id 257 of prompt 1 is outside 0\.\.256"):
        session.generate_batch(["a", "b<|more|>", "c"], 3)
    with pytest.raises(ValueError, match=r"^token id 257 is outside 0\.\.256"):
        session.generate("b<|more|>", 3)


PROGRAM_CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "beyond": (lambda p: p.decode(torch.tensor([1, 300])), r"token id 300 of row 1 is outside 0\.\.256"),
    "negative": (
        lambda p: p.prefill(torch.tensor([[1, 2], [3, -1]]), torch.tensor([2, 2])),
        "token id -1 of row 1 is outside",
    ),
    "floats": (lambda p: p.decode(torch.tensor([1.0, 2.0])), r"token_ids are of torch\.float32, expected integers"),
    "booleans": (lambda p: p.decode(torch.tensor([True, False])), r"token_ids are of torch\.bool, expected integers"),
    "unsigned": (
        lambda p: p.decode(torch.tensor([1, 2], dtype=torch.uint64)),
        r"token_ids are of torch\.uint64, expected integers",
    ),
    "a list": (lambda p: p.decode([1, 2]), r"token_ids are of type list, expected a tensor \(B,\)"),
    "numpy": (lambda p: p.decode(np.array([1, 2])), "token_ids are of type ndarray, expected a tensor"),
    "one row": (lambda p: p.decode(torch.tensor([1])), r"must be \(B,\) with B = 2, got \(1,\)"),
    "two dimensions": (lambda p: p.decode(torch.tensor([[1], [2]])), r"must be \(B,\) with B = 2, got \(2, 1\)"),
    "lengths": (
        lambda p: p.prefill(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 3])),
        r"lengths must be \(B,\) = \(2,\) integers in 0\.\.2, got \[2, 3\]",
    ),
}


@pytest.mark.parametrize("name", PROGRAM_CALLS)
def test_programs_refuse_before_they_run(session: Session, name: str) -> None:
    programs = session.runtime.bind(session.runtime.new_cache(2))
    programs.prefill(torch.tensor([OPENING, OPENING]), torch.tensor([3, 1]))
    before = [tensor.clone() for tensor in programs.cache.tensors()]
    call, message = PROGRAM_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(programs)
    assert all(torch.equal(*pair) for pair in zip(programs.cache.tensors(), before, strict=True))


# ---- texts and numbers -----------------------------------------------------------------------------------------------

NO_TEXT: dict[str, tuple[Any, str]] = {
    "None": (None, "None of type NoneType, expected text"),
    "bytes": (b"abc", "b'abc' of type bytes, expected text"),
    "a number": (3, "3 of type int, expected text"),
    "a list": (["abc"], r"\['abc'\] of type list, expected text"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_prompts_that_are_no_text(session: Session, refuses: Callable[..., None], name: str) -> None:
    value, message = NO_TEXT[name]
    refuses(f"^the prompt is {message}: a str$", lambda: session.generate(value))
    refuses(rf"^prompts\[1\] is {message}: a str$", lambda: session.generate_batch(["x", value]))


NOT_UTF8 = {b"\xff": 0, b"ab\xff": 2, b"\xc3\xa9\xe2\x82": 2, b"caf\xe9": 3, b"\xf0\x9f\x99\x82 \xed\xa0\x80": 5}


@pytest.mark.parametrize("data", NOT_UTF8, ids=repr)
def test_texts_that_are_not_utf8(session: Session, refuses: Callable[..., None], data: bytes) -> None:
    """As Python reads them from a command line: each byte that is wrong is a surrogate."""
    value, place = data.decode(errors="surrogateescape"), f"is not UTF-8 at byte {NOT_UTF8[data]}$"
    with pytest.raises(UnicodeDecodeError) as reference:
        data.decode()
    assert reference.value.start == NOT_UTF8[data]
    refuses(f"^the prompt {place}", lambda: session.generate(value))
    refuses(rf"^prompts\[0\] {place}", lambda: session.generate_batch([value]))
    refuses(f"^stop {place}", lambda: session.generate("x", stop=value))
    refuses(rf"^stop\[1\] {place}", lambda: session.generate("x", stop=["a", value]))
    refuses(rf"^stop\[0\] {place}", lambda: session.generate_batch(["x"], stop=[value]))


def test_half_a_character_of_utf16_is_not_utf8() -> None:
    with pytest.raises(ValueError, match=r"^the prompt is not UTF-8 at byte 3$"):
        text("é\n\ud800x")
    assert text("é🙂\0") == "é🙂\0"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("abc", r"^prompts is 'abc' of type str, expected a list of texts$"),
        (b"abc", r"^prompts is b'abc' of type bytes, expected a list of texts$"),
        (None, r"^prompts is None of type NoneType, expected a list of texts$"),
        (3, r"^prompts is 3 of type int, expected a list of texts$"),
        ([[1, 2]], r"^prompts\[0\] is \[1, 2\] of type list, expected text: a str$"),
        ([], r"a batch of 0 is outside 1\.\.8"),
    ],
    ids=["str", "bytes", "None", "int", "ids", "empty"],
)
def test_batches_that_are_no_lists_of_texts(
    session: Session, refuses: Callable[..., None], prompts: Any, message: str
) -> None:
    refuses(
        message if session.runtime.limits.max_batch == 8 else message.replace(r"\.\.8", ""),
        lambda: session.generate_batch(prompts, 3),
    )


NO_COUNT: dict[str, tuple[Any, str]] = {
    "0": (0, "0, expected at least 1"),
    "-1": (-1, "-1, expected at least 1"),
    "2**63": (2**63, "9223372036854775808, expected at most 9223372036854775807"),
    "3.0": (3.0, r"3\.0, expected an integer"),
    "True": (True, "True, expected an integer"),
    "text": ("3", "'3', expected an integer"),
    "None": (None, "None, expected an integer"),
    "infinity": (float("inf"), "inf, expected an integer"),
    "numpy": (np.int64(0), "0, expected at least 1"),
    "numpy float": (np.float64(3), r"3\.0, expected an integer"),
    "a list": ([3], r"\[3\], expected an integer"),
}


@pytest.mark.parametrize("name", NO_COUNT)
def test_counts(session: Session, refuses: Callable[..., None], name: str) -> None:
    count, message = NO_COUNT[name]
    refuses(
        f"^max_new_tokens is {message}$",
        lambda: session.generate("x", count),
        lambda: session.generate_ids([1], count),
        lambda: session.generate_batch(["x"], count),
    )


@pytest.mark.parametrize("count", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=repr)
def test_counts_of_numpy_and_torch(session: Session, count: Any) -> None:
    assert len(list(session.generate_ids([1], count, eos_token_id=-1))) == 3


@pytest.mark.parametrize("eos", [True, 1.0, "1", -2, 257, 2**64], ids=repr)
def test_ends_of_sequence_that_are_no_ids(session: Session, refuses: Callable[..., None], eos: Any) -> None:
    refuses(
        rf"^eos_token_id is {eos!r}, expected 0\.\.256, or -1 for none$",
        lambda: session.generate_ids([1], 3, eos_token_id=eos),
    )


def test_stop_takes_none_one_or_several(session: Session) -> None:
    whole = "".join(session.generate("And God said", 40))
    stop = whole[10:12]
    cut = whole[: whole.index(stop)]
    expected = {"none": (None, whole), "nothing": ([], whole), "one": (stop, cut), "a set": ({stop}, cut)}
    for name, (value, text_) in expected.items():
        session.reset()
        assert "".join(session.generate("And God said", 40, stop=value)) == text_, name
        assert session.generate_batch(["And God said"], 40, stop=value) == [text_], name


NO_STOP: dict[str, tuple[Any, str]] = {
    "empty": ("", "an empty stop string would end every text at once"),
    "one empty": (["a", ""], "an empty stop string would end every text at once"),
    "bytes": (b"a", "^stop is b'a' of type bytes, expected a list of texts$"),
    "a number": (3, "^stop is 3 of type int, expected a list of texts$"),
    "numbers": (["a", 3], r"^stop\[1\] is 3 of type int, expected text: a str$"),
    "None in a list": ([None], r"^stop\[0\] is None of type NoneType, expected text: a str$"),
}


@pytest.mark.parametrize("name", NO_STOP)
def test_stops_that_are_no_texts(session: Session, refuses: Callable[..., None], name: str) -> None:
    stop, message = NO_STOP[name]
    refuses(message, lambda: session.generate("x", 3, stop=stop), lambda: session.generate_batch(["x"], 3, stop=stop))


SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 7}


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_sample_as_pythons(session: Session, kind: Callable[[float], Any]) -> None:
    exact = {name: float(kind(value)) if isinstance(value, float) else value for name, value in SAMPLING.items()}
    given = {name: kind(value) if isinstance(value, float) else np.int64(value) for name, value in SAMPLING.items()}
    assert SamplingParams(**given) == SamplingParams(**exact)
    assert all(type(getattr(SamplingParams(**given), name)) is type(value) for name, value in SAMPLING.items())
    texts = session.generate_batch(["x", "y"], 10, **exact)
    assert session.generate_batch(["x", "y"], 10, **given) == texts


NO_NUMBER: list[Any] = [float("nan"), float("inf"), -float("inf"), -1, "1", None, True, [1], np.float32("nan"), 1j]
WRONG = {
    "temperature": [*NO_NUMBER, 10**400],
    "top_k": [*NO_NUMBER, 1.0, 2.5, np.float64(1)],
    "top_p": [*NO_NUMBER, 0, 1.5, 10**400],
    "min_p": [*NO_NUMBER, 1.5],
    "seed": [*NO_NUMBER, 1.0, 2**64],
}


@pytest.mark.parametrize("name", WRONG)
def test_sampling_that_is_out_of_range(session: Session, refuses: Callable[..., None], name: str) -> None:
    for value in WRONG[name]:
        refuses(
            f"^{name} is .*, expected a",
            lambda value=value: session.generate("x", 3, **{name: value}),
            lambda value=value: session.generate_ids([1], 3, **{name: value}),
            lambda value=value: session.generate_batch(["x"], 3, **{name: value}),
        )


def test_the_seeds_of_a_batch_wrap_around(session: Session) -> None:
    seeds = [2**64 - 1, 0]
    batch = session.generate_batch(["x", "x"], 10, temperature=1.0, seed=seeds[0])
    assert batch == [session.generate_batch(["x"], 10, temperature=1.0, seed=seed)[0] for seed in seeds]


def test_a_million_ids_are_checked(loaded: dict[str, Session]) -> None:
    ids = [1] * 1_000_000
    assert token_ids(ids, 257) == ids
    with pytest.raises(ValueError, match=r"^token id 300 is outside"):
        token_ids([*ids, 300], 257)
