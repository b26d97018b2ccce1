"""`ldlm sample`: parse, then noise -> latents -> text, all positions at once."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ldlm_cli.cli import options
from ldlm_cli.cli.launch import run_in_processes


def sample(
    run: options.RunName = None,
    steps: options.Steps = None,
    num: Annotated[int | None, typer.Option("--num", "-n", callback=options.at_least(1), help="Texts (8).")] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            callback=options.at_least(1),
            help="Tokens a text; may exceed the training length. Drawn from the training lengths if absent.",
        ),
    ] = None,
    sampler: options.Sampler = None,
    grid: options.Grid = None,
    seed: options.SamplingSeed = None,
    temperature: options.Temperature = None,
    churn: Annotated[
        float | None,
        typer.Option("--churn", callback=options.real(at_least=0), help="eta: 0 deterministic, 1 ancestral."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", callback=options.real(at_least=0), help="Self-conditioning guidance; 1 is off."),
    ] = None,
    token_temperature: Annotated[
        float | None,
        typer.Option("--token-temperature", callback=options.real(at_least=0), help="0 takes the likeliest token."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", callback=options.at_least(1), help="Texts sampled together.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write JSON lines; the run's samples/ if absent.")
    ] = None,
    num_processes: options.NumProcesses = 1,
    as_json: options.AsJson = False,
    live: Annotated[
        bool | None, typer.Option("--live/--no-live", help="Show the first text taking shape; on in a terminal.")
    ] = None,
) -> None:
    """Write texts with a trained run; what is not given comes from the run's recipe."""
    from ldlm_cli.checkpoint import find_run, load_snapshot

    folder = find_run(run)
    recipe = options.run_recipe_of(folder)
    run_in_processes(num_processes)

    from ldlm_cli.generate import generate_texts, write_samples
    from ldlm_cli.report import console, tables
    from ldlm_cli.runtime import Runtime

    runtime = Runtime.start(recipe.training.precision)
    given = {
        "num": num,
        "steps": steps,
        "sampler": sampler,
        "grid": grid,
        "seed": seed,
        "length": length,
        "temperature": temperature,
        "churn": churn,
        "guidance": guidance,
        "token_temperature": token_temperature,
        "batch_size": batch_size,
    }
    chosen = options.sampling_options(recipe, given)
    if runtime.is_main:
        console.note(f"run: {folder}")
    parts = ("denoiser", "latent_decoder", "token_decoder")
    snapshot = load_snapshot(folder, parts, runtime.device, token_encoder=False)
    started = time.perf_counter()
    with console.LiveDenoising(wanted=live, silent=as_json or not runtime.is_main) as view:
        texts = generate_texts(snapshot, chosen, runtime=runtime, on_step=view.on_step, on_batch=view.on_batch)
    seconds = time.perf_counter() - started
    if runtime.is_main:
        identity = {
            "run": folder.name,
            "snapshot_hash": snapshot.hash,
            "precision": runtime.precision,
            "sampling": asdict(chosen),
        }
        name = f"{chosen.sampler}-{chosen.steps}-steps-seed-{chosen.seed}.jsonl"
        path = out or folder / "samples" / name
        write_samples(path, texts, identity)
        if as_json:
            rows = [{**asdict(text), "num_tokens": len(text.token_ids)} for text in texts]
            tables.print_json({**identity, "seconds": round(seconds, 3), "out": str(path), "texts": rows})
        else:
            console.print_samples(texts)
            console.note(f"{len(texts)} texts in {seconds:.1f} s, written to {path}")
    runtime.close()
