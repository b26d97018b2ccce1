"""The judge: exact nats whatever the batch, and never the token encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ldlm_cli.data.vocabulary import Vocabulary, train_vocabulary
from ldlm_cli.errors import UsageError
from ldlm_cli.evaluation.judge import Judge, _pieces
from ldlm_cli.recipe.schema import Recipe

TEXTS = [
    "One cold day Anna went to the old mill.",
    "",
    "The dog ran.",
    "The dog ran and ran, and then the dog slept by the fire until the morning came.",
    "Rain.",
]
CONTEXT = 48


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary(TEXTS * 3, 300)


def save_model(folder: Path, vocabulary: Vocabulary, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,  # far from uniform, so that a shifted position shows
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    vocabulary.save(folder)
    facts = {"role": folder.name, "seed": seed, "held_out_nats_per_token": 1.25}
    (folder / "language_model.json").write_text(json.dumps(facts))
    return model


@pytest.fixture
def run(tmp_path: Path, vocabulary: Vocabulary) -> Path:
    save_model(tmp_path / "run" / "token_encoder", vocabulary, seed=0)
    save_model(tmp_path / "run" / "judge", vocabulary, seed=1)
    return tmp_path / "run"


def open_judge(run: Path, source: str = "trained", recipe: Recipe | None = None) -> Judge:
    return Judge.open(source, run=run, recipe=recipe or Recipe(), device="cpu")


@torch.inference_mode()
def direct_nats(model: LlamaForCausalLM, ids: list[int]) -> list[float]:
    """Nats of each token but the first, one forward pass per token, no batch and no padding."""
    nats = []
    for place in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        nats.append(-float(torch.log_softmax(logits.double(), -1)[ids[place]]))
    return nats


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_nats_equal_a_direct_computation(run: Path, vocabulary: Vocabulary, batch_tokens: int) -> None:
    model = LlamaForCausalLM.from_pretrained(run / "judge").eval()
    scores = open_judge(run).score(TEXTS, batch_tokens=batch_tokens)
    for text, ids, score in zip(TEXTS, vocabulary.encode(TEXTS), scores, strict=True):
        expected = direct_nats(model, [vocabulary.prefix_id or 0, *ids, vocabulary.eos_id])
        assert score.tokens == len(ids) + 1, text
        assert score.nats == pytest.approx(sum(expected), abs=1e-4), text


def test_a_text_beyond_the_context_is_read_in_windows(run: Path, vocabulary: Vocabulary) -> None:
    text = " ".join(TEXTS) * 2
    ids = [vocabulary.prefix_id or 0, *vocabulary.encode([text])[0], vocabulary.eos_id]
    assert len(ids) > 2 * CONTEXT
    model = LlamaForCausalLM.from_pretrained(run / "judge").eval()
    expected = sum(direct_nats(model, ids[:CONTEXT]))
    end, half = CONTEXT, CONTEXT // 2
    while end < len(ids):
        expected += sum(direct_nats(model, ids[end - half : end + half])[half - 1 :])
        end += half
    score = open_judge(run).score([text])[0]
    assert score.tokens == len(ids) - 1
    assert score.nats == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("length", "context"), [(2, 8), (8, 8), (9, 8), (12, 8), (13, 8), (100, 7)])
def test_windows_score_each_token_once(length: int, context: int) -> None:
    pieces = _pieces(0, list(range(length)), context)
    scored = [token for piece in pieces for token in piece.ids[piece.first :]]
    assert scored == list(range(1, length))
    assert all(len(piece.ids) <= context for piece in pieces)


def test_no_texts_have_no_scores(run: Path) -> None:
    assert open_judge(run).score([]) == []


def test_identity_names_the_judge(run: Path, vocabulary: Vocabulary) -> None:
    judge = open_judge(run)
    assert judge.held_out_nats_per_token == 1.25
    identity = judge.identity()
    assert identity["source"] == "trained"
    assert identity["tokenizer"] == vocabulary.fingerprint
    assert len(identity["weights_sha256"]) == 64
    assert identity["context_tokens"] == CONTEXT


def test_a_run_of_train_lm_is_a_judge(run: Path, tmp_path: Path, vocabulary: Vocabulary) -> None:
    save_model(tmp_path / "lm" / "baseline", vocabulary, seed=2)
    assert open_judge(run, str(tmp_path / "lm")).about["seed"] == 2
    assert open_judge(run, str(tmp_path / "lm" / "baseline")).about["seed"] == 2


def test_a_transformers_folder_without_our_vocabulary_is_a_judge(
    run: Path, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "foreign"
    shutil.copytree(run / "judge", folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name in ("vocabulary.json", "tokenizer.json", "language_model.json"):
        (folder / name).unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>").save_pretrained(folder)
    foreign = open_judge(run, str(folder))
    assert foreign.held_out_nats_per_token is None
    ours = open_judge(run).score(TEXTS)
    for a, b in zip(foreign.score(TEXTS), ours, strict=True):
        assert (a.tokens, a.nats) == (b.tokens, pytest.approx(b.nats, abs=1e-4))


def test_the_token_encoder_is_refused_by_weights(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights of the token encoder"):
        open_judge(run, str(run / "token_encoder"))
    shutil.copytree(run / "token_encoder", tmp_path / "copy")  # under another name it is still the token encoder
    with pytest.raises(UsageError, match="weights of the token encoder"):
        open_judge(run, str(tmp_path / "copy"))


def test_the_token_encoder_is_refused_by_name(run: Path) -> None:
    recipe = Recipe.model_validate(
        {"token_encoder": {"source": "some/encoder"}, "data": {"tokenizer": "encoder"}, "judge": {"source": "trained"}}
    )
    for source in ("some/encoder", "some/encoder@main"):
        with pytest.raises(UsageError, match="is the token encoder"):
            open_judge(run, source, recipe)


def test_a_missing_judge_says_what_to_do(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "judge")
    with pytest.raises(UsageError, match="ldlm train-lm"):
        open_judge(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no language model"):
        open_judge(run, str(tmp_path / "empty"))


def test_a_hub_judge_without_network_fails_with_a_way_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="--judge"):
        open_judge(run, "nobody/no-such-model")
