"""DIN, DIEN, TransAct and BST by FuxiCTR (https://github.com/reczoo/FuxiCTR), on the same rows.

Their published models and their own fit loop are imported from a clone; nothing of it is copied
here. Hyper-parameters are the `<model>_default` of their configuration, but for what is in `_OURS`
(sizes that a CPU can train) and for what `CHOICES` tries, one after the other, by NE on the
validation day with a share of the training users, on the first task; the other tasks take over what
it chose. They stop early, and step down the learning rate, by AUC less log loss on the validation
day, twice per pass, as in their configuration.

The models read every id and number of `data.py`, the hand-made summaries too, and the newest clicks:
article, topic, section, referrer and age. A number is embedded in `_NUMBER_DIM` dimensions.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.globo.data import WINDOW, Flat, predicted
from benchmarks.globo.encoded import AGE, AGES, LABEL, SEQUENCE, Batches, Encoder, Pad
from benchmarks.results import PARTS, Predictions, joined, tune
from feature_store.errors import SpecError
from jobs.training.ids import in_share
from models.metrics import logloss

_SAMPLE = 0x66757869
_NUMBER_DIM = 2
_LEAST = 5  # times that an id comes, to have an embedding of its own
_HELP = (
    "git clone https://github.com/reczoo/FuxiCTR, install what it imports beside torch with "
    "`pip install --no-deps --target <clone>/site h5py polars polars-runtime-32 keras_preprocessing six`, "
    "and name the clone: --fuxictr <clone>"
)
# of events, and the column of the target that shares its vocabulary
SHARED = {"article_id": "item", "topic": "topic", "section": "section", "referrer": "referrer"}
TARGET = ("item", "topic", "section", "device", "hour")
HISTORY = tuple(SEQUENCE + n for n in (*SHARED, AGE))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of their models.

    Args:
        name: of its class and folder.
        target, history: what it calls the fields of the target, and of the sequence.
        pad: the side that it wants padded.
        trim: whether batches may be of sequences about equally long, and padded to the longest.
        ours: parameters that are not their default.
    """

    name: str
    target: str
    history: str
    pad: Pad
    trim: bool
    ours: dict[str, Any]


_SMALL = {"embedding_dim": 16, "batch_size": 2048}
KINDS = {
    "din": Kind(
        name="DIN", target="din_target_field", history="din_sequence_field",
        pad=Pad.RIGHT, trim=True, ours=_SMALL,  # less padding in the statistics of its Dice
    ),
    "dien": Kind(
        name="DIEN", target="dien_target_field", history="dien_sequence_field",
        pad=Pad.RIGHT, trim=True, ours=_SMALL,
    ),
    "transact": Kind(
        name="TransAct", target="target_item_field", history="sequence_item_field",
        pad=Pad.LEFT, trim=True, ours={**_SMALL, "dim_feedforward": 128},
    ),
    "bst": Kind(
        name="BST", target="bst_target_field", history="bst_sequence_field",
        pad=Pad.LEFT, trim=False, ours=_SMALL,  # its positions are counted from the left
    ),
}  # fmt: skip
CHOICES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("learning_rate", (3e-4, 3e-3)),
    ("net_dropout", (0.2,)),
    ("embedding_dim", (8, 32)),
)


