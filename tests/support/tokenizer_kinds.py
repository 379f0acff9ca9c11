"""Tokenizers of every kind that the C++ library reads, trained on the spot, and texts that try them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENGLISH = (
    "the of and to in a is that for it was on are as with be by at from his they this have I don't we'll SHE'S "
    "You'RE king river light Babylon model tokens state stream 1 12 1234 56789 3.14 1,000 x86_64 e-mail re-export"
)
WORDS = ENGLISH.split()
CODE = (
    "def main(argc, argv):\n    return [x for x in range(10) if x % 2 == 0]\n\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += values[i] * 0x1F;\n\t}\r\n",
    'std::string text = "hello\\n";  // a comment\n',
    '{"key": [1, 2.5e-3, null], "other": true}\n',
    "#include <vector>\n\n\ntemplate <class T>\n",
)
SCRIPTS = (
    "日本語の文章をトークンに分ける。", "汉字和标点，没有空格。", "한국어 텍스트 조각", "한국어",
    "مرحبا بالعالم، كيف الحال؟", "שָׁלוֹם עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Привет, мир! Ёлка", "Ἑλλάδα Σίσυφος ΣΑΣ",
    "İstanbul ıĞDIR", "naïve café résumé", "na\u0308i\u0308ve cafe\u0301",
    "e\u0323\u0301 e\u0301\u0323 a\u0315\u0300\u05ae",
    "ﬁ ﬂ ½ ² № ℡ Ⅷ ㎏ ｆｕｌｌ ﾊﾝｶｸ ﾞ", "가각힣 \u1100\u1161\u11a8", "ʼn ŉ ǆ ß ẞ ſ K Å Ω",
    "\u0344\u0f73\u0f75\u0f81 \u2126",
    "👍🏽👩‍👩‍👧‍👦🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿😀", "❤️☺️", "𝐀𝒷𝟙 𐍈 \U0001f468\u200d\U0001f52c", "¨x ´ ¸a", "‘quotes’ “double” — dash… •",
    "don’t ＇ｓ 'ſ 'S 'T 'RE 'Ve 'LL", "١٢٣ १२३ ²³ ½ ⅔ Ⅳ 四 𝟘𝟙",
)  # fmt: skip
SPACES = (
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u0085",
    "\u180e",
    "\u200b",
    "\ufeff",
)
CONTROLS = (
    "\0",
    "\x01",
    "\x1b",
    "\x7f",
    "\x1c",
    "\u0080",
    "\u2028",
    "\u2029",
    "\ufffd",
    "\ufffe",
    "\U0010ffff",
    "\ue000",
)
SPECIAL = ("<s>", "</s>", "<unk>", "<|end|>", "<|endo", "[MASK]", "<pad>", "word", "▁", "▁▁", "<0x41>", "\u2581a")


def random_character(rng: random.Random) -> str:
    """Any character, those of small codes more often."""
    while True:
        code = rng.randrange(rng.choice((0x80, 0x800, 0x3000, 0x11000, 0x20000, 0x110000)))
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def parts(rng: random.Random) -> Iterator[str]:
    """Endless parts of text: English, code, other scripts, marks, emoji, controls, special tokens, long runs."""
    makers: tuple[tuple[int, Callable[[], str]], ...] = (
        (40, lambda: rng.choice(WORDS) + rng.choice((" ", " ", " ", ", ", ".\n", "  ", "'s "))),
        (8, lambda: rng.choice(CODE)),
        (20, lambda: rng.choice(SCRIPTS) + rng.choice(("", " "))),
        (8, lambda: rng.choice(SPACES)),
        (2, lambda: rng.choice(SPACES) * rng.choice((2, 3, 30))),
        (3, lambda: rng.choice(CONTROLS)),
        (5, lambda: rng.choice(SPECIAL)),
        (4, lambda: "".join(random_character(rng) for _ in range(rng.randrange(1, 6)))),
        (2, lambda: rng.choice("aA1.é本🙂\u0301 \n") * rng.choice((3, 40, 200))),
        (2, lambda: str(rng.getrandbits(60))),
    )
    weights = [weight for weight, _ in makers]
    while True:
        yield rng.choices(makers, weights)[0][1]()


def mixed_text(seed: int, size: int) -> str:
    """A text of `size` characters."""
    pieces, length, endless = [""], 0, parts(random.Random(seed))
    while length < size:
        pieces.append(next(endless))
        length += len(pieces[-1])
    return "".join(pieces)[:size]


BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

# ---- kinds -----------------------------------------------------------------------------------------------------------


def corpus() -> list[str]:
    """The texts that the tokenizers are trained on."""
    text = mixed_text(0, 60_000)
    return [text[i : i + 500] for i in range(0, len(text), 500)]


def byte_level(pattern: str | None = None, space: bool = False, normalizer: object = None) -> Tokenizer:
    """Byte-level BPE with a pattern, or with GPT-2's. `space`: a space is added before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<|end|>"]))
    return tokenizer


