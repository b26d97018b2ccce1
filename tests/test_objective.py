"""The three losses: where their gradients go, and that padding, rows and processes do not change them."""

import dataclasses
from typing import Any

import pytest
import torch
from builders import draws_of, model_recipe, random_batch, tiny_model
from torch import Tensor

from ldlm_cli.core.draws import Draws
from ldlm_cli.core.model import LDLM, PARTS
from ldlm_cli.core.objective import LatentLosses, LatentObjective
from ldlm_cli.core.process import amplitudes
from ldlm_cli.core.schedule import TangentSchedule
from ldlm_cli.recipe.stage_schema import StageRecipe

WIDTH, SCHEDULE = 16, TangentSchedule(1.5)
LENGTHS = (12, 9, 5, 12)
T = torch.tensor([0.2, 0.5, 0.8, 0.35], dtype=torch.float64)


@pytest.fixture(scope="module", params=[1, 2], ids=["stride1", "stride2"])
def model(request: pytest.FixtureRequest) -> LDLM:
    return tiny_model(model_recipe(WIDTH, stride=request.param))


def objective(model: LDLM, sharing: float = 0.5, noise: float = 0.3, **losses: float) -> LatentObjective:
    weights = losses or {"diffusion": 1.0, "hidden": 1.0, "token": 1.0}
    stage = StageRecipe.model_validate({"losses": weights, "decoder_noise_std": noise})
    return LatentObjective(model, stage, SCHEDULE, sharing)


def inputs(model: LDLM, padded: int = 12) -> dict[str, Any]:
    ids, mask = random_batch(LENGTHS, padded)
    latents = model.layout.count(padded)
    return {
        "token_ids": ids,
        "token_mask": mask,
        "row_weight": torch.ones(len(LENGTHS)),
        "t": T,
        "draws": draws_of(range(len(LENGTHS)), latents, WIDTH),
        "gate": 1.0,
        "token_count": int(mask.sum()),
        "latent_count": int(model.layout.mask(mask).sum()),
    }


