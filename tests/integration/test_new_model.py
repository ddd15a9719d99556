"""A new upstream model is one file and one preset: from there a day trains, gates, publishes and compares it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from feature_store import presets
from feature_store.days import add_days, day_range
from feature_store.embeddings import read_embeddings
from feature_store.lake import Lake
from jobs import publish_embeddings, train_downstream, train_upstream
from jobs.context import JobContext
from jobs.settings import Settings
from jobs.training.results import RESULT
from models import upstream
from tests.synthetic import FIRST_DAY, dataset, publish, tables

MODEL = """
from dataclasses import dataclass, field
from torch import nn
from models.outputs import Outputs
from models.tables import Lookup, TableConfig, Tables
from models.towers import of_targets
from models.upstream import ModelKind

@dataclass(frozen=True, kw_only=True)
class Config:
    tables: TableConfig = field(default_factory=lambda: TableConfig(dim=8))

class Attributes(nn.Module):
    def __init__(self, plan, config, device):
        super().__init__()
        self.plan, self.ids = plan, plan.user_ids
        self.tables = Tables([f.vocabulary for f in self.ids], config=config.tables, device=device)
        self.logits = nn.Linear(config.tables.dim, len(plan.tasks))

    def user_embeddings(self, batch, at=None):
        lookups = [Lookup(f.vocabulary, batch.user_ids[f.name]) for f in self.ids]
        return sum(self.tables(lookups))[:, None] + 1e-3

    def forward(self, batch):
        users = self.user_embeddings(batch)
        return Outputs(self.logits(of_targets(batch, users)[:, 0]), user_logits=None, users=users)

KIND = ModelKind(config=Config, module=Attributes, history=False, user_features=True,
                 user_table="aggregates")
"""
PRESET = '[upstream.who]\narchitecture = "attributes"\nshape.tables.dim = 4\ntraining.limits.max_targets = 64\n'
DAYS = day_range(FIRST_DAY, add_days(FIRST_DAY, 2))


@pytest.mark.filterwarnings("ignore")
def test_a_new_model_is_one_file_and_one_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("models", "presets"):
        (tmp_path / folder).mkdir()
    (tmp_path / "models/attributes.py").write_text(MODEL)
    monkeypatch.setattr(upstream, "__path__", [*upstream.__path__, str(tmp_path / "models")])
    (tmp_path / "presets/base.toml").write_text((presets.FOLDER / "base.toml").read_text())
    (tmp_path / f"presets/{dataset().name}.toml").write_text(PRESET)
    monkeypatch.setattr(presets, "FOLDER", tmp_path / "presets")
    monkeypatch.setattr(train_downstream, "MIN_TRAIN_DAYS", 1)

    spec = replace(dataset(), models=("who",))
    settings = Settings.from_env({"HEADWATER_HOME": str(tmp_path / "home")})
    lake = Lake(settings.lake_root, spec)
    publish(lake, tables(spec, days=len(DAYS), users=40))
    for ds in DAYS:
        context = JobContext(dataset=spec, ds=ds, settings=settings, model="who")
        train_upstream.run(context)
        publish_embeddings.run(context)
    train_downstream.run(
        JobContext(dataset=spec, ds=DAYS[-1], settings=settings, task=spec.tasks[0].name)
    )

    found = read_embeddings(lake, "who", DAYS[-1])
    assert found.values.shape[1:] == (1, 4) and len(found) > 20
    folder = settings.downstream_dir(spec.name, spec.tasks[0].name) / DAYS[-1]
    arms = json.loads((folder / RESULT).read_text())["arms"]
    assert arms["aggregates_who"]["sources"] == ["who"] and arms["context_who"]["ne"] > 0
