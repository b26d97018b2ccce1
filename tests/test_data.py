"""Text to batches: what is read, what is refused, what comes back from disk, and in which order it is trained on."""

import gzip
import importlib.machinery
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldlm_cli.data import shards
from ldlm_cli.data.batches import BatchOrder, held_out_windows, length_histogram
from ldlm_cli.data.shards import TokenFolder, TokenSplit, open_tokens, prepare_tokens
from ldlm_cli.data.sources import read_documents
from ldlm_cli.data.stories import stories
from ldlm_cli.data.vocabulary import Vocabulary, encoder_vocabulary, train_vocabulary
from ldlm_cli.errors import DataError, LdlmError, SnapshotError, UsageError
from ldlm_cli.recipe.schema import DataRecipe, TokenEncoderRecipe

ENCODER = TokenEncoderRecipe()
PAD = 1


def read(source: object, **fields: object) -> list[str]:
    return list(read_documents(DataRecipe(source=str(source), **fields)))  # type: ignore[arg-type]


def small(cache: Path, **fields: object) -> DataRecipe:
    given = {"num_documents": 300, "vocab_size": 400, "valid_share": 0.1, "test_share": 0.1, "cache": str(cache)}
    return DataRecipe(**(given | fields))  # type: ignore[arg-type]


def make_split(lengths: list[int] | np.ndarray) -> TokenSplit:
    """Return a split whose tokens all differ, so that a batch shows where each token came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenSplit("train", np.arange(10, 10 + offsets[-1], dtype=np.uint32), offsets)


def order_of(split: TokenSplit, packing: str = "document", **fields: int) -> BatchOrder:
    given = {"window_tokens": 64, "batch_tokens": 256, "seed": 3, "pad_id": PAD}
    return BatchOrder(split, packing=packing, **(given | fields))


def expect_sentence(error: type[LdlmError], *parts: str, of: Callable[[], object]) -> None:
    """Check that the call raises exactly this kind of error, in one sentence that has these parts."""
    with pytest.raises(LdlmError) as caught:
        of()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert all(part in message for part in parts), message
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    return prepare_tokens(small(tmp_path_factory.mktemp("cache")), ENCODER)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_text_units_and_gz(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\n\n \nthree é\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.TXT.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "b.TXT.gz"):
        assert read(tmp_path / name, text_unit="line") == ["one", "two", "three é"]
        assert read(tmp_path / name, text_unit="paragraph") == ["one\ntwo", "three é"]
        assert read(tmp_path / name, text_unit="file") == ["one\ntwo\n\n \nthree é"]


def test_jsonl_folder_glob_and_limit(tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "second"}\n\n{"body": "  "}\n'))
    (tmp_path / "a.jsonl").write_text('{"body": "first", "id": 1}\n')
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "notes.md").write_text("not text to train on")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert read(tmp_path, text_field="body") == ["first", "third", "second"]
    assert read(tmp_path, text_field="body", max_documents=2) == ["first", "third"]
    assert read(tmp_path / "**" / "*.jsonl*", text_field="body") == ["first", "second"]


def test_builtin_and_progress() -> None:
    assert read("builtin:stories", num_documents=5, seed=2) == list(stories(2, 5, 0.04))
    lines: list[str] = []
    list(read_documents(DataRecipe(num_documents=20_001, long_share=0), lines.append))
    assert lines == ["read 20,000 documents of builtin:stories"]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("no-such-file.txt", ["no-such-file.txt"]),
        ("owner/name", ["hub:owner/name"]),
        ("builtin:storys", ["builtin:stories"]),
        ("http://example.org/a.txt", ["unknown kind"]),
        ("no-such-folder/*.txt", ["No file matches"]),
        ("hub:", ["hub:owner/name"]),
    ],
)
def test_sources_that_are_not_there(source: str, parts: list[str]) -> None:
    expect_sentence(DataError, *parts, of=lambda: read(source))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.pdf", b"text", ["unknown ending", ".jsonl.gz"]),
        ("empty.txt", b" \n\n", ["no text"]),
        ("latin.txt", b"fine\ncaf\xe9\n", ["latin.txt:2", "byte 8"]),
        ("cut.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], ["gzip"]),
        ("plain.txt.gz", b"text", ["gzip"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', ["bad.jsonl:2", "not JSON"]),
        ("list.jsonl", b"[1]\n", ["list.jsonl:1", "object"]),
        ("field.jsonl", b'{"body": "a", "id": 1}\n', ["field.jsonl:1", "body, id", "data.text_field"]),
        ("number.jsonl", b'{"text": 5}\n', ["number.jsonl:1", "int"]),
        ("half.jsonl", b'{"text": "\\ud800"}\n', ["half.jsonl:1", "surrogate"]),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    expect_sentence(DataError, *parts, of=lambda: read(tmp_path / name))


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    expect_sentence(DataError, "no file that ends in", of=lambda: read(tmp_path))


def test_hub_offline_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expect_sentence(UsageError, "HF_HUB_OFFLINE", "data.source=PATH", of=lambda: read("hub:ldlm-test/no-such-data"))
    expect_sentence(
        UsageError, "HF_HUB_OFFLINE", "local folder", of=lambda: encoder_vocabulary("ldlm-test/no-such-model", None)
    )


def test_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    expect_sentence(UsageError, "pip install datasets", of=lambda: read("hub:ldlm-test/no-such-data"))


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of `datasets`, and what becomes of its rows and failures (a stand-in: tests have no network)."""
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        if config == "wrong":
            raise ValueError("BuilderConfig 'wrong' not found.\nAvailable: ['en']")
        return [{"body": " one "}, {"body": ""}, {"body": "two"}]

    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "owner___name").mkdir()
    assert read("hub:owner/name:en", text_field="body") == ["one", "two"]
    assert asked == [("owner/name", "en", "train", False)]
    expect_sentence(DataError, "row 0", "body", "data.text_field", of=lambda: read("hub:owner/name"))
    expect_sentence(UsageError, "'wrong' not found", of=lambda: read("hub:owner/name:wrong"))