def sentencepiece_bpe(scheme: str = "", byte_fallback: bool = True, fuse: bool = True) -> Tokenizer:
    """BPE as Llama 2 has it, or with Metaspace and a scheme."""
    options = {"unk_token": "<unk>", "byte_fallback": byte_fallback, "fuse_unk": fuse}
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(BYTES if byte_fallback else ())]
    _train(trained, trainers.BpeTrainer(vocab_size=1500, special_tokens=specials, limit_alphabet=300))
    model = _file(trained)["model"]
    tokenizer = Tokenizer(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]], **options))
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "always")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials[:3]])
    _add_template(tokenizer, "<s> $A", "<s>")
    return tokenizer


def unigram(scheme: str, split: bool = True, byte_fallback: bool = False, normalizer: object = None) -> Tokenizer:
    """The Unigram model as T5 or Gemma have it."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    specials = ["<pad>", "</s>", "<unk>", *(BYTES if byte_fallback else ())]
    _train(trained, trainers.UnigramTrainer(vocab_size=1200, special_tokens=specials, unk_token="<unk>"))
    vocab = [(token, score) for token, score in _file(trained)["model"]["vocab"]]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=byte_fallback))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    _add_template(tokenizer, "$A </s>", "</s>")
    return tokenizer


def words_bpe(*steps: pre_tokenizers.PreTokenizer, normalizer: object = None) -> Tokenizer:
    """BPE of characters behind any pre-tokenizers, with an unknown token and without a decoder."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    _train(tokenizer, trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>"], limit_alphabet=200))
    return tokenizer


def with_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with added tokens of every kind."""
    tokenizer.add_special_tokens(
        [AddedToken("[MASK]", lstrip=True, normalized=False), AddedToken("<pad>", rstrip=True)]
    )
    tokenizer.add_tokens(
        [
            *(AddedToken("word", single_word=True), AddedToken("Babylon", single_word=True, normalized=False)),
            *(AddedToken("\n\n", normalized=False, rstrip=True), AddedToken("light", lstrip=True, rstrip=True)),
            *(
                AddedToken("river", normalized=True),
                AddedToken("é", normalized=True),
                AddedToken("日本", normalized=False),
            ),
        ]
    )
    return tokenizer


def ignoring_merges(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without a third of its merges, so that some words are tokens that no merges lead to."""
    file = _file(tokenizer)
    file["model"]["merges"] = [merge for i, merge in enumerate(file["model"]["merges"]) if i % 3]
    file["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(file))


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(corpus(), trainer)


def _file(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def _add_template(tokenizer: Tokenizer, single: str, token: str) -> None:
    known = [(token, tokenizer.token_to_id(token))]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=known)


P, N = pre_tokenizers, normalizers
ACCENTS = N.Sequence([N.NFD(), N.Lowercase(), N.StripAccents()])
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "gpt2, a space before": lambda: with_added_tokens(byte_level(space=True)),
    "llama3": lambda: ignoring_merges(with_added_tokens(byte_level(LLAMA3))),
    "qwen, NFC": lambda: with_added_tokens(byte_level(QWEN, normalizer=N.NFC())),
    "o200k": lambda: byte_level(O200K),
    "llama2": sentencepiece_bpe,
    "llama2, unknown": lambda: with_added_tokens(sentencepiece_bpe(byte_fallback=False, fuse=False)),
    "llama2, fused unknown": lambda: sentencepiece_bpe("never", byte_fallback=False),
    "mistral": lambda: sentencepiece_bpe("always"),
    "llama2, first": lambda: with_added_tokens(sentencepiece_bpe("first")),
    "t5": lambda: unigram("always", normalizer=N.Sequence([N.Nmt(), N.NFKC(), N.Replace(Regex(" {2,}"), " ")])),
    "t5, first": lambda: with_added_tokens(unigram("first", normalizer=N.NFKC())),
    "gemma": lambda: unigram("never", split=False, byte_fallback=True),
    "accents": lambda: words_bpe(P.WhitespaceSplit(), P.Punctuation(), P.Digits(True), normalizer=ACCENTS),
    "words": lambda: with_added_tokens(words_bpe(P.Whitespace(), normalizer=N.Sequence([N.Strip(), N.NFKD()]))),
    "joined": lambda: words_bpe(
        P.Digits(), P.Split(Regex(r"\p{Han}"), "contiguous"), P.Punctuation("merged_with_previous")
    ),
    "splits": lambda: words_bpe(
        *(P.Split(Regex(r"\s+|\d{2}+"), "merged_with_next"), P.Split("e", "contiguous")),
        P.Split(Regex(r"(?<=a)[^\W\d]+?(?=e|\.)|(?!x).(?:b|c)*+|[\x41-\x{5a}]"), "isolated"),
        P.Split(Regex(r"\w+"), "removed", invert=True),
    ),
    "delimiter": lambda: words_bpe(P.CharDelimiterSplit(" "), P.Split(Regex("[a-z]*"), "isolated")),
    "byte symbols": lambda: words_bpe(
        P.Split(Regex("[^Ġ]+"), "isolated"), normalizer=N.Sequence([N.NFC(), N.ByteLevel()])
    ),
}  # fmt: skip
