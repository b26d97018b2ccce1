"""The parts: their sizes, layouts and masks, standardisation, and that together they can learn."""

import math
import time

import pytest
import torch
from builders import CPU, TOWERS, VOCAB, draws_of, model_recipe, random_batch, tiny_model

from ldlm_cli.core.cosmos_denoiser import CosmosDenoiser
from ldlm_cli.core.draws import draw_rows, seed_at
from ldlm_cli.core.layers import EndPositions
from ldlm_cli.core.model import LDLM, PARTS, build_parts, parameters_by_part
from ldlm_cli.core.normalizer import Moments, Normalizer, latent_state, whitening_matrix
from ldlm_cli.core.objective import LatentObjective
from ldlm_cli.core.schedule import TangentSchedule
from ldlm_cli.errors import SnapshotError, UsageError
from ldlm_cli.recipe.load import load_recipe
from ldlm_cli.recipe.schema import LatentRecipe, Recipe, TowerRecipe
from ldlm_cli.recipe.stage_schema import StageRecipe

PAPER_MILLIONS = {"latent_encoder": 49.6, "latent_decoder": 49.6, "token_decoder": 66.9, "denoiser": 132.0}


def test_parts_have_the_papers_sizes() -> None:
    found = parameters_by_part(load_recipe("lm1b.yaml"), 50_257)
    assert set(found) == set(PAPER_MILLIONS)
    for name, millions in PAPER_MILLIONS.items():
        assert found[name] / 1e6 == pytest.approx(millions, rel=0.015), name


LAYOUTS = [{"stride": 1}, {"stride": 2}, {"stride": 5}, {"kind": "slots", "slots": 6}]