# --- vocabulary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words",
        " lead and trail ",
        "tabs\t\r\n\n",
        "naïve 日本語 🙂\u200d",
        "it<|eos|>goes<|pad|> on",
        "\x00\x7f\u2028",
    ],
)
def test_text_survives_the_round_trip(tmp_path: Path, folder: TokenFolder, text: str) -> None:
    vocabulary = folder.vocabulary
    ids = vocabulary.encode([text])[0]
    assert not vocabulary.special_ids & set(ids)
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode([vocabulary.pad_id, *ids, vocabulary.eos_id, *ids]) == text
    vocabulary.save(tmp_path)
    again = Vocabulary.load(tmp_path)
    assert again.encode([text]) == [ids]
    assert (again.fingerprint, again.size, again.prefix_id) == (vocabulary.fingerprint, vocabulary.size, 0)


def test_training_a_vocabulary_is_deterministic() -> None:
    texts = list(stories(0, 200, 0.0))
    assert train_vocabulary(texts, 400).fingerprint == train_vocabulary(texts, 400).fingerprint
    assert train_vocabulary(texts, 400).size == 400


def test_changed_vocabulary_is_refused(tmp_path: Path, folder: TokenFolder) -> None:
    folder.vocabulary.save(tmp_path)
    facts = json.loads((tmp_path / "vocabulary.json").read_text())
    (tmp_path / "vocabulary.json").write_text(json.dumps(facts | {"format_version": 99}))
    expect_sentence(SnapshotError, "99", of=lambda: Vocabulary.load(tmp_path))
    (tmp_path / "vocabulary.json").write_text(json.dumps(facts | {"fingerprint": "0"}))
    expect_sentence(SnapshotError, "changed", of=lambda: Vocabulary.load(tmp_path))