class FuxiCtr:
    """Tunes once, then trains per task and seed.

    Args:
        clone: of their repository.
        name: of `KINDS`.
        folder: of the trials.
        tuning_share: of the training users, for the trials.
        about: of the data; trials of other data are not used.
        tuning_rows: rows of the first task by part, read only where a trial is missing.
        tuning_task: that task.

    Raises:
        SpecError: the clone is not there, or something that it imports is not.
    """

    def __init__(
        self,
        clone: Path | None,
        name: str,
        folder: Path,
        *,
        tuning_share: float,
        about: dict[str, Any],
        tuning_task: str,
        tuning_rows: Callable[[str], Flat],
    ) -> None:
        self.kind = KINDS[name]
        self.clone = checked_clone(clone, name)
        self.folder, self.tuning_share, self.about = folder, tuning_share, about
        self.tuning_task, self.tuning_rows = tuning_task, tuning_rows
        self.path = folder / f"{name}.jsonl"

    def config(self) -> dict[str, Any]:
        """What a result depends on beside the data."""
        return {
            "ours": self.kind.ours, "choices": [list(c) for c in CHOICES], "least": _LEAST,
            "number_dim": _NUMBER_DIM, "window": WINDOW, "tuning_share": self.tuning_share,
        }  # fmt: skip

    def run(
        self, task: str, parts: dict[str, Flat], seed: int
    ) -> tuple[Predictions, dict[str, Any]]:
        """Predictions for validation and test, and what is worth knowing."""
        begun = time.monotonic()
        chosen, spent = self._tune()
        tuned = time.monotonic()
        found = self._fit(task, parts, chosen, seed)
        facts = {
            "params": chosen,
            "seconds": time.monotonic() - tuned,
            "seconds_with_tuning": spent + time.monotonic() - begun,
            "steps": found.steps,
            "parameters": found.parameters,
        }
        scored = [predicted(task, p, parts[p], found.predictions[p]) for p in PARTS]
        return joined(scored), facts

    def _tune(self) -> tuple[dict[str, Any], float]:
        """The chosen parameters, and the seconds that trials of earlier runs had taken."""
        parts: dict[str, Flat] = {}

        def run(params: dict[str, Any]) -> dict[str, Any]:
            if not parts:
                train = self.tuning_rows("train")
                parts["train"] = train.where(in_share(train.user_id, self.tuning_share, _SAMPLE))
                parts["validation"] = self.tuning_rows("validation")
            begun = time.monotonic()
            found = self._fit(self.tuning_task, parts, params, 0)
            label = parts["validation"].label(self.tuning_task)
            lost = logloss(label, found.predictions["validation"])
            seconds = time.monotonic() - begun
            print(f"  {self.kind.name} {params} {lost:.5f} in {seconds:.0f} s", flush=True)
            return {"logloss": lost, "steps": found.steps, "seconds": seconds}

        key = {"about": self.about, "config": self.config()}
        return tune(self.path, key, {}, CHOICES, run)

    def _fit(self, task: str, parts: dict[str, Flat], chosen: dict[str, Any], seed: int) -> _Fitted:
        """Train on `train`, stop by `validation`, score every part but `train`."""
        kind = self.kind
        params = {**_defaults(self.clone, kind), **kind.ours, **chosen}
        encoder = Encoder.fit(parts["train"], SHARED, _LEAST)
        encoded = {p: encoder.encode(rows, task) for p, rows in parts.items()}
        batches = {
            p: Batches(
                rows, size=params["batch_size"], window=WINDOW, pad=kind.pad, trim=kind.trim,
                seed=seed if p == "train" else None,
            )
            for p, rows in encoded.items()
        }  # fmt: skip
        importlib.import_module("fuxictr.pytorch.torch_utils").seed_everything(seed)
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(dir=self.folder) as root:
            params |= {
                "model_root": root, "model_id": kind.name, "verbose": 0, "gpu": -1,
                "monitor": {"AUC": 1, "logloss": -1}, "monitor_mode": "max", kind.target: [TARGET],
                kind.history: [HISTORY], "eval_steps": max(len(batches["train"]) // 2, 1),
            }  # fmt: skip
            features = self._features(parts["train"], encoder, params["embedding_dim"])
            Path(root, features.dataset_id).mkdir()
            model = _module(self.clone, kind)(features, **params)
            model.fit(
                batches["train"], validation_data=batches["validation"], epochs=params["epochs"]
            )
            steps = model._total_steps
            scored = {p: model.predict(batches[p]) for p in parts if p != "train"}
        size = sum(p.numel() for p in model.parameters())
        return _Fitted(predictions=scored, steps=steps, parameters=size)

    def _features(self, rows: Flat, encoder: Encoder, dim: int) -> Any:
        """Their FeatureMap of the columns that `Encoded.columns` gives."""
        found = importlib.import_module("fuxictr.features").FeatureMap("globo", str(self.folder))
        specs: dict[str, dict[str, Any]] = OrderedDict()
        for name in rows.names["ids"]:
            specs[name] = {
                "type": "categorical",
                "padding_idx": 0,
                "vocab_size": encoder.size(name),
            }
        for name in rows.names["numbers"]:
            specs[name] = {"type": "numeric", "embedding_dim": _NUMBER_DIM}
        sizes = {n: encoder.size(column) for n, column in SHARED.items()} | {AGE: AGES}
        for name, size in sizes.items():
            spec = {"type": "sequence", "padding_idx": 0, "vocab_size": size, "max_len": WINDOW}
            if SHARED.get(name) in specs:
                spec["share_embedding"] = SHARED[name]
            specs[SEQUENCE + name] = spec
        for spec in specs.values():
            spec["source"] = ""
        found.features, found.labels, found.default_emb_dim = specs, [LABEL], dim
        found.num_fields = found.get_num_fields()
        return found


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    predictions: dict[str, np.ndarray]
    steps: int
    parameters: int


def checked_clone(clone: Path | None, name: str) -> Path:
    """The clone, importable, with the model that `KINDS` has under `name`.

    Raises:
        SpecError: it is not there, or something that it imports is not.
    """
    if clone is None or not (clone / "model_zoo" / KINDS[name].name).is_dir():
        raise SpecError(
            f"--fuxictr is {clone}, which holds no model_zoo/{KINDS[name].name}: {_HELP}"
        )
    for folder in (clone / "site", clone):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        importlib.import_module("fuxictr.pytorch.models")
    except ModuleNotFoundError as error:
        raise SpecError(f"--fuxictr {clone}: its code lacks {error.name}: {_HELP}") from error
    logging.getLogger().setLevel(logging.WARNING)
    return clone


def _module(clone: Path, kind: Kind) -> Any:
    """The class of the model."""
    path = clone / "model_zoo" / kind.name / "src" / f"{kind.name}.py"
    spec = importlib.util.spec_from_file_location(f"fuxictr_zoo_{kind.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kind.name)


def _defaults(clone: Path, kind: Kind) -> dict[str, Any]:
    """`Base` and `<model>_default` of their configuration."""
    import yaml

    path = clone / "model_zoo" / kind.name / "config" / "model_config.yaml"
    known = yaml.safe_load(path.read_text())
    found = {**known["Base"], **known[f"{kind.name}_default"]}
    # what YAML 1.1 reads as text; None is no regulariser
    return {k: float(v) if k == "learning_rate" else v for k, v in found.items()}
