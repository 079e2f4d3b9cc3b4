"""The command ``fedrebasin compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from fedrebasin.simulations.cli_options import (
    DataPath,
    Device,
    Matching,
    Model,
    Norm,
    Output,
    Seeds,
    Select,
    Width,
    command_line,
)


def compare(
    data: Annotated[str, typer.Argument(help="digits, mnist, cifar10 or cifar100.")] = "digits",
    strategies: Annotated[
        str,
        typer.Option(
            help="With commas between: fedavg, fedavgm, fedprox, fedadam, fedyogi, fedadagrad, fedmedian, fedrebasin, "
            "rebasin:NAME; the last two also with +CORRECTION, or +CORRECTION@ROUNDS (as @1+5) for these rounds alone."
        ),
    ] = "fedavg,fedrebasin",
    nodes: Annotated[int, typer.Option(min=2, help="Number of clients.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each strategy.")] = 3,
    partition: Annotated[str, typer.Option(help="biased:HELD, dirichlet:ALPHA or iid.")] = "biased:0.2",
    start: Annotated[
        str,
        typer.Option(
            help="apart: own initialisations; common: the server's; joins:ROUND: common, but the last node trains "
            "apart and joins at that round."
        ),
    ] = "apart",
    absent: Annotated[float, typer.Option(help="Probability that a node is absent from a round; two stay.")] = 0.0,
    model: Model = "",
    width: Width = None,
    norm: Norm = "batch",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Local epochs of round 1, or of who joins; default: the data set's.")
    ] = None,
    later_epochs: Annotated[int | None, typer.Option(min=1, help="Local epochs of each later round.")] = None,
    seeds: Seeds = "0",
    data_path: DataPath = None,
    reference: Annotated[
        str, typer.Option(help="auto, global, largest, merge-many, medoid, cycle-consistent or straight-through-many.")
    ] = "auto",
    matching: Matching = "weight",
    correction: Annotated[
        str,
        typer.Option(
            help="none, repair, reset-batchnorm, rescale, reshift, closed-form, bias-normalisation, least-squares, "
            "least-squares-probabilities, regmean, distill, least-squares+distill, patient-distill or "
            "best-end[-probabilities]; on the "
            "clients' own data federated-repair[-at-once], federated-least-squares[-prior], federated-regmean; a "
            "strategy's +NAME wins; with --select several, with commas between."
        ),
    ] = "none",
    select: Select = "none",
    calibration: Annotated[
        int, typer.Option(min=1, help="Images for corrections (federated: of each node) and matching.")
    ] = 1000,
    server_lr: Annotated[float, typer.Option(help="FedAdam's, FedYogi's and FedAdagrad's eta.")] = 0.01,
    proximal_mu: Annotated[float, typer.Option(help="FedProx's mu.")] = 0.01,
    device: Device = "cpu",
    output: Output = None,
) -> None:
    """Compare strategies on clients that start apart or together, in Flower's simulation runtime.

    Data sets: digits, mnist, cifar10, cifar100. It needs Linux or macOS.
    """
    from fedrebasin.simulations.settings import Settings, resolve

    settings = resolve(
        Settings(
            data=data,
            strategies=strategies,
            rounds=rounds,
            partition=partition,
            start=start,
            absent=absent,
            model=model,
            width=width or 0,
            norm=norm,
            epochs=epochs or 0,
            later_epochs=later_epochs or 0,
            seeds=seeds,
            reference=reference,
            matching=matching,
            correction=correction,
            select=select,
            calibration=calibration,
            server_lr=server_lr,
            proximal_mu=proximal_mu,
            device=device,
        )
    )
    from fedrebasin.simulations.compare import Options, check_extra
    from fedrebasin.simulations.compare import compare as run_comparison

    check_extra()
    from fedrebasin.simulations.console import print_summary, progress_display
    from fedrebasin.simulations.results import load_results

    options = Options(settings, nodes=nodes, path=data_path, output=output, command=command_line())
    with progress_display(rounds * len(settings.line_up) * len(settings.seed_list)) as on_event:
        folder = run_comparison(options, on_event=on_event)
    print_summary(load_results(folder / "results.json"), folder)
