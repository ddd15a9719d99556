"""The MovieLens protocol: what is held out stays out, ranks are what they should be, runs go on."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.movielens import __main__ as program
from benchmarks.movielens.data import TEST, VALIDATION, Batch, Log, read
from benchmarks.movielens.model import ModelConfig, Recommender, catalogue_loss
from benchmarks.movielens.training import TrainConfig, Training, metrics, rank_held_out, ranks
from feature_store.errors import DataError
from models.encoders import Encoder

USERS, MOVIES = 12, 40
TINY = ModelConfig(layers=1, width=8, head_dim=4, window=6, dropout=0.1)


def lines() -> list[str]:
    """Ratings of users with 4 to 15 of 40 movies, in no order; user 1's second and third tie."""
    rng, made = random.Random(0), []
    for user in range(1, USERS + 1):
        movies = rng.sample(range(1, MOVIES + 1), 3 + user)
        for place, movie in enumerate(movies):
            time = 978_300_000 + 60 * (1 if user == 1 and place == 2 else place)
            made.append((place, f"{user}::{10 * movie}::{rng.randint(1, 5)}::{time}"))
    made.sort(key=lambda row: (row[0] % 3, row[0]))  # mixes users and times, keeps ties in order
    return [line for _, line in made]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "ratings.dat.gz").write_bytes(gzip.compress("\n".join(lines()).encode() + b"\n"))
    return tmp_path


@pytest.fixture
def log(source: Path) -> Log:
    return read(source)


def of(log: Log, user: int) -> list[int]:
    """The items of a user, as they lie in the log."""
    return log.item[log.offsets[user] : log.offsets[user + 1]].tolist()


def test_the_log_is_by_user_and_chronological_with_ties_in_the_order_of_the_file(log: Log) -> None:
    movies = sorted({int(line.split("::")[1]) for line in lines()})
    assert log.items == len(movies) and not log.rebuilt
    for user in range(USERS):
        rows = [line.split("::") for line in lines() if line.startswith(f"{user + 1}::")]
        rows.sort(key=lambda row: int(row[3]))
        assert of(log, user) == [movies.index(int(row[1])) for row in rows]


@pytest.mark.parametrize("held_out", [VALIDATION, TEST])
def test_what_is_held_out_is_never_an_input_or_a_target_of_training(
    log: Log, held_out: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    users, reached = torch.arange(USERS), [set() for _ in range(USERS)]
    for _ in range(50):
        batch = log.training_batch(users, held_out=held_out, window=6, generator=generator)
        for user in range(USERS):
            row = slice(*batch.event_offsets[user : user + 2].tolist())
            assert 1 <= row.stop - row.start <= 6
            reached[user] |= set(batch.item[row].tolist()) | set(batch.target[row].tolist())
            inputs, targets = batch.item[row].tolist(), batch.target[row].tolist()
            whole = of(log, user)
            first = whole.index(inputs[0])
            assert [*inputs, targets[-1]] == whole[first : first + len(inputs) + 1]
            assert inputs[1:] == targets[:-1]
    for user in range(USERS):  # all the rest was, sooner or later
        assert reached[user] == set(of(log, user)[:-held_out])


@pytest.mark.parametrize("place", [VALIDATION, TEST])
def test_a_held_out_item_is_asked_for_after_what_came_before_it(log: Log, place: int) -> None:
    users = torch.tensor([3, 11])
    batch = log.evaluation_batch(users, place=place, window=6)
    rows, items = log.seen(users, place=place)
    for row, user in enumerate(users.tolist()):
        before, target = of(log, user)[:-place], of(log, user)[-place]
        events = slice(*batch.event_offsets[row : row + 2].tolist())
        assert batch.item[events].tolist() == before[-6:]
        assert batch.target[events][-1] == target
        assert items[rows == row].tolist() == before
        rows_of_last, last = log.seen(users, place=place, last=6)
        assert last[rows_of_last == row].tolist() == before[-6:]


def test_ranks_of_scores_made_by_hand() -> None:
    scores = torch.tensor(
        [[5.0, 4.0, 3.0, 2.0], [1.0, 9.0, 9.0, 0.0], [0.0, 1.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0]]
    )
    seen = (torch.tensor([0, 3]), torch.tensor([0, 3]))  # row 3 has seen its own target
    rank = ranks(scores, torch.tensor([2, 1, 3, 3]), seen)
    assert rank.tolist() == [2, 2, 1, 4]  # without item 0; a tie; the best; never filtered
    found = metrics(torch.tensor([1, 2, 11, 51]))
    assert found["hr@10"] == 0.5 and found["hr@50"] == 0.75
    assert found["ndcg@10"] == pytest.approx((1 + 1 / torch.log2(torch.tensor(3.0)).item()) / 4)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 11 + 1 / 51) / 4)


