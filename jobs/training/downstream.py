"""The downstream comparison: one small model, several arms, the same data, seeds and budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from feature_store.embeddings import UserEmbeddings
from feature_store.spec import Dataset, Task
from jobs.training.config import DownstreamTraining
from jobs.training.ids import int64_ids
from jobs.training.judge import with_domains
from jobs.training.loader import Limits, cuts
from jobs.training.results import ArmResult, FeatureImportance, RankedFeature
from jobs.training.rows import Rows
from jobs.training.scoring import Scored, concat, finite, labelled_predictions
from jobs.training.trainer import Step, Trainer, choose_device, train
from models import metrics
from models.batch import Batch, Sparse
from models.downstream import Downstream, DownstreamConfig, Inputs, Published, PublishedSource
from models.features import TARGET_ITEM, FeaturePlan, feature_plan
from models.loss import multi_task_loss
from models.metrics import Interval

REFERENCE = "aggregates"
_ITEM, _TIME, _POPULARITY = "the item", "time of day", "item popularity and age"
_USER = "user's "


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One arm.

    Args:
        name: letters, digits and underscores, for metrics and columns.
        title: for people.
        user_features: read the legacy user features.
        sources: upstream models whose embeddings are read.
    """

    name: str
    title: str
    user_features: bool
    sources: tuple[str, ...] = ()