def test_tokenizer_of_a_pretrained_encoder(tmp_path: Path) -> None:
    """A BERT-like folder: SEP serves as EOS, CLS as prefix, and its template adds nothing to a text."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "kite", "fell", "##s", "."]
    transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    vocabulary = encoder_vocabulary(str(tmp_path), None)
    assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.prefix_id, vocabulary.size) == (3, 0, 2, 10)
    assert vocabulary.encode(["The kites fell."]) == [[5, 6, 8, 7, 9]]
    assert vocabulary.decode([2, 5, 6, 8, 7, 3, 5]) == "the kites fell"
    vocabulary.save(tmp_path / "ours")
    assert encoder_vocabulary(str(tmp_path / "ours"), None).fingerprint == vocabulary.fingerprint
    data = small(tmp_path / "cache", tokenizer="encoder")
    made = prepare_tokens(data, TokenEncoderRecipe(source=str(tmp_path)))
    assert made.vocabulary.fingerprint == vocabulary.fingerprint
    assert (made.split("train").document(0)[-1], (made.split("train").stream == 3).sum()) == (
        3,
        made.split("train").num_documents,
    )


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards_hold_every_document_once(folder: TokenFolder) -> None:
    texts: list[str] = []
    for name in shards.SPLITS:
        split = folder.split(name)
        assert split.num_documents == folder.manifest["splits"][name]["documents"] == len(split.lengths)
        for index in range(split.num_documents):
            ids = split.document(index)
            assert (ids.dtype, len(ids), ids[-1]) == (np.int64, split.lengths[index], folder.vocabulary.eos_id)
            texts.append(folder.vocabulary.decode(ids))
    assert sorted(texts) == sorted(stories(0, 300, 0.04))
    assert folder.split("train").stream.dtype == np.uint16
    expect_sentence(DataError, "train, valid, test", of=lambda: folder.split("dev"))


def test_again_does_nothing(tmp_path: Path) -> None:
    first = prepare_tokens(small(tmp_path), ENCODER)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    # How shards are read is no part of what they hold.
    second = prepare_tokens(small(tmp_path, packing="pack", max_len_tokens=32), ENCODER)
    assert second.path == first.path
    assert {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))} == before
    assert prepare_tokens(small(tmp_path, vocab_size=300), ENCODER).path != first.path
    assert len(list(tmp_path.iterdir())) == 2


def test_duplicates_and_order(tmp_path: Path) -> None:
    texts = list(stories(0, 200, 0.0))
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, " " + texts[0] + "\n", texts[5]]))
    data = small(tmp_path / "cache", source=str(source))
    first = prepare_tokens(data, ENCODER)
    assert first.manifest["duplicates_dropped"] == 2
    assert sum(counts["documents"] for counts in first.manifest["splits"].values()) == 200
    kept = prepare_tokens(data.model_copy(update={"deduplicate": False}), ENCODER)
    assert sum(counts["documents"] for counts in kept.manifest["splits"].values()) == 202
    # The split of a document depends on its text, not on its place in the file; so changed content is seen, too.
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)))
    second = prepare_tokens(data, ENCODER)
    assert second.fingerprint != first.fingerprint
    for name in shards.SPLITS:
        held = [
            {made.vocabulary.decode(made.split(name).document(i)) for i in range(made.split(name).num_documents)}
            for made in (first, second)
        ]
        assert held[0] == held[1]


def test_too_small_a_corpus_leaves_nothing_behind(tmp_path: Path) -> None:
    expect_sentence(
        DataError, "too small", "train", of=lambda: prepare_tokens(small(tmp_path, num_documents=2), ENCODER)
    )
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expect_sentence(DataError, "data.cache", of=lambda: prepare_tokens(small(tmp_path / "file" / "in"), ENCODER))


def test_a_faster_process_wins(tmp_path: Path, folder: TokenFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def rename_late(source: Path, target: Path) -> None:
        shards.shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(shards.os, "rename", rename_late)
    made = prepare_tokens(small(tmp_path), ENCODER)
    assert made.fingerprint == folder.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    made = prepare_tokens(small(tmp_path), ENCODER)
    again = lambda: prepare_tokens(small(tmp_path), ENCODER)  # noqa: E731
    tokens, offsets = made.path / "train.tokens.npy", made.path / "train.offsets.npy"
    whole_tokens, whole_offsets = tokens.read_bytes(), offsets.read_bytes()
    for cut in (whole_tokens[:-2], whole_tokens[:20], b""):
        tokens.write_bytes(cut)
        expect_sentence(DataError, "damaged", "delete", of=again)
    np.save(tokens, np.array([{}], dtype=object), allow_pickle=True)
    expect_sentence(DataError, "damaged", of=again)
    tokens.write_bytes(whole_tokens)
    values = np.load(offsets)
    values[1] = values[2]
    np.save(offsets, values)
    expect_sentence(DataError, "rise", of=again)
    offsets.write_bytes(whole_offsets)
    manifest = json.loads((made.path / "manifest.json").read_text())
    (made.path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 0}))
    expect_sentence(SnapshotError, "format version 0", of=again)
    (made.path / "manifest.json").unlink()
    expect_sentence(DataError, "manifest.json", of=lambda: open_tokens(made.path))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_order_is_a_function_of_the_step() -> None:
    split = make_split(list(np.random.default_rng(0).integers(2, 150, 400)))
    for packing in ("document", "pack"):
        straight, jumping = order_of(split, packing), order_of(split, packing)
        assert straight.steps_per_epoch == jumping.steps_per_epoch
        batches = [straight.batch_at(step) for step in range(2 * straight.steps_per_epoch)]
        for step in (len(batches) - 1, 0, straight.steps_per_epoch, 1):
            batch = jumping.batch_at(step)
            np.testing.assert_array_equal(batch.token_ids, batches[step].token_ids)
            np.testing.assert_array_equal(batch.mask, batches[step].mask)
        first_ids = [batch.token_ids[0, 0] for batch in batches]
        assert first_ids[: straight.steps_per_epoch] != first_ids[straight.steps_per_epoch :]
        assert first_ids[0] != order_of(split, packing, seed=4).batch_at(0).token_ids[0, 0]


def test_documents_are_covered_and_padded_right() -> None:
    lengths = list(np.random.default_rng(1).integers(2, 150, 400))
    split = make_split(lengths)
    order = order_of(split)
    for epoch in range(2):
        seen: list[int] = []
        crops = set()
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            batch = order.batch_at(step)
            rows, width = batch.token_ids.shape
            assert batch.token_ids.dtype == np.int64
            assert batch.mask.dtype == bool
            takes = batch.mask.sum(1)
            assert width == min(-(-takes.max() // 8) * 8, 64)
            assert rows * width <= 256
            for ids, mask, take in zip(batch.token_ids, batch.mask, takes, strict=True):
                assert mask[:take].all()
                assert (ids[~mask] == PAD).all()
                place = int(ids[0]) - 10
                index = int(np.searchsorted(split.offsets, place, side="right")) - 1
                seen.append(index)
                assert take == min(lengths[index], 64)
                np.testing.assert_array_equal(ids[:take], split.stream[place : place + take])
                assert place + take <= split.offsets[index + 1]
                if lengths[index] > 64:
                    crops.add(place - split.offsets[index])
        assert len(seen) == len(set(seen))
        assert len(seen) > 400 - 256 // 64  # only the rest of the longest class sits out
        assert len(crops) > 30


def test_left_overs_move_up() -> None:
    # Four rows of width 16 fit in 64 tokens: five short texts leave one over, which joins the three longer ones.
    order = order_of(make_split([8] * 5 + [60] * 3), batch_tokens=64)
    assert order.steps_per_epoch == 1 + 4
    assert sorted(order.batch_at(step).token_ids.shape for step in range(5)) == [(1, 8)] + [(1, 64)] * 3 + [(4, 8)]


def test_window_that_is_no_power_of_two() -> None:
    order = order_of(make_split([101, 300, 99, 40]), window_tokens=101, batch_tokens=101)
    assert sorted(order.batch_at(step).token_ids.shape[1] for step in range(order.steps_per_epoch)) == [
        40,
        101,
        101,
        101,
    ]


def test_a_million_documents_are_quick() -> None:
    lengths = np.random.default_rng(2).integers(2, 200, 1_000_000)
    split = make_split(lengths)
    begin = time.perf_counter()
    order_of(split, batch_tokens=8192).batch_at(0)
    assert time.perf_counter() - begin < 3


def test_corpus_shorter_than_a_batch() -> None:
    short = make_split([9] * 3)
    expect_sentence(DataError, "3 documents", "batch_tokens", of=lambda: order_of(short))
    expect_sentence(DataError, "3 documents", "batch_tokens", of=lambda: order_of(short, "pack"))
    expect_sentence(UsageError, "packing", of=lambda: order_of(make_split([9]), "packed"))
    expect_sentence(UsageError, "seed", of=lambda: order_of(make_split([9]), seed=-1))


def test_packed_rows_are_full_and_cover_the_stream() -> None:
    split = make_split([7] * 100)
    order = order_of(split, "pack", window_tokens=20, batch_tokens=100)
    assert order.steps_per_epoch == 7
    phases = set()
    for epoch in range(3):
        batches = [order.batch_at(epoch * 7 + step) for step in range(7)]
        assert all(batch.token_ids.shape == (5, 20) and batch.mask.all() for batch in batches)
        ids = np.concatenate([batch.token_ids for batch in batches])
        assert sorted(ids.ravel()) == list(range(10, 710))
        assert ((np.diff(ids) - 1) % 700 == 0).all()  # neighbours in a row are neighbours in the stream
        phases.add(int(ids[0, 0]) % 20)
    assert len(phases) > 1


def test_held_out_windows() -> None:
    split = make_split([30] * 10 + [5] * 10)
    batch, kind = held_out_windows(split, 30, 4, PAD)
    assert (kind, batch.token_ids.shape, batch.mask.all()) == ("document", (4, 30), True)
    assert set(batch.token_ids[:, 0] - 10) <= set(range(0, 300, 30))
    assert len(held_out_windows(split, 20, 50, PAD)[0].token_ids) == 10
    batch, kind = held_out_windows(split, 31, 4, PAD)
    assert (kind, batch.token_ids.shape) == ("packed", (4, 31))
    np.testing.assert_array_equal(batch.token_ids, held_out_windows(split, 31, 4, PAD)[0].token_ids)
    assert held_out_windows(split, 30, 88, PAD)[1] == "packed"  # 10 documents are fewer than 88 / 8
    assert held_out_windows(split, 350, 4, PAD)[0].token_ids.shape == (1, 350)
    expect_sentence(DataError, "350 tokens", "351", of=lambda: held_out_windows(split, 351, 4, PAD))


def test_length_histogram() -> None:
    split = make_split([3, 3, 8, 9])
    assert length_histogram(split, 8, "document").tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 1]
    assert length_histogram(split, 8, "pack").nonzero()[0].tolist() == [8]
    assert length_histogram(split, 2, "document").nonzero()[0].tolist() == [2]
    assert length_histogram(split, 8, "document").dtype == np.int64
