"""Numbers that an earlier run measured with the same config and the same code, and the code's fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fedrebasin
from fedrebasin.errors import UsageError
from fedrebasin.simulations.results import load_results, save_results

#: modules of the simulations that decide the weights of a trained end
TRAINING = ("data", "models", "augment", "acceleration", "training", "train_checkpoint", "ends")
#: and those that decide what is measured on them
MEASURING = (*TRAINING, "measures", "disjoint_bench", "disjoint_seed", "sweep_point")


def measured_once(
    path: Path,
    config: Mapping[str, Any],
    measure: Callable[[], Mapping[str, Any]],
    *,
    label: str,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return what ``measure`` gives, from the file at ``path`` if it was made with this config and this code.

    Either way the numbers are as JSON keeps them.
    """
    facts = {"config": config, "code": measuring_code()}
    if path.exists():
        earlier = load_kept(path)
        if (earlier.get("config"), earlier.get("code")) == (json.loads(json.dumps(config)), facts["code"]):
            progress(f"{label}: measured earlier, used again")
            kept: dict[str, Any] = earlier["result"]
            return kept
    save_results(path, {**facts, "result": measure()})
    found: dict[str, Any] = load_results(path)["result"]
    return found


def load_kept(path: Path) -> dict[str, Any]:
    """Read a file that a run goes on with; a damaged one is the user's to delete."""
    try:
        return load_results(path)
    except UsageError as error:
        raise UsageError(f"{error}; delete the file, and the run makes it again") from error


def measuring_code() -> str:
    """Fingerprint of the code that decides measured numbers: a commit says nothing of changes on top of it."""
    core = Path(fedrebasin.__file__).parent
    kept_out = {"simulations", "strategies"}  # links to what does not decide a number, but for the modules above
    files = [path for path in core.rglob("*.py") if path.relative_to(core).parts[0] not in kept_out]
    return _fingerprint([*sorted(files), *_modules(MEASURING)])


def training_code() -> str:
    """Fingerprint of the code that decides the weights of a trained end."""
    return _fingerprint(_modules(TRAINING))


def _modules(names: Sequence[str]) -> list[Path]:
    return [Path(__file__).with_name(f"{name}.py") for name in names]


def _fingerprint(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