def arms(models: Sequence[str]) -> list[ArmConfig]:
    """The arms for these upstream models: every question that the report answers, and no more."""
    found = [
        ArmConfig(name="context", title="context and item only", user_features=False),
        ArmConfig(name=REFERENCE, title="+ hand-made aggregates", user_features=True),
    ]
    for model in models:
        found.append(
            ArmConfig(
                name=f"aggregates_{model}",
                title=f"+ aggregates + {model}",
                user_features=True,
                sources=(model,),
            )
        )
    if len(models) > 1:
        found.append(
            ArmConfig(
                name="aggregates_all",
                title=f"+ aggregates + {' + '.join(models)}",
                user_features=True,
                sources=tuple(models),
            )
        )
    for model in models:
        found.append(
            ArmConfig(
                name=f"context_{model}",
                title=f"context and item + {model} alone",
                user_features=False,
                sources=(model,),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A batch with its rows' published embeddings, and what finds its targets again."""

    batch: Batch
    published: dict[str, Published]
    rows: Rows
    lo: int
    hi: int


def load(
    decoded: Iterable[Rows], embeddings: Mapping[str, UserEmbeddings], limits: Limits
) -> list[Loaded]:
    """Rows of one day with the embeddings that were published the day before it.

    Args:
        embeddings: by upstream model.
    """
    by_id = {m: replace(e, ids=pa.array(int64_ids(e.ids))) for m, e in embeddings.items()}
    out = []
    for rows in decoded:
        for lo, hi in cuts(rows, limits):
            published = {}
            for model, found in by_id.items():
                values, present = found.lookup(rows.user_id[lo:hi])
                published[model] = Published(
                    torch.from_numpy(values.astype(np.float32)), torch.from_numpy(present)
                )
            batch = rows.batch(lo, hi)
            out.append(Loaded(batch=batch, published=published, rows=rows, lo=lo, hi=hi))
    return out


def shape_of(
    config: DownstreamTraining, sources: Iterable[PublishedSource], *, user_features: bool
) -> DownstreamConfig:
    """Shape of a downstream model of that budget which reads `sources`."""
    return DownstreamConfig(
        use_user_features=user_features,
        sources=tuple(sources),
        standardise=config.standardise,
        tables=config.tables,
    )


class DownstreamTrainer(Trainer[int]):
    """The training of arms side by side; what it is trained on is the number of a batch.

    Args:
        model: with its first weights.
        config: the budget.
        labels: per batch (T, 1) int32, of the task alone.
        inputs, published: per batch, on the model's device.
    """

    def __init__(
        self,
        model: Downstream,
        config: DownstreamTraining,
        device: torch.device,
        *,
        labels: Sequence[Tensor],
        inputs: Sequence[Inputs],
        published: Sequence[Mapping[str, Published]],
    ) -> None:
        rates = dict.fromkeys(model.reading(), config.published_learning_rate)
        super().__init__(model, config, device, rates=rates)
        self.labels, self.inputs, self.published = labels, inputs, published

    def batch(self, item: int) -> Batch:
        """Of that number."""
        return self.inputs[item].batch

    def loss(self, item: int) -> Step:
        """The sum of the arms' log losses: no weight is in two of them."""
        with self.precision():
            logits = self.model(self.inputs[item], self.published[item])
        labels = self.labels[item].expand_as(logits)
        loss = multi_task_loss(logits, labels)
        return Step(loss.total, loss.per_task, loss.counts, (labels == 1).sum(0))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a comparison found: of each arm, and of the features of the richest; and the predictions, by arm."""

    base_rate: float
    arms: dict[str, ArmResult]
    importance: FeatureImportance | None
    scored: dict[str, Scored]


class Comparison:
    """Trains every arm on `training` and scores `test`.

    Args:
        dataset, task: what is predicted.
        config: the budget.
        training, test: what `load` gave.
        seed: of every arm's weights and order.
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        task: Task,
        config: DownstreamTraining,
        training: Sequence[Loaded],
        test: Sequence[Loaded],
        seed: int,
    ) -> None:
        self.dataset, self.task, self.config, self.seed = dataset, task, config, seed
        self.training, self.test = training, test
        self.index = [t.name for t in dataset.tasks].index(task.name)
        self.plan: FeaturePlan = feature_plan(dataset)
        self.device = choose_device()
        torch.set_num_threads(config.threads)

    def train(self, arms: Sequence[ArmConfig]) -> Downstream:
        """The arms, trained."""
        shapes = {}
        for arm in arms:
            sources = []
            for name in arm.sources:
                _, count, dim = self.training[0].published[name].values.shape
                sources.append(PublishedSource(name=name, embeddings=count, dim=dim))
            shapes[arm.name] = shape_of(self.config, sources, user_features=arm.user_features)
        torch.manual_seed(self.seed)
        model = Downstream(self.plan, shapes, device=self.device)
        trainer = DownstreamTrainer(
            model, self.config, self.device,
            labels=[i.batch.labels[:, self.index : self.index + 1].to(self.device) for i in self.training],
            inputs=[model.inputs(item.batch.to(self.device)) for item in self.training],
            published=[self._published(item.published) for item in self.training],
        )  # fmt: skip
        order = np.random.default_rng(self.seed)
        passes = [order.permutation(len(self.training)) for _ in range(self.config.epochs)]
        train(trainer, lambda epoch, skip: passes[epoch][skip:].tolist(), seed=self.seed)
        return model.eval()

    def _published(self, published: Mapping[str, Published]) -> dict[str, Published]:
        return {m: Published(*(x.to(self.device) for x in p)) for m, p in published.items()}

    @torch.no_grad()
    def predict(self, model: Downstream) -> dict[str, Scored]:
        """Predictions for the test's labels, by arm."""
        parts: dict[str, list[Scored]] = {name: [] for name in model.configs}
        for item in self.test:
            logits = model(item.batch.to(self.device), self._published(item.published))
            probabilities = torch.sigmoid(logits).cpu().numpy()
            only = _only_task(item.batch, self.index)
            for i, name in enumerate(parts):
                wide = np.full(tuple(item.batch.labels.shape), np.nan, np.float32)
                wide[:, self.index] = probabilities[:, i]
                parts[name].append(
                    labelled_predictions(self.dataset, item.rows, item.lo, item.hi, only, wide)
                )
        return {name: finite(concat(of)) for name, of in parts.items()}

    def base_rate(self) -> float:
        """Share of positives among the labels trained on."""
        labels = torch.cat([x.batch.labels[:, self.index] for x in self.training])
        return float((labels == 1).sum()) / max(int((labels >= 0).sum()), 1)

    def run(self, chosen: Sequence[ArmConfig]) -> Outcome:
        """Every arm trained and tested."""
        rate = self.base_rate()
        model = self.train(chosen)
        scored = self.predict(model)
        differences = self._differences(scored, rate)
        results = {}
        for arm in chosen:
            mine = scored[arm.name]
            gauc = metrics.grouped_auc(mine.label, mine.prediction, mine.user_id)
            results[arm.name] = ArmResult(
                **vars(with_domains(self.dataset, mine, rate)),
                title=arm.title,
                sources=list(arm.sources),
                user_features=arm.user_features,
                gauc=metrics.finite_or_none(gauc),
                difference=differences.get(arm.name),
            )
        readers = [arm for arm in chosen if arm.user_features]
        richest = max(readers, key=lambda arm: len(arm.sources), default=None)
        importance = None if richest is None else self.importance(model, richest, rate)
        return Outcome(base_rate=rate, arms=results, importance=importance, scored=scored)

    def _differences(self, scored: Mapping[str, Scored], rate: float) -> dict[str, Interval]:
        """NE of each arm less the reference's, where they compare."""
        reference = scored[REFERENCE]
        differences = metrics.bootstrap_ne_differences(
            reference.label,
            {n: (s.prediction, reference.prediction) for n, s in scored.items() if n != REFERENCE},
            reference.user_id,
            rate,
            samples=self.config.bootstrap_samples,
            seed=self.seed % 2**32,
        )
        return {name: i for name, i in differences.items() if np.isfinite(i.mean)}

    # ---- permutation importance

    @torch.no_grad()
    def importance(self, model: Downstream, arm: ArmConfig, rate: float) -> FeatureImportance:
        """NE of `model` with one feature's values shuffled among the test's users, or targets."""
        chosen, targets = [], 0
        for item in self.test:
            if targets >= self.config.importance_targets:
                break
            chosen.append(item)
            targets += item.batch.targets
        generator = torch.Generator().manual_seed(self.seed)

        def ne(feature: str | None) -> float:
            labels, predictions = [], []
            for item in chosen:
                batch, published = item.batch, {m: item.published[m] for m in arm.sources}
                if feature is not None:
                    batch, published = permuted(batch, published, feature, generator, self.plan)
                logits = model(
                    batch.to(self.device), self._published(published), only=arm.name
                ).squeeze(1)
                known = batch.labels[:, self.index] >= 0
                labels.append(batch.labels[known, self.index].numpy())
                predictions.append(torch.sigmoid(logits).cpu()[known].numpy())
            return metrics.normalized_entropy(
                np.concatenate(labels), np.concatenate(predictions), rate
            )

        whole = ne(None)
        ranking = metrics.importance_ranking(whole, {f: ne(f) for f in features(self.plan, arm)})
        return FeatureImportance(
            arm=arm.name,
            ne=metrics.finite_or_none(whole),
            targets=targets,
            ranking=[
                RankedFeature(
                    rank=r.rank,
                    feature=r.feature,
                    ne_increase=metrics.finite_or_none(r.ne_increase),
                )
                for r in ranking
            ],
        )


def _only_task(batch: Batch, index: int) -> Batch:
    labels = torch.full_like(batch.labels, -1)
    labels[:, index] = batch.labels[:, index]
    return replace(batch, labels=labels)


def features(plan: FeaturePlan, arm: ArmConfig) -> list[str]:
    """Features of the arm that are permuted one by one, as people read them; all item popularity counts
    as one. What is no context feature has a blank in its title, which no name of a spec has."""
    names = [_ITEM if c.name == TARGET_ITEM else c.name for c in plan.candidates]
    names += [*plan.context_numbers, _TIME]
    if plan.item_numbers:
        names.append(_POPULARITY)
    if arm.user_features:
        of_user = [u.name for u in plan.user_ids] + [b.name for b in plan.bags]
        names += [f"{_USER}{name}" for name in (*of_user, *plan.user_numbers)]
    return names + [f"{m} embeddings" for m in arm.sources]


def permuted(
    batch: Batch,
    published: Mapping[str, Published],
    feature: str,
    generator: torch.Generator,
    plan: FeaturePlan,
) -> tuple[Batch, dict[str, Published]]:
    """The batch with one feature shuffled: among its users what belongs to users, else its targets."""
    rows = torch.randperm(batch.rows, generator=generator)
    targets = torch.randperm(batch.targets, generator=generator)
    out = dict(published)
    for model, (values, present) in published.items():
        if feature == f"{model} embeddings":
            out[model] = Published(values[rows], present[rows])
            return batch, out
    if feature.startswith(_USER):
        return _permuted_user(batch, feature.removeprefix(_USER), rows, plan), out
    if feature == _ITEM:
        return replace(batch, item_id=batch.item_id[targets]), out
    if feature == _TIME:
        return replace(batch, as_of=batch.as_of[targets]), out
    if feature == _POPULARITY:
        return replace(batch, item_features=batch.item_features[targets]), out
    if feature in batch.context_ids:
        moved = {**batch.context_ids, feature: batch.context_ids[feature][targets]}
        return replace(batch, context_ids=moved), out
    moved = {**batch.context_floats, feature: batch.context_floats[feature][targets]}
    return replace(batch, context_floats=moved), out


def _permuted_user(batch: Batch, name: str, rows: torch.Tensor, plan: FeaturePlan) -> Batch:
    if name in batch.sparse:
        sparse = {**batch.sparse, name: _permuted_sparse(batch.sparse[name], rows)}
        return replace(batch, sparse=sparse)
    if name in batch.user_ids:
        return replace(batch, user_ids={**batch.user_ids, name: batch.user_ids[name][rows]})
    dense, column = batch.dense.clone(), plan.user_numbers.index(name)
    dense[:, column] = dense[rows, column]
    return replace(batch, dense=dense)


def _permuted_sparse(sparse: Sparse, rows: torch.Tensor) -> Sparse:
    lengths = sparse.offsets.diff()[rows]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    within = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
    place = torch.repeat_interleave(sparse.offsets[:-1][rows], lengths) + within
    scores = None if sparse.scores is None else sparse.scores[place]
    return Sparse(sparse.values[place], offsets, scores)