def rows_of(given: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The same step with only these rows; the global counts stay."""
    cut = {name: given[name][rows] for name in ("token_ids", "token_mask", "row_weight", "t")}
    draws = given["draws"]
    return given | cut | {"draws": Draws(draws.uniform[rows], draws.noise[:, rows])}


def gradients(model: LDLM, losses: LatentLosses) -> dict[str, Tensor | None]:
    """Gradient of the total by part, flattened; None where the loss does not depend on the part at all."""
    model.zero_grad(set_to_none=True)
    losses.total.backward()
    found: dict[str, Tensor | None] = {}
    for name in PARTS:
        held = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.part(name).parameters()]
        seen = any(p.grad is not None for p in model.part(name).parameters())
        found[name] = torch.cat([grad.flatten() for grad in held]) if seen else None
    return found


def is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or not gradient.any()


def test_token_loss_trains_the_token_decoder_only(model: LDLM) -> None:
    found = gradients(model, objective(model, token=1.0)(**inputs(model)))
    assert not is_zero(found["token_decoder"])
    assert all(is_zero(found[name]) for name in PARTS if name != "token_decoder")


def test_hidden_loss_trains_encoder_and_latent_decoder(model: LDLM) -> None:
    found = gradients(model, objective(model, hidden=1.0)(**inputs(model)))
    assert [name for name in PARTS if not is_zero(found[name])] == ["latent_encoder", "latent_decoder"]


def test_diffusion_loss_trains_denoiser_and_encoder(model: LDLM) -> None:
    found = gradients(model, objective(model, diffusion=1.0)(**inputs(model)))
    assert [name for name in PARTS if not is_zero(found[name])] == ["latent_encoder", "denoiser"]


def test_token_encoder_is_frozen(model: LDLM) -> None:
    gradients(model, objective(model)(**inputs(model)))
    assert model.token_encoder is not None
    assert all(p.grad is None and not p.requires_grad for p in model.token_encoder.parameters())
    model.train()
    assert not any(module.training for module in model.token_encoder.modules())
    model.eval()


def test_encoder_gradient_is_linear_in_the_gate_and_the_denoiser_does_not_see_it(model: LDLM) -> None:
    found = {
        gate: gradients(model, objective(model, diffusion=1.0)(**inputs(model) | {"gate": gate}))
        for gate in (0.0, 0.1, 0.5, 1.0)
    }
    full = found[1.0]
    assert full["latent_encoder"] is not None
    assert is_zero(found[0.0]["latent_encoder"])
    for gate in (0.1, 0.5):
        torch.testing.assert_close(found[gate]["latent_encoder"], gate * full["latent_encoder"], rtol=1e-4, atol=1e-5)
    for gate in (0.0, 0.1, 0.5):
        torch.testing.assert_close(found[gate]["denoiser"], full["denoiser"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [1.0, 0.25])
def test_encoder_gradient_comes_through_input_and_target(model: LDLM, gate: float) -> None:
    """Against the two partial derivatives taken by hand at separate leaves."""
    given = inputs(model) | {"gate": gate}
    found = gradients(model, objective(model, diffusion=1.0)(**given))["latent_encoder"]

    z_0 = model.encode(model.hidden(given["token_ids"], given["token_mask"]), given["token_mask"])
    as_input, as_target = (z_0.detach().clone().requires_grad_() for _ in range(2))
    latent_mask = model.layout.mask(given["token_mask"])
    alpha, sigma = amplitudes(given["t"], SCHEDULE, z_0)
    z_t = alpha * as_input + sigma * given["draws"].noise[0]
    with torch.no_grad():
        coin = (given["draws"].uniform[:, 1] < 0.5).float()[:, None, None]
        z_self = coin * model.denoise(z_t, given["t"], torch.zeros_like(z_t), latent_mask)
    assert 0 < coin.sum() < len(coin)  # some texts are self-conditioned, some are not
    error = (model.denoise(z_t, given["t"], z_self, latent_mask) - as_target).square().mean(-1)
    through_input, through_target = torch.autograd.grad(
        (error * latent_mask).sum() / given["latent_count"], [as_input, as_target]
    )

    def at_encoder(gradient: Tensor) -> Tensor:
        parts = torch.autograd.grad(z_0, list(model.part("latent_encoder").parameters()), gradient, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    by_input, by_target = at_encoder(through_input), at_encoder(through_target)
    assert by_input.norm() > 1e-3 * by_target.norm() > 0
    torch.testing.assert_close(found, gate * (by_input + by_target), rtol=1e-4, atol=1e-6)


def test_no_gradient_through_the_first_estimate(model: LDLM) -> None:
    """With every text self-conditioned the denoiser's gradient is that of the second pass alone."""
    given = inputs(model) | {"gate": 0.0}
    found = gradients(model, objective(model, sharing=1.0, diffusion=1.0)(**given))["denoiser"]
    latent_mask = model.layout.mask(given["token_mask"])
    with torch.no_grad():
        z_0 = model.encode(model.hidden(given["token_ids"], given["token_mask"]), given["token_mask"])
        alpha, sigma = amplitudes(given["t"], SCHEDULE, z_0)
        z_t = alpha * z_0 + sigma * given["draws"].noise[0]
        z_self = model.denoise(z_t, given["t"], torch.zeros_like(z_t), latent_mask)
    error = (model.denoise(z_t, given["t"], z_self, latent_mask) - z_0).square().mean(-1)
    loss = (error * latent_mask).sum() / given["latent_count"]
    expected = torch.autograd.grad(loss, list(model.part("denoiser").parameters()))
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in expected]), rtol=1e-4, atol=1e-6)


def test_decoder_noise_is_not_the_diffusion_noise(model: LDLM) -> None:
    given = inputs(model)
    draws = given["draws"]
    other = given | {"draws": dataclasses.replace(draws, noise=torch.stack([draws.noise[0], -draws.noise[1]]))}
    first, second = objective(model)(**given), objective(model)(**other)
    assert torch.equal(first.sums["diffusion"], second.sums["diffusion"])
    assert abs(float(first.sums["hidden"] - second.sums["hidden"])) > 1e-3