@pytest.mark.parametrize("latents", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_every_layout_goes_from_tokens_to_logits(latents: dict[str, int], tokens: int) -> None:
    model = tiny_model(model_recipe(16, **latents)).eval()
    ids, mask = random_batch([tokens, max(1, tokens - 3)], tokens)
    count = latents.get("slots") or math.ceil(tokens / latents.get("stride", 1))
    with torch.no_grad():
        z_0 = model.encode(model.hidden(ids, mask), mask)
        latent_mask = model.layout.mask(mask)
        assert z_0.shape == (2, count, 16)
        assert latent_mask.shape == (2, count)
        z_0_hat = model.denoise(z_0, torch.tensor([0.1, 0.9]), torch.zeros_like(z_0), latent_mask)
        logits = model.decode(z_0_hat, latent_mask, mask)
    assert z_0_hat.shape == z_0.shape
    assert logits.shape == (2, tokens, VOCAB)
    assert logits.isfinite().all()
    torch.testing.assert_close(z_0.square().mean(-1), torch.ones(2, count), rtol=1e-3, atol=1e-3)  # norm without gain


def test_number_of_latents_follows_the_text() -> None:
    layout = tiny_model(model_recipe(16, stride=4)).layout
    assert [layout.count(tokens) for tokens in (1, 4, 5, 64, 1000)] == [1, 1, 2, 16, 250]
    assert layout.positions(3, CPU).tolist() == [1.5, 5.5, 9.5]  # in the middle of their tokens
    mask = torch.arange(10)[None] < torch.tensor([[1], [4], [5], [10]])
    assert layout.mask(mask).tolist() == [[True, False, False]] * 2 + [[True, True, False], [True] * 3]


def test_slots_are_fixed_in_number_and_all_real() -> None:
    layout = tiny_model(model_recipe(16, kind="slots", slots=6)).layout
    assert [layout.count(tokens) for tokens in (1, 64)] == [6, 6]
    assert layout.mask(torch.tensor([[True, False, False]])).tolist() == [[True] * 6]


def test_fresh_weights_are_the_same_for_the_same_seed_and_a_denoiser_starts_at_zero() -> None:
    recipe = model_recipe(16)
    torch.manual_seed(4)
    first = build_parts(recipe, VOCAB)
    torch.manual_seed(4)
    second = build_parts(recipe, VOCAB)
    for name in PARTS:
        for one, other in zip(first[name].parameters(), second[name].parameters(), strict=True):
            assert torch.equal(one, other)
    z = torch.randn(1, 3, 16)
    start = first["denoiser"](z, torch.tensor([0.5]), z, torch.ones(1, 3, dtype=torch.bool))
    assert not start.any()


def test_a_part_that_was_not_loaded_says_so() -> None:
    recipe = model_recipe(16)
    model = LDLM(build_parts(recipe, VOCAB, ["denoiser"]), None, recipe)
    with pytest.raises(SnapshotError, match="'latent_decoder' was not loaded"):
        model.decode_hidden(torch.zeros(1, 2, 16), torch.ones(1, 2).bool(), torch.ones(1, 2).bool())
    with pytest.raises(SnapshotError, match="token encoder was not loaded"):
        model.hidden(torch.zeros(1, 2).long(), torch.ones(1, 2).bool())


def test_token_encoder_refuses_more_than_it_can_take() -> None:
    model = tiny_model(model_recipe(16))
    ids = torch.full((1, 255), 5)
    assert model.hidden(ids, ids > 0).shape == (1, 255, 16)  # 256 places, one for the prefix
    with pytest.raises(UsageError, match="at most 255 tokens, got 256"):
        model.hidden(torch.full((1, 256), 5), torch.ones(1, 256).bool())


def test_hidden_states_see_the_past_only_and_not_the_padding() -> None:
    model = tiny_model(model_recipe(16))
    ids, mask = random_batch([6], 9)
    other = ids.clone()
    other[0, 6:] = 33
    torch.testing.assert_close(model.hidden(ids, mask)[:, :6], model.hidden(other, mask)[:, :6])


def test_standardisation_round_trip() -> None:
    rows = torch.randn(500, 6, dtype=torch.float64) * torch.tensor([1e-3, 0.5, 1, 3, 100, 0]) + torch.arange(6)
    moments = Moments(6)
    moments.add(rows[:200])
    moments.add(rows[200:])
    torch.testing.assert_close(moments.mean(), rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.covariance(), torch.cov(rows.T, correction=0), rtol=1e-3, atol=1e-2)
    normalizer = Normalizer(6)
    x = rows.float()
    torch.testing.assert_close(normalizer(x), x)  # the identity until statistics are set
    normalizer.set_statistics(rows.mean(0), rows.std(0, correction=0))
    standard = normalizer(x)
    torch.testing.assert_close(standard[:, :5].std(0, correction=0), torch.ones(5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(standard.mean(0), torch.zeros(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(normalizer.invert(standard), x, rtol=1e-5, atol=1e-5)


def test_standardisation_clips() -> None:
    normalizer = Normalizer(2, clip_std=10.0)
    normalizer.set_statistics(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]))
    found = normalizer(torch.tensor([[1000.0, -3.0], [-1000.0, 11.0]]))
    assert found.tolist() == [[10.0, -3.0], [-10.0, 10.0]]


def test_whitening_levels_what_lies_above_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    rows = torch.randn(20_000, 12, generator=generator, dtype=torch.float64) @ mixing + 3
    covariance, std = torch.cov(rows.T), rows.std(0)
    matrix = whitening_matrix(covariance, std, floor=0.0)
    leveled = torch.cov((((rows - rows.mean(0)) / std) @ matrix).T)
    torch.testing.assert_close(leveled, torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    floored = whitening_matrix(covariance, std, floor=0.1)
    variances = torch.linalg.eigvalsh(torch.cov((((rows - rows.mean(0)) / std) @ floored).T))
    assert float(variances.mean()) == pytest.approx(1, abs=1e-6)
    assert float(variances.max() / variances.min()) < float(torch.linalg.cond(covariance))


def test_latent_state_of_a_known_covariance() -> None:
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    covariance = basis @ torch.diag(torch.tensor([4.0, 4.0, 0.0, 0.0], dtype=torch.float64)) @ basis.T
    state = latent_state(covariance, 2.0)
    assert state["z_std"] == pytest.approx(math.sqrt(2))
    assert state["effective_rank"] == pytest.approx(2)
    assert state["bits"] == pytest.approx(1)  # two dimensions of 1/2 log2(1 + 4/4)
    white = latent_state(torch.eye(768, dtype=torch.float64), 3.0)
    assert white["z_std"] == pytest.approx(1)
    assert white["effective_rank"] == pytest.approx(768)
    assert white["bits"] == pytest.approx(58.4, abs=0.1)
    assert "bits" not in latent_state(torch.eye(3), 0.0)
    assert latent_state(torch.zeros(3, 3), 1.0)["z_std"] == 0  # collapsed


def test_draws_belong_to_rows() -> None:
    whole = draws_of([0, 1, 2, 3], 5, 6)
    part = draws_of([3, 1], 5, 6)
    assert torch.equal(part.uniform, whole.uniform[[3, 1]])
    assert torch.equal(part.noise, whole.noise[:, [3, 1]])
    assert whole.uniform.unique().numel() == 8
    assert whole.noise.unique().numel() == whole.noise.numel()
    other = draw_rows([0], 5, 6, CPU, 5, 8)
    assert not torch.equal(other.noise, whole.noise[:, :1])


def test_draws_are_standard_normal_and_uniform() -> None:
    draws = draw_rows(range(200), 20, 8, CPU, 1)
    assert float(draws.noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(draws.noise.std()) == pytest.approx(1, abs=0.02)
    assert float((draws.noise[0] * draws.noise[1]).mean()) == pytest.approx(0, abs=0.02)
    assert float(draws.uniform.min()) >= 0
    assert float(draws.uniform.max()) < 1
    assert draws.uniform.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.06)


def test_seeds_have_addresses() -> None:
    assert seed_at(1, 2) == seed_at(1, 2)
    seeds = {seed_at(*address) for address in [(), (0,), (0, 0), (1, 2), (2, 1), (12,), (-1,)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_the_model_can_learn_eight_sentences_by_heart() -> None:
    started, width = time.perf_counter(), 32
    recipe = Recipe.model_validate(
        {
            "token_encoder": {"width": width, "layers": 2, "heads": 2},
            "model": {"latents": {"width": width}, **TOWERS},
        }
    )
    torch.manual_seed(0)
    source = tiny_model(recipe).token_encoder
    model = LDLM(build_parts(recipe, VOCAB), source, recipe)
    ids, mask = random_batch([12, 11, 10, 9, 8, 12, 7, 12], 12)
    rows = torch.ones(8)
    stage = StageRecipe(decoder_noise_std=0.3)
    objective = LatentObjective(model, stage, TangentSchedule(0.3), 0.5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, betas=(0.9, 0.98))
    count, first, last = int(mask.sum()), math.nan, math.nan
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min((step + 1) / 20, (300 - step) / 200)
        draws = draw_rows(range(8), 12, width, CPU, step)
        losses = objective(ids, mask, rows, draws.uniform[:, 0], draws, min(1.0, step / 150), count, count)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        last = float(losses.sums["diffusion"]) / count
        first = last if step == 0 else first
    model.eval()
    with torch.no_grad():
        z_0 = model.encode(model.hidden(ids, mask), mask)
        found = model.decode(z_0, mask, mask).argmax(-1)
    accuracy = float((found == ids)[mask].float().mean())
    print(f"token accuracy {accuracy:.3f}, diffusion {first:.3f} -> {last:.3f}, {time.perf_counter() - started:.1f} s")
    assert accuracy > 0.99
    assert last < 0.5 * first


def test_the_ends_of_a_text_are_told_apart_from_its_middle_and_padding_is_not_counted() -> None:
    torch.manual_seed(0)
    ends = EndPositions(8, longest=4)
    mask = torch.tensor([[True] * 6 + [False] * 2, [True] * 8])
    found = ends(mask)
    assert torch.equal(found[0, :6], ends(mask[:1, :6])[0])
    # Six tokens, clipped at a distance of 3: all places differ, by their distances to both ends.
    assert torch.pdist(found[0, :6]).min() > 1e-3
    # In eight tokens the two in the middle are 3 or more from either end: equally far.
    assert torch.equal(found[1, 3], found[1, 4])
    assert not torch.equal(found[1, 2], found[1, 3])


def test_the_cosmos_network_has_the_size_of_the_authors() -> None:
    """129.8M at width 768 and 12 layers; 131.8M with the maps in and out and 1,024 positions (method.md 2.1)."""
    latents = LatentRecipe(width=768, kind="slots", slots=1024)
    with torch.device("meta"):
        network = CosmosDenoiser(latents, TowerRecipe(layers=12, heads=12), longest=1024)
    around = (network.project_in.weight.numel() + 768) + (network.out.weight.numel() + 768) + 1024 * 768
    whole = sum(parameter.numel() for parameter in network.parameters())
    assert round(whole / 1e6, 1) == 131.8
    assert round((whole - around) / 1e6, 1) == 129.8


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_cosmos_network_uses_all_its_inputs_and_weights(layers: int) -> None:
    torch.manual_seed(0)
    network = CosmosDenoiser(LatentRecipe(width=16), TowerRecipe(layers=layers, heads=2), longest=5)
    z_t, z_self = (torch.randn(2, 5, 16, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    t = torch.tensor([0.2, 0.7])
    assert not network(z_t, t, z_self, mask).any()  # the first estimate is zero
    torch.nn.init.normal_(network.out.weight)
    estimate = network(z_t, t, z_self, mask)
    estimate[mask].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert all(given.grad is not None and given.grad[0].any() for given in (z_t, z_self))
    assert not torch.equal(network(z_t, t.flip(0), z_self, mask), estimate)
    changed = torch.where(mask[..., None], z_t, 9.0)
    torch.testing.assert_close(network(changed, t, z_self, mask)[mask], estimate[mask])
