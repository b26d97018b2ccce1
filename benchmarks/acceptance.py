"""Check a recorded run against the method's acceptance list (method.md, section 10) that needs a real training.

    python benchmarks/acceptance.py runs/base-joint-s0

Prints one line a check with the figure and its bound; exit code 0 when all hold, 1 when one does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from ldlm_cli.checkpoint import list_checkpoints, load_checkpoint, load_snapshot
from ldlm_cli.core.timesteps import AdaptiveTimesteps
from ldlm_cli.data.shards import prepare_tokens
from ldlm_cli.evaluation.own_estimates import held_out_texts
from ldlm_cli.generate import reconstruct
from ldlm_cli.runtime import Runtime


def main(run: Path) -> int:
    """Run every check on a finished run with one joint stage; prints a line each."""
    snapshot = load_snapshot(run)
    recipe = snapshot.recipe
    name = str(snapshot.manifest["stage"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["stage"] == name]
    steps = recipe.stages[name].steps
    past_half = next(row for row in rows if row["encoder_gate"] >= 0.5)
    stds = [row["z_std"] for row in rows if row["step"] > steps / 10]
    clean = clean_accuracy(run)
    checks = [
        ("token accuracy on noised latents when the gate passes 0.5", past_half["token_accuracy"], 0.90, 1.0),
        ("token accuracy on clean latents, held-out text", clean, 0.97, 1.0),
        ("smallest centred std after a tenth of the steps", min(stds), 0.3, 3.0),
        ("largest centred std after a tenth of the steps", max(stds), 0.3, 3.0),
        ("refreshes of the adaptive times", rows[-1]["time_refreshes"], 10, float("inf")),
    ]
    losses = loss_by_bin(run, name)
    if losses is not None:
        # What differs between texts at one place: the rest of var(z_0) a denoiser knows before it has seen anything.
        share = next(row["text_variance_share"] for row in reversed(rows) if "text_variance_share" in row)
        variance = rows[-1]["z_std"] ** 2 * share
        checks.append(("diffusion loss of the first bin over var(z_0) at one place", losses[0] / variance, 0.0, 0.2))
        checks.append(("diffusion loss of the last bin over var(z_0) at one place", losses[-1] / variance, 0.5, 2.0))
    good = True
    for what, value, low, high in checks:
        held = low <= value <= high
        good &= held
        print(f"{'ok  ' if held else 'FAIL'} {what}: {value:.4f} (wanted {low} to {high})")
    return 0 if good else 1


def clean_accuracy(run: Path) -> float:
    """Share of held-out tokens, names included, that come back from clean latents at the training length."""
    snapshot = load_snapshot(run)
    tokens = prepare_tokens(snapshot.recipe.data, snapshot.recipe.token_encoder)
    batch, _ = held_out_texts(snapshot, tokens.split("test"))
    ids, mask = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.mask)
    found = reconstruct(snapshot, ids, mask, runtime=Runtime.start("fp32"))
    return float((found == ids)[mask].float().mean())


def loss_by_bin(run: Path, stage: str) -> list[float] | None:
    """Mean diffusion loss by bin of time from the last checkpoint inside the stage, None when there is none."""
    for folder in reversed(list_checkpoints(run)):
        _, _, state = load_checkpoint(folder)
        if state["step"] > 0 and "times" in state["task"]:
            times = AdaptiveTimesteps(load_snapshot(run).recipe.stages[stage].times)
            times.load_state_dict(state["task"]["times"])
            return [float(loss) for loss in times.mean_losses()]
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/acceptance.py RUN")
    sys.exit(main(Path(sys.argv[1])))