def per_text(model: LDLM, given: dict[str, Any], row: int) -> dict[str, float]:
    """The sums of one text when every other row of its batch has weight 0."""
    weight = torch.zeros(len(given["row_weight"]))
    weight[row] = 1
    with torch.no_grad():
        losses = objective(model)(**given | {"row_weight": weight})
    return {name: float(value) for name, value in losses.sums.items()}


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_a_text_does_not_depend_on_its_padding_or_on_other_rows(model: LDLM, row: int) -> None:
    given = inputs(model, padded=12)
    expected = per_text(model, given, row)
    # More padding (with garbage in it), the same draws at the text's own places.
    wide = inputs(model, padded=20)
    ids = wide["token_ids"].clone()
    ids[:, :12] = given["token_ids"]
    ids[~wide["token_mask"]] = 17
    noise = torch.full_like(wide["draws"].noise, 99.0)
    noise[:, :, : given["draws"].noise.shape[2]] = given["draws"].noise
    wide |= {"token_ids": ids, "draws": Draws(given["draws"].uniform, noise)}
    # Alone, and beside other texts.
    alone = rows_of(given, [row])
    others = given | {"token_ids": torch.where(torch.arange(4)[:, None] == row, given["token_ids"], 9)}
    for changed, place in ((wide, row), (alone, 0), (others, row)):
        assert per_text(model, changed, place) == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_rows_of_weight_zero_change_nothing(model: LDLM) -> None:
    given = inputs(model)
    longer = rows_of(given, [0, 1, 2, 3, 0, 2])
    longer["row_weight"] = torch.tensor([1.0, 1, 1, 1, 0, 0])
    plain, filled = objective(model)(**given, keep_latents=True), objective(model)(**longer, keep_latents=True)
    torch.testing.assert_close(filled.total, plain.total)
    assert plain.z_0 is not None
    assert filled.z_0 is not None
    assert plain.z_0.shape == filled.z_0.shape == (given["latent_count"], WIDTH)
    grads, grads_filled = gradients(model, plain), gradients(model, filled)
    for name in PARTS:
        torch.testing.assert_close(grads_filled[name], grads[name], rtol=1e-4, atol=1e-6)


def test_two_micro_batches_sum_to_the_whole(model: LDLM) -> None:
    given = inputs(model)
    build = objective(model)
    whole = gradients(model, build(**given))
    pieces = [build(**rows_of(given, rows)) for rows in ([0, 2], [1, 3])]
    total = sum(float(piece.total.detach()) for piece in pieces)
    assert total == pytest.approx(float(build(**given).total.detach()), rel=1e-5)
    parts = [gradients(model, piece) for piece in pieces]
    for name in PARTS:
        summed = torch.stack([part[name] for part in parts if part[name] is not None]).sum(0)
        torch.testing.assert_close(summed, whole[name], rtol=1e-4, atol=1e-6)


def test_total_is_weighted_sums_over_global_counts(model: LDLM) -> None:
    given = inputs(model) | {"token_count": 1000, "latent_count": 400}
    losses = objective(model, diffusion=0.5, hidden=2.0, token=3.0)(**given)
    sums = losses.sums
    expected = 0.5 * sums["diffusion"] / 400 + (2 * sums["hidden"] + 3 * sums["token"]) / 1000
    torch.testing.assert_close(losses.total.detach(), expected)
    counts = model.layout.mask(given["token_mask"]).sum(1)
    assert losses.text_diffusion is not None
    torch.testing.assert_close((losses.text_diffusion * counts).sum(), sums["diffusion"])


def test_absent_losses_are_not_computed(model: LDLM) -> None:
    losses = objective(model, hidden=1.0, diffusion=0.0)(**inputs(model))
    assert set(losses.sums) == {"hidden"}
    assert losses.text_diffusion is None