def test_users_are_ranked_alike_alone_and_together(log: Log) -> None:
    torch.manual_seed(0)
    model = Recommender(TINY, log.items)
    together = rank_held_out(model, log, place=TEST)
    for user in range(USERS):
        one = torch.tensor([user])
        batch = log.evaluation_batch(one, place=TEST, window=TINY.window)
        scores = model(batch)[-1:] @ model.directions().T
        alone = ranks(scores.detach(), batch.target[-1:], log.seen(one, place=TEST))
        assert together[user] == alone


def test_an_event_knows_no_later_item(log: Log) -> None:
    torch.manual_seed(0)
    model = Recommender(TINY, log.items).eval()
    batch = log.evaluation_batch(torch.tensor([USERS - 1]), place=TEST, window=6)
    changed = batch.item.clone()
    changed[3] = (changed[3] + 1) % log.items
    other: Batch = batch._replace(item=changed)
    one, two = model(batch), model(other)
    assert torch.equal(one[:3], two[:3]) and not torch.allclose(one[3:], two[3:])


def test_the_time_of_asking_is_read_only_where_configured(log: Log) -> None:
    batch = log.evaluation_batch(torch.arange(USERS), place=TEST, window=6)
    other = batch._replace(asked=batch.asked + 3600 * 10**6)
    for reads in (True, False):
        torch.manual_seed(0)
        model = Recommender(replace(TINY, asked=reads), log.items).eval()
        assert torch.equal(model(batch), model(other)) is not reads


def test_the_chunked_loss_and_its_gradients_are_those_of_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    items = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (23,))
    ours = catalogue_loss(hidden, items, target, chunk=7)
    plain = F.cross_entropy(hidden @ items.T, target)
    assert torch.allclose(ours, plain)
    grads = (torch.autograd.grad(3 * loss, (hidden, items)) for loss in (ours, plain))
    for one, two in zip(*grads, strict=True):
        assert torch.allclose(one, two)


@pytest.mark.parametrize("encoder", list(Encoder))
def test_a_training_learns_and_depends_on_its_seed_alone(log: Log, encoder: Encoder) -> None:
    config = TrainConfig(model=replace(TINY, encoder=encoder), epochs=4, users=5, every=3)

    def trained(seed: int) -> Training:
        training = Training(log, replace(config, seed=seed), held_out=VALIDATION)
        training.run(4, report=lambda record: None)
        return training

    first, again, other = trained(0), trained(0), trained(1)
    assert [r["loss"] for r in first.history] == [r["loss"] for r in again.history]
    assert first.history[0]["loss"] != other.history[0]["loss"]
    assert first.history[-1]["loss"] < first.history[0]["loss"]
    assert [r["epoch"] for r in first.history if "hr@10" in r] == [3, 4]


def test_training_stops_where_validation_has_not_risen(log: Log) -> None:
    config = TrainConfig(model=TINY, epochs=50, users=5, rate=0.0, patience=2, every=1)
    training = Training(log, config, held_out=VALIDATION)
    training.run(50, report=lambda record: None)
    assert len(training.history) == 3 and training.best["epoch"] == 1


def test_the_program_tests_once_and_shows_every_figure(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    small = TrainConfig(model=TINY, epochs=2, users=5)
    monkeypatch.setattr(program, "TrainConfig", lambda **of: replace(small, seed=of["seed"]))
    out = tmp_path / "out"
    program.main(["--source", str(source), "--out", str(out), "--refit", "--device", "cpu"])
    found = json.loads((out / "result.json").read_text())
    assert set(found["metrics"]) == {
        "validation",
        *("test", "test, window filtered"),
        *("refit, test", "refit, test, window filtered"),
    }
    shown = capsys.readouterr().out
    for name in (*found["metrics"], *program.PUBLISHED):
        assert f"\n{name} " in shown
    assert shown.count(" epoch ") == 5  # two, two again, and which was the best


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (None, "no readable ratings.dat"),
        ("1::2::5\n", "a line of ratings.dat is not"),
        ("1::2::good::978300000\n", "a line of ratings.dat is not"),
        ("1::2::9::978300000\n", "outside 1 to 5"),
        ("7::2::5::978300000\n", "UserID is 7: 1 interactions"),
        ("", "ratings.dat"),
    ],
)
def test_bad_input_is_one_error(tmp_path: Path, written: str | None, says: str) -> None:
    if written is not None:
        (tmp_path / "ratings.dat").write_text(written)
    with pytest.raises(DataError, match=says):
        read(tmp_path)


def test_the_program_says_what_is_wrong_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["--source", str(tmp_path), "--device", "cpu"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: source is")
