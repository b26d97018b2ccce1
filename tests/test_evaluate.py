"""The evaluation room on real tokens, a real judge and a real (untrained) snapshot, all tiny."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldlm_cli.checkpoint import load_snapshot, write_snapshot
from ldlm_cli.core.model import LDLM, build_parts
from ldlm_cli.core.token_encoder import build_token_encoder
from ldlm_cli.data.batches import Batch, length_histogram
from ldlm_cli.data.shards import TokenFolder, TokenSplit, prepare_tokens
from ldlm_cli.errors import SnapshotError, UsageError
from ldlm_cli.evaluation import controls
from ldlm_cli.evaluation.evaluate import evaluate, sampling_options
from ldlm_cli.evaluation.generation import TextSet, TrainingDocuments, matching_texts, measure_texts, memorised
from ldlm_cli.evaluation.judge import Judge
from ldlm_cli.evaluation.own_estimates import held_out_texts, measure_latent_state, measure_own_estimates
from ldlm_cli.evaluation.reconstruction import (
    accuracies,
    fidelity_verdict,
    predict,
    reconstruction_lengths,
    trained_decoder_noise,
)
from ldlm_cli.generate import SamplingOptions
from ldlm_cli.recipe.schema import Recipe
from ldlm_cli.report.files import write_evaluation
from ldlm_cli.runtime import Runtime
from ldlm_cli.training.language_model import build_language_model, save_language_model

TOWER = {"layers": 1, "heads": 2}


def tiny_recipe(cache: Path) -> Recipe:
    language_model = {"kind": "language_model", "steps": 1}
    return Recipe.model_validate(
        {
            "data": {
                "num_documents": 300,
                "long_share": 0.02,
                "max_len_tokens": 96,
                "context_tokens": 256,
                "vocab_size": 600,
                "test_share": 0.1,
                "cache": str(cache),
            },
            "token_encoder": {"width": 16, "layers": 2, "heads": 2},
            "judge": {"width": 16, "layers": 1, "heads": 2},
            "model": {
                "latents": {"width": 16},
                **dict.fromkeys(("latent_encoder", "latent_decoder", "token_decoder", "denoiser"), TOWER),
            },
            "stages": {
                "encoder": language_model | {"role": "token_encoder"},
                "judge": language_model | {"role": "judge", "seed_offset": 1},
                "joint": {"steps": 1, "decoder_noise_std": 0.5},
            },
            "plans": {"joint": ["encoder", "judge", "joint"]},
            "sampling": {"steps": 2},
            "evaluation": {"num_samples": 6, "num_texts": 5, "tokens_per_length": 512},
        }
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    recipe = tiny_recipe(tmp_path_factory.mktemp("data"))
    return prepare_tokens(recipe.data, recipe.token_encoder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokens: TokenFolder) -> Path:
    """A run folder as training leaves it, with fresh weights: what is tested is the measuring, not the model."""
    recipe = tiny_recipe(tokens.path.parent)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    vocabulary = tokens.vocabulary
    for name in ("encoder", "judge"):
        stage = recipe.stages[name]
        facts = {"role": stage.role, "seed": stage.seed_offset, "held_out_nats_per_token": 6.5}
        save_language_model(folder / stage.role, build_language_model(recipe, stage, vocabulary), vocabulary, facts)
    torch.manual_seed(0)
    encoder = build_token_encoder(recipe.token_encoder, folder / "token_encoder", vocabulary.prefix_id, vocabulary.size)
    model = LDLM(build_parts(recipe, vocabulary.size), encoder, recipe)
    histogram = length_histogram(tokens.split("train"), recipe.data.max_len_tokens, recipe.data.packing)
    facts = {"plan": "joint", "stage": "joint", "data_fingerprint": tokens.fingerprint}
    write_snapshot(folder, recipe, model, vocabulary, histogram, None, facts)
    return folder


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("fp32")


def run_evaluation(run: Path, runtime: Runtime, **settings: Any) -> dict[str, Any]:
    return evaluate(run, runtime=runtime, write=write_evaluation, on_progress=lambda line: None, **settings)


def split_of(documents: list[list[int]]) -> TokenSplit:
    """Documents without end token; the end token is 0."""
    stream = np.array([token for ids in documents for token in [*ids, 0]], dtype=np.uint16)
    return TokenSplit("train", stream, np.cumsum([0] + [len(ids) + 1 for ids in documents]))


# ---------------------------------------------------------------------- the whole report


def test_the_report_has_the_promised_sections_and_files(run: Path, runtime: Runtime, tokens: TokenFolder) -> None:
    report = run_evaluation(run, runtime, max_len=300)
    sections = ["identity", "reconstruction", "own_estimates", "latent_state", "generation", "controls"]
    assert list(report) == sections
    assert json.loads((run / "eval" / "report.json").read_text()) == report
    assert {path.name for path in (run / "eval" / "plots").iterdir()} == {"reconstruction.png", "perplexity.png"}
    assert not list((run / "eval").glob("*.part"))

    identity = report["identity"]
    assert identity["data_fingerprint"] == tokens.fingerprint
    assert identity["sampling"]["num"] == 6
    assert identity["sampling"]["steps"] == 2
    assert identity["judge"]["source"] == "trained"
    assert "nats" in identity["definitions"]["entropy_nats"]

    rows = report["reconstruction"]["rows"]
    assert [row["length"] for row in rows] == [24, 48, 96, 192, 300]
    assert [row["beyond_training"] for row in rows] == [False, False, False, True, True]
    assert "refused" in rows[-1]
    assert "256" in rows[-1]["refused"]
    assert "clean" not in rows[-1]
    assert report["reconstruction"]["decoder_noise_std"] == 0.5
    assert rows[3]["clean"]["by_position"][1]["from"] == 128

    generation = report["generation"]
    assert generation["num_texts"] == 6
    assert len(generation["samples"]) == 5
    assert generation["judge_held_out_nats_per_token"] == 6.5
    assert generation["memorised_share"] in (0, None)

    names = ["held_out_text", "shuffled_words", "unigram_sampler", "bigram_sampler", "repeated_sentence"]
    assert list(report["controls"]) == names
    for row in report["controls"].values():
        assert row["num_texts"] == 5
        assert row["generative_perplexity"] > 1
        assert 0 < row["entropy_nats"] < math.log(256)
    assert report["controls"]["held_out_text"]["valid_stories"] == 1
    assert report["controls"]["held_out_text"]["memorised_share"] == 0
    assert report["controls"]["unigram_sampler"]["valid_stories"] == 0

    markdown = (run / "eval" / "report.md").read_text()
    assert "synthetic" in markdown
    assert report["reconstruction"]["verdict"] in markdown
    assert "| real held-out text |" in markdown


def test_the_report_is_a_function_of_its_settings(run: Path, runtime: Runtime) -> None:
    first = run_evaluation(run, runtime, num=4)
    assert run_evaluation(run, runtime, num=4) == first
    options = SamplingOptions(steps=2, seed=7)
    other = run_evaluation(run, runtime, num=4, options=options)
    assert other["identity"]["sampling"]["seed"] == 7
    assert other["controls"]["bigram_sampler"] != first["controls"]["bigram_sampler"]
    assert first["reconstruction"]["rows"][-1]["length"] == 96


def test_wrong_use_ends_before_any_work(run: Path, runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="--max-len"):
        run_evaluation(run, runtime, max_len=3)
    with pytest.raises(UsageError, match="--num"):
        run_evaluation(run, runtime, num=0)
    with pytest.raises(UsageError, match="token encoder"):
        run_evaluation(run, runtime, judge=str(run / "token_encoder"))


def test_changed_data_is_refused(run: Path, runtime: Runtime, tmp_path: Path) -> None:
    path = run / "snapshot" / "config.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(text) | {"data_fingerprint": "of other data"}))
        with pytest.raises(SnapshotError, match="not those that"):
            run_evaluation(run, runtime)
    finally:
        path.write_text(text)


def test_sampling_options_come_from_the_recipe_unless_given(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert sampling_options(recipe, None, None) == SamplingOptions(num=6, steps=2, seed=recipe.seed)
    assert sampling_options(recipe, SamplingOptions(steps=9), 3) == SamplingOptions(num=3, steps=9)


# ---------------------------------------------------------------------- reconstruction


def test_lengths_double_and_hold_the_training_length() -> None:
    assert reconstruction_lengths(64, 1024) == [16, 32, 64, 128, 256, 512, 1024]
    assert reconstruction_lengths(96, 200) == [24, 48, 96, 192, 200]
    assert reconstruction_lengths(64, 32) == [16, 32, 64]
    assert reconstruction_lengths(8, 8) == [8]


def test_accuracies_count_real_tokens_only() -> None:
    token_ids = np.array([[5, 6, 0, 9], [7, 8, 9, 0]])
    mask = np.array([[True, True, True, False], [True, True, True, True]])
    predicted = np.array([[5, 6, 0, 1], [7, 1, 9, 1]])
    found = accuracies(token_ids, predicted, mask, frozenset({0}))
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["accuracy_words"] == pytest.approx(4 / 5)
    assert found["exact_texts"] == 0.5
    assert found["by_position"] == [{"from": 0, "to": 4, "num_tokens": 7, "accuracy": pytest.approx(5 / 7)}]


def test_accuracies_by_position() -> None:
    token_ids = np.ones((2, 200), dtype=np.int64)
    predicted = token_ids.copy()
    predicted[:, 128:164] = 2
    buckets = accuracies(token_ids, predicted, token_ids > 0, frozenset())["by_position"]
    assert [(row["from"], row["to"], row["num_tokens"]) for row in buckets] == [(0, 128, 256), (128, 200, 144)]
    assert [row["accuracy"] for row in buckets] == [1.0, 0.5]


def row(length: int, accuracy: float) -> dict[str, Any]:
    return {"length": length, "clean": {"accuracy": accuracy}}


def test_verdict_stops_at_the_first_length_that_fails() -> None:
    rows = [row(32, 0.5), row(64, 0.9), row(128, 0.86), row(256, 0.8), row(512, 0.9)]
    found = fidelity_verdict(rows, 64, 0.95)
    assert found["fidelity_holds_to"] == 128
    assert found["verdict"] == (
        "Token accuracy is 90.0% at the training length of 64 tokens and at least 95% of that up to 128 tokens; "
        "at 256 it is 80.0%."
    )


def test_verdict_says_when_nothing_failed_or_nothing_was_asked_or_a_length_was_refused() -> None:
    assert fidelity_verdict([row(64, 0.9), row(128, 0.9)], 64, 0.95)["verdict"].endswith("the longest asked for.")
    assert fidelity_verdict([row(64, 0.9)], 64, 0.95)["verdict"].endswith("longer texts were not asked for.")
    refused = fidelity_verdict([row(64, 0.9), {"length": 128, "refused": "too long"}], 64, 0.95)
    assert refused["fidelity_holds_to"] == 64
    assert refused["verdict"].endswith("at 128 it was not measured: too long.")
    assert fidelity_verdict([{"length": 64, "refused": "too long"}], 64, 0.95)["fidelity_holds_to"] is None


def test_decoder_noise_is_that_of_the_stage_that_trained_the_decoder() -> None:
    stages = {
        "autoencoder": {"trains": ["latent_encoder", "latent_decoder", "token_decoder"], "decoder_noise_std": 0.7},
        "diffusion": {"trains": ["denoiser"], "decoder_noise_std": 3.0},
        "judge": {"kind": "language_model", "role": "judge"},
    }
    recipe = Recipe.model_validate({"stages": stages, "plans": {"sequential": list(stages)}})
    assert trained_decoder_noise(recipe, list(stages)) == 0.7
    assert trained_decoder_noise(recipe, ["judge"]) == 0.0


# ---------------------------------------------------------------------- own estimates, latents


class Believer(torch.nn.Module):
    """A denoiser that takes noised latents for clean ones; right at t = 0."""

    def forward(self, z_t: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return z_t


@pytest.mark.parametrize("standardised", [False, True])
def test_own_estimates_at_time_0_are_reconstruction(
    run: Path, runtime: Runtime, tokens: TokenFolder, standardised: bool
) -> None:
    snapshot = load_snapshot(run)
    if standardised:
        snapshot.model.latent_normalizer.set_statistics(torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16))
    batch, _ = held_out_texts(snapshot, tokens.split("test"))
    for _ in range(3):  # an untrained decoder knows few tokens: texts made of these it can partly read
        batch = Batch(predict(snapshot, batch.token_ids, batch.mask, 0.0, runtime), batch.mask)
    rebuilt = predict(snapshot, batch.token_ids, batch.mask, 0.0, runtime)
    expected = accuracies(batch.token_ids, rebuilt, batch.mask, frozenset())["accuracy"]
    snapshot.model.parts["denoiser"] = Believer()
    found = measure_own_estimates(snapshot, batch, runtime=runtime, times=(0.0, 1e-9))
    assert 0 < found["clean"] == expected
    assert [(row["first"], row["second"]) for row in found["rows"][:2]] == [(expected, expected)] * 2
    assert math.isinf(found["rows"][0]["log_snr"])


def test_the_latent_state_is_on_the_encoders_own_scale(run: Path, runtime: Runtime, tokens: TokenFolder) -> None:
    snapshot = load_snapshot(run)
    batch, _ = held_out_texts(snapshot, tokens.split("test"))
    plain, eigenvalues = measure_latent_state(snapshot, batch, runtime=runtime, noise_std=0.5)
    assert plain["bits"] == pytest.approx(float(0.5 * torch.log2(1 + eigenvalues / 0.25).sum()))
    assert plain["z_std"] == pytest.approx(float(eigenvalues.mean().sqrt()))
    assert "standardised" not in plain
    snapshot.model.latent_normalizer.set_statistics(torch.ones(16), torch.full((16,), 2.0))
    scaled, _ = measure_latent_state(snapshot, batch, runtime=runtime, noise_std=0.5)
    assert scaled["z_std"] == pytest.approx(plain["z_std"], rel=1e-4)
    assert scaled["standardised"]["z_std"] == pytest.approx(plain["z_std"] / 2, rel=1e-4)


# ---------------------------------------------------------------------- texts


def test_whole_training_documents_are_found_and_parts_of_them_are_not() -> None:
    training = TrainingDocuments(split_of([[4, 5, 6], [7], [4, 5, 6, 7], [9, 9, 9]]))
    asked = [[4, 5, 6], [4, 5], [7], [], [5, 6, 7], [9, 9, 9], [4, 5, 6, 7], [4, 5, 6], [1] * 50]
    assert training.contain(asked) == [True, False, True, False, False, True, True, True, False]


def test_a_copied_story_is_memorised_whatever_its_white_space(tokens: TokenFolder) -> None:
    vocabulary, train = tokens.vocabulary, tokens.split("train")
    texts = [vocabulary.decode(train.document(index).tolist()) for index in (0, 1)]
    texts = [texts[0], "  " + texts[1].replace(" ", " \n "), texts[0] + " And so on.", ""]
    found = memorised(TextSet(texts, vocabulary.encode(texts)), vocabulary, TrainingDocuments(train))
    assert found == [True, True, False, False]


def test_matching_texts_are_distinct_documents_of_the_nearest_length(tokens: TokenFolder) -> None:
    test, vocabulary = tokens.split("test"), tokens.vocabulary
    own = [int(length) - 1 for length in test.lengths if length <= 96][:8]
    settings: dict[str, Any] = {"window_tokens": 96, "packed": False, "seed": 0}
    found, kind = matching_texts(test, vocabulary, own, **settings)
    assert kind == "document"
    assert sorted(map(len, found.token_ids)) == sorted(own)
    assert len(set(found.texts)) == len(own)
    assert matching_texts(test, vocabulary, own, **settings)[0] == found
    everything, _ = matching_texts(test, vocabulary, [50] * 1000, **settings)
    assert len(everything.texts) == len(set(everything.texts)) == int((test.lengths <= 96).sum())


def test_packed_corpora_are_matched_with_windows(tokens: TokenFolder) -> None:
    found, kind = matching_texts(
        tokens.split("test"), tokens.vocabulary, [40, 20, 64], window_tokens=64, packed=True, seed=0
    )
    assert kind == "window"
    assert all(len(ids) <= wanted for ids, wanted in zip(found.token_ids, [40, 20, 64], strict=True))


def test_story_fields_are_absent_for_other_corpora(run: Path, tokens: TokenFolder) -> None:
    judge = Judge.open("trained", run=run, recipe=tiny_recipe(tokens.path.parent), device="cpu")
    texts = TextSet(["", ""], [[], []])
    parts: dict[str, Any] = {
        "judge": judge,
        "vocabulary": tokens.vocabulary,
        "training": TrainingDocuments(tokens.split("train")),
    }
    plain = measure_texts(texts, stories=False, **parts)
    assert "valid_stories" not in plain
    assert plain["empty_share"] == 1
    assert plain["duplicate_share"] == 0.5
    assert plain["entropy_nats"] is plain["memorised_share"] is plain["distinct_1"] is None
    assert plain["num_judge_tokens"] == 2  # an empty text still has its end token
    assert measure_texts(texts, stories=True, **parts)["broken_stories"] == {"grammar": 2}


# ---------------------------------------------------------------------- controls


def test_shuffling_keeps_the_words() -> None:
    text = "one two three four five six seven eight"
    shuffled = controls.shuffle_words([text], np.random.default_rng(0))[0]
    assert shuffled != text
    assert sorted(shuffled.split()) == sorted(text.split())


def test_a_repeated_sentence_fills_the_text() -> None:
    assert controls.repeat_sentence("A b c. D e f g.") == "A b c. A b c. A"
    assert controls.repeat_sentence("no stop at all") == "no stop at all"
    assert controls.repeat_sentence("") == ""


def test_unigram_sampler_has_the_frequencies_of_the_stream() -> None:
    stream = np.array([1, 1, 1, 2, 0] * 10)
    drawn = controls.sample_unigrams(stream, [20_000, 3], frozenset({0}), np.random.default_rng(0))
    assert [len(ids) for ids in drawn] == [20_000, 3]
    assert set(drawn[0]) == {1, 2}
    assert np.mean(np.array(drawn[0]) == 1) == pytest.approx(0.75, abs=0.02)


def test_bigram_sampler_follows_the_transitions_of_the_stream() -> None:
    stream = np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 0, 1, 2, 0])  # after 1 comes 2 (3 of 4) or 3, then the end
    drawn = controls.sample_bigrams(stream, 20_000, 10, 0, np.random.default_rng(0))
    assert {tuple(ids) for ids in drawn} == {(1, 2), (1, 3)}
    assert np.mean([ids[1] == 2 for ids in drawn]) == pytest.approx(0.75, abs=0.02)
    endless = controls.sample_bigrams(np.array([0, 1, 1, 1, 1]), 3, 6, 0, np.random.default_rng(0))
    assert all(ids == [1] * len(ids) and len(ids) <= 5 for ids in endless)
