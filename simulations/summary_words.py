"""What the page of a comparison says in words: the question, the answer in numbers, and how it was done."""

from __future__ import annotations

from fedrebasin.corrections.methods import CORRECTIONS
from fedrebasin.matching.methods import METHODS
from fedrebasin.simulations.competitors import corrections_of, label_of
from fedrebasin.simulations.settings import join_round
from fedrebasin.simulations.summary import Results, baseline_rows, by_round, percent, strategies


def question_of(results: Results) -> str:
    """What the run asks."""
    settings = results["settings"]
    nodes, data, partition = results["nodes"], results["data"]["name"], settings["partition"]
    if settings["start"] == "apart":
        begin = (
            f"{nodes} nodes train a network on their own part of {data} ({partition}), each from its own random start"
        )
        text = f"{begin}, for {_epochs(settings['epochs'])}, and then send it.{_absences(results)}"
        return f"{text} What does each strategy make of them?"
    begin = f"{nodes} nodes train on their own part of {data} ({partition}), from one common start"
    joins = join_round(settings["start"])
    if joins:
        return (
            f"{begin}; the last one joins in round {joins} with a network that it trained alone, from its own random "
            f"start, for {_epochs(settings['epochs'])}.{_absences(results)} What does each strategy make of it?"
        )
    text = f"{begin}, {_epochs(settings['epochs'])} in round 1.{_absences(results)}"
    return f"{text} Does alignment change what each strategy makes of them?"


def _absences(results: Results) -> str:
    absent = results["settings"].get("absent", 0.0)  # files of earlier versions have no such setting
    return f" Each is absent from a round with probability {absent:g}." if absent else ""


def _epochs(number: int) -> str:
    return f"{number} epoch" + ("s" if number != 1 else "")


def answer_of(results: Results) -> str:
    """The numbers that answer it, in one or two sentences, whoever wins."""
    last = results["settings"]["rounds"]
    names = strategies(results)
    rounds = sorted({join_round(results["settings"]["start"]) or 1, last})
    said = []
    for number in rounds:
        parts = [f"{label_of(name)} {percent(by_round(results, name, 'accuracy', number))}" for name in names]
        said.append(f"Test accuracy in % after round {number}: {', '.join(parts)}.")
    baselines = [f"{name} {percent(accuracies)}" for name, accuracies, _ in baseline_rows(results)]
    if baselines:
        said.append(f"For comparison: {', '.join(baselines)}.")
    return " ".join(said)


def spread_note(results: Results) -> str:
    n = len(results["partition"])
    start = "Start is the random model that the server sends; with clients that start apart nobody trains from it. "
    start = start if results["settings"]["start"] == "apart" else "Start is the model that the server sends first. "
    return start + (f"Mean ± standard deviation over {n} seeds." if n > 1 else f"One seed ({_seeds(results)}).")


def _seeds(results: Results) -> str:
    return ", ".join(str(part["seed"]) for part in results["partition"])


def method_of(results: Results) -> str:
    """Network, epochs, data and options of the run."""
    settings = results["settings"]
    network = f"Network: {settings['model']}, width {settings['width']}"
    network += "" if settings["model"] == "mlp" else f", {settings['norm']} norm"
    joins = join_round(settings["start"])
    first, later = _epochs(settings["epochs"]), _epochs(settings["later_epochs"])
    local = f"{first} in round 1 and {later} in each later round" if not joins else f"{later} in each round"
    text = f"{network}. Each client trains {local}. All strategies ran in one run of Flower's simulation runtime."
    if settings["start"] == "apart":
        text += (
            " FedAvg from a common start trains for the same epochs, but from the one model that the server sent."
            " In round 1 apart nothing that a server sends enters a client's training, so each client was trained once "
            "and every strategy merged the same weights."
        )
    if joins:
        text += (
            f" The node that joins does not look at the model that is sent in round {joins}: its network was trained "
            f"once, for {first}, and every strategy got the same weights. Later it trains like the others. FedAvg from "
            f"a common start: there it trains {first} in round {joins} too, but from the model that was sent."
        )
    if settings.get("absent", 0.0):
        text += f" Absent with probability {settings['absent']:g}: drawn for each seed and round; at least two stay."
    names = strategies(results)
    used = {one for name in names if "rebasin" in name for one in corrections_of(name, settings["correction"])}
    if any(name.startswith("federated-") for name in used):
        text += f" Federated corrections used up to {settings['calibration']} of each client's own training images."
    if any(name in CORRECTIONS and CORRECTIONS[name].inputs for name in used):
        text += f" Corrections used {settings['calibration']} training images without labels on the server."
    select = settings.get("select", "none")  # files of earlier versions have no such setting
    if select == "clients":
        text += (
            " Re-basin strategies kept the model of each round with the lowest loss on a fifth of each node's rows, "
            "on which nothing was trained or corrected, by any strategy."
        )
    if select == "calibration":
        text += (
            " Re-basin strategies kept the best of each round's models by agreement with the clients' ensemble, on a "
            f"quarter of {settings['calibration']} training images that no correction used."
        )
    method = METHODS[settings["matching"]]
    if method.inputs:
        labels = "their labels" if method.targets else "no labels"
        name = settings["matching"].capitalize()
        text += f" {name} matching used {settings['calibration']} training images and {labels}."
    if any(name.endswith(("fedadam", "fedyogi", "fedadagrad")) for name in names):
        text += f" Server learning rate of the adaptive optimizers: {settings['server_lr']:g}."
    if "fedprox" in " ".join(names):
        off = ", its term off in round 1" if settings["start"] == "apart" else ""
        text += f" FedProx's mu: {settings['proximal_mu']:g}{off}."
    unfinished = results.get("unfinished", [])
    if unfinished:
        text += f" The run ended before it was through with seed {', '.join(map(str, unfinished))}: left out here."
    return text
