"""The command ``fedrebasin``. What is heavy, but for torch, is imported where it is used."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import click
import typer

from fedrebasin.simulations.cli_options import DataPath, Device, Matching, Model, Norm, Output, Seeds, Select, Width

app = typer.Typer(
    name="fedrebasin",
    help="Merge models that were trained apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
reproduce = typer.Typer(help="Repeat a published experiment.", no_args_is_help=True)
app.add_typer(reproduce, name="reproduce")


@app.command()
def compare(
    data: Annotated[str, typer.Argument(help="digits, mnist, cifar10 or cifar100.")] = "digits",
    strategies: Annotated[
        str,
        typer.Option(
            help="With commas between: fedavg, fedavgm, fedprox, fedadam, fedyogi, fedadagrad, fedmedian, fedrebasin, "
            "rebasin:NAME; the last two also with +CORRECTION."
        ),
    ] = "fedavg,fedrebasin",
    nodes: Annotated[int, typer.Option(min=2, help="Number of clients.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each strategy.")] = 3,
    partition: Annotated[str, typer.Option(help="biased:HELD, dirichlet:ALPHA or iid.")] = "biased:0.2",
    start: Annotated[str, typer.Option(help="apart: own initialisations; common: the server's.")] = "apart",
    model: Model = "",
    width: Width = None,
    norm: Norm = "batch",
    epochs: Annotated[int | None, typer.Option(min=1, help="Local epochs of round 1; default: the data set's.")] = None,
    later_epochs: Annotated[int | None, typer.Option(min=1, help="Local epochs of each later round.")] = None,
    seeds: Seeds = "0",
    data_path: DataPath = None,
    reference: Annotated[
        str,
        typer.Option(help="auto, global, largest, merge-many, medoid, cycle-consistent or straight-through-many."),
    ] = "auto",
    matching: Matching = "weight",
    correction: Annotated[
        str,
        typer.Option(
            help="none, repair, reset-batchnorm, rescale, reshift, closed-form, bias-normalisation, least-squares, "
            "regmean or distill; on the clients' own data federated-repair[-at-once], federated-least-squares[-prior], "
            "federated-regmean; a strategy's +NAME wins; with --select several, with commas between."
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
    """Compare strategies on clients that start apart or together, in Flower's simulation runtime."""
    from fedrebasin.simulations.settings import Settings, resolve

    settings = resolve(
        Settings(
            data=data,
            strategies=strategies,
            rounds=rounds,
            partition=partition,
            start=start,
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

    options = Options(settings, nodes=nodes, path=data_path, output=output, command=_command_line())
    with progress_display(rounds * len(settings.line_up) * len(settings.seed_list)) as on_event:
        folder = run_comparison(options, on_event=on_event)
    print_summary(load_results(folder / "results.json"), folder)


@reproduce.callback()
def _reproduce() -> None:
    """Repeat a published experiment."""


@reproduce.command()
def disjoint(
    dataset: Annotated[str, typer.Argument(help="digits, mnist, cifar10 or cifar100.")],
    model: Model = "",
    width: Width = None,
    norm: Norm = "batch",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each training; default: the data set's.")] = None,
    seeds: Seeds = "0",
    held: Annotated[float, typer.Option(help="Share of a class that goes to the other half.")] = 0.2,
    lams: Annotated[int, typer.Option(min=3, help="Points between the two models.")] = 25,
    calibration: Annotated[int, typer.Option(min=1, help="Images for corrections and for matching by data.")] = 5000,
    matching: Matching = "weight",
    data_path: DataPath = None,
    device: Device = "auto",
    output: Output = None,
) -> None:
    """Two models of two halves of the data, and the way between them (Git Re-Basin, Section 5.4)."""
    from fedrebasin.simulations.disjoint import DisjointOptions, reproduce_disjoint
    from fedrebasin.simulations.settings import parse_seeds

    options = DisjointOptions(
        dataset=dataset,
        path=Path(data_path) if data_path else None,
        model=model or None,
        width=width,
        norm=norm,
        epochs=epochs,
        seeds=tuple(parse_seeds(seeds)),
        held=held,
        lams=lams,
        device=device,
        output=output or Path("fedrebasin-results") / f"disjoint-{dataset}",
        calibration_images=calibration,
        matching=matching,
        command=_command_line(),
    )
    page = reproduce_disjoint(options, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"the page is {page}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="module:factory, a function or class that makes the model.")] = "",
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Shape of an input, 1x3x32x32 (float32), 1x16:int64, or KEYWORD=SHAPE; once for each input.",
        ),
    ] = None,
    kwargs: Annotated[str, typer.Option(help="The factory's arguments as a JSON object.")] = "",
    vocab: Annotated[
        int | None, typer.Option(min=1, help="Integers are drawn below this; default: rows of the smallest embedding.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse an op that no rule covers.")] = False,
    check: Annotated[bool, typer.Option(help="Prove the spec on random weights.")] = True,
    html: Annotated[Path | None, typer.Option(help="Write a page with a picture of the tied layers.")] = None,
    save: Annotated[Path | None, typer.Option("--save", "--json", help="Write the spec as JSON.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of inputs and of the proof's random weights.")] = 0,
    zoo: Annotated[bool, typer.Option("--zoo", help="Inspect torchvision's classifiers instead of one model.")] = False,
    only: Annotated[str, typer.Option(help="With --zoo: names of models with commas between.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="With --zoo: folder of results.json; a second run goes on with it.")
    ] = None,
) -> int:
    """Show which units of a model may change places, what stays fixed and why, and prove it."""
    from fedrebasin.simulations.inspection_command import Request, inspect_request, refuse, spinner
    from fedrebasin.simulations.inspection_tables import print_inspection

    if zoo:
        from fedrebasin.simulations.inspection_zoo import ZooOptions, run_zoo
        from fedrebasin.simulations.inspection_zoo_table import print_zoo

        one = {"model": model, "--input": inputs, "--kwargs": kwargs, "--vocab": vocab, "--strict": strict}
        refuse({**one, "--no-check": not check, "--html": html, "--save": save}, "has no meaning with --zoo")
        names = tuple(name.strip() for name in only.split(",") if name.strip())
        options = ZooOptions(only=names, seed=seed, command=_command_line())
        return print_zoo(run_zoo(replace(options, output=output) if output else options))
    refuse({"--only": only, "--output": output}, "needs --zoo")
    with spinner() as on_phase:
        request = Request(
            model, inputs or (), kwargs, vocab, strict=strict, check=check, seed=seed, html=html, save=save
        )
        found = inspect_request(replace(request, command=_command_line(), on_phase=on_phase))
    print_inspection(found)
    return 0


def _command_line() -> str:
    return shlex.join(["fedrebasin", *sys.argv[1:]])


def main() -> None:
    """Run the command; whatever the user can mend is one line on stderr and exit status 2."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command with ``arguments`` and return its exit status."""
    try:
        status = typer.main.get_command(app).main(args=arguments, prog_name="fedrebasin", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        return _complain(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fedrebasin"):
            raise
        return _complain(f'missing: {error.name}; pip install "fedrebasin[simulation]"', 2)
    except BaseException as error:
        status = _status_of(error)
        if status is None:
            raise
        return _complain(str(error), status)
    return status if isinstance(status, int) else 0


def _status_of(error: BaseException) -> int | None:
    from fedrebasin.errors import RebasinError

    if isinstance(error, RebasinError):
        return 2
    from fedrebasin.simulations.interrupts import Interrupted
    from fedrebasin.simulations.runtime import RunError

    if isinstance(error, RunError):
        return 1
    return error.status if isinstance(error, Interrupted) else None


def _complain(message: str, status: int) -> int:
    line = " ".join(message.split())
    print(f"fedrebasin: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
