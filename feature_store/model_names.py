"""Names that `Dataset.models` may hold; `jobs/training/presets.py` has a configuration for each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from feature_store.errors import SpecError

_USUAL = ("sum", "sequence", "hybrid")
_SHIFTS = ("regularise", "distil")  # answers to embedding shift
MODELS = (*_USUAL, *(f"{name}_{shift}" for name in _USUAL for shift in _SHIFTS))


def domain_value(model: str, domain: str | None) -> int | None:
    """Which domain's targets `sum_<domain feature>_<value>` is trained on; None: another name."""
    found = re.fullmatch(rf"sum_{domain}_(\d+)", model) if domain else None
    return int(found[1]) if found else None


def check_models(field_name: str, models: Iterable[str], domain: str | None) -> None:
    """Refuse a name that no configuration has.

    Raises:
        SpecError: names the known ones, and the nearest.
    """
    of_domains = (f"sum_{domain}_<value>",) if domain else ()
    for model in models:
        if model not in MODELS and domain_value(model, domain) is None:
            near = difflib.get_close_matches(str(model), MODELS, n=1)
            raise SpecError(
                f"{field_name} has {model!r}, and no model is called so: "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"known are {', '.join((*MODELS, *of_domains))}; a new one gets its name in "
                "feature_store/model_names.py and its configuration in jobs/training/presets.py"
            )
