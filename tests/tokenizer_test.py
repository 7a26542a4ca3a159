"""The tokenizer: exact round trips, determinism, special tokens, files of others."""

import pathlib
import random
import time

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from soup_jax.data import tokenizer as tokenizer_lib
from soup_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = [
    "the quick brown fox jumps over the lazy dog\n" * 5,
    "def f(x):\n\treturn x ** 2  # größer als 日本語\r\n" * 5,
    "  leading space, trailing space  \n\n\n" * 5,
]
NASTY = [
    "",
    " ",
    "\x00",
    "\ufeff\u200b\u0301",
    "e\u0301 \u00e9",  # NFC and NFD must stay different
    "👩‍👩‍👧\U0010ffff",
    "\u202e right to left \u202c",
    "a<|endoftext|>b",
    "<|endoftext|>",
    "\r\n\r \t \x85\u2028",
]


@pytest.fixture(scope="module")
def tokenizer() -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.train_tokenizer(TEXTS, 300)


def random_text(rng: random.Random) -> str:
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 60)))


def test_any_text_comes_back_exactly(tokenizer):
    rng = random.Random(0)
    texts = NASTY + TEXTS + [random_text(rng) for _ in range(500)]
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert batch == [tokenizer.encode(text) for text in texts]
    assert all(0 <= i < tokenizer.vocab_size for ids in batch for i in ids)


def test_text_never_contains_the_end_of_text_token(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for t in (tokenizer, tokenizer_lib.load_tokenizer(tmp_path)):
        assert t.eos_id == 0
        assert t.decode([0]) == tokenizer_lib.EOS
        assert 0 not in t.encode("a<|endoftext|>b <|endoftext|>")


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = tokenizer_lib.load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.hash == tokenizer.hash
    assert loaded.vocab_size == tokenizer.vocab_size == 300
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_training_depends_on_the_set_of_texts_only():
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdef", k=4)) for _ in range(80)]
    texts = [" ".join(rng.choices(words, k=50)) for _ in range(60)]
    hashes = {tokenizer_lib.train_tokenizer(t, 400).hash for t in (texts, texts[::-1], texts)}
    assert len(hashes) == 1
    assert tokenizer_lib.train_tokenizer(texts[:30], 400).hash not in hashes


def test_words_without_end_are_learnt_from_in_pieces():
    # 200,000 letters without a space took two minutes, and a megabyte hours.
    start = time.monotonic()
    long = tokenizer_lib.train_tokenizer(["a" * 2_000_000, "ab" * 100_000], 300)
    assert time.monotonic() - start < 20
    text = "a" * 5000 + " b"
    assert long.decode(long.encode(text)) == text
    assert max(long.num_bytes([i]) for i in long.encode(text)) == 1024  # no cut for encoding


def test_ordinary_text_gives_what_it_always_gave():
    # Nothing but the cut is new: the hash is that of the library's plain training.
    paths = [*ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.py")]
    texts = [path.read_text("utf-8") for path in paths]
    texts += ["日本語の文章は単語の間に空白を置かない。" * 50, "=" * 1000, "\n" * 900, " " * 1024]
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[tokenizer_lib.EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    plain = tokenizer_lib.Tokenizer(inner)
    assert tokenizer_lib.train_tokenizer(texts, 1000).hash == plain.hash


def test_too_little_text_gives_the_true_size():
    small = tokenizer_lib.train_tokenizer(["ab"], 5000)
    assert tokenizer_lib.MIN_VOCAB_SIZE <= small.vocab_size < 300
    assert small.decode(small.encode("anything at all")) == "anything at all"


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UserError, match="257"):
        tokenizer_lib.train_tokenizer(TEXTS, 256)
    with pytest.raises(UserError, match="no text"):
        tokenizer_lib.train_tokenizer([], 300)


def test_a_foreign_tokenizer_with_holes_and_templates(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 7}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.normalizer = normalizers.Lowercase()
    inner.save(str(tmp_path / "no_eos.json"))
    with pytest.raises(UserError, match="end-of-text"):
        tokenizer_lib.load_tokenizer(tmp_path / "no_eos.json")
    inner.add_special_tokens(["</s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", 3)]
    )
    inner.enable_truncation(1)
    inner.save(str(tmp_path / "other.json"))
    other = tokenizer_lib.load_tokenizer(tmp_path / "other.json")
    assert other.vocab_size == 8  # one more than the highest id; there are 4 entries
    assert other.eos_id == 3
    assert other.encode("A b a") == [0, 1, 0]  # neither template nor truncation


@pytest.mark.parametrize("content", [None, "", "{}", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_file_that_is_no_tokenizer_is_a_user_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizer_lib.load_tokenizer(path)
