"""The MovieLens protocol: what is held out stays out, ranks are what they should be, runs go on."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from benchmarks.movielens import __main__ as program
from benchmarks.movielens.data import TEST, VALIDATION, Batch, Log, read
from benchmarks.movielens.model import ModelConfig, Recommender, catalogue_loss
from benchmarks.movielens.training import TrainConfig, Training, metrics, rank_held_out, ranks
from feature_store.errors import DataError, HeadwaterError

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


@pytest.mark.parametrize("name", ["stars", "asked"])
def test_ratings_and_the_time_of_asking_are_read_only_where_configured(log: Log, name: str) -> None:
    batch = log.evaluation_batch(torch.arange(USERS), place=TEST, window=6)
    changed = {"stars": 6 - batch.stars, "asked": batch.asked + 3600 * 10**6}
    other = batch._replace(**{name: changed[name]})
    for reads in (True, False):
        torch.manual_seed(0)
        config = ModelConfig(layers=1, width=8, head_dim=4, window=6, ratings=reads, asked=reads)
        model = Recommender(config, log.items).eval()
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


def quiet(training: Training, epochs: int) -> Training:
    training.run(epochs, step=lambda users, loss: None, report=lambda record: None)
    return training


@pytest.mark.parametrize("encoder", ["hstu", "softmax"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    log: Log, tmp_path: Path, encoder: str
) -> None:
    model = ModelConfig(encoder=encoder, layers=1, width=8, head_dim=4, window=6)
    config = TrainConfig(model=model, epochs=4, users=5, every=3)
    whole = quiet(Training(log, config, held_out=VALIDATION, path=tmp_path / "whole.pt"), 4)
    path = tmp_path / "cut.pt"
    steps = []

    def killed(users: int, loss: float) -> None:
        steps.append(loss)
        if len(steps) == 8:  # of 3 an epoch: in the middle of the third
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training = Training(log, config, held_out=VALIDATION, path=path)
        training.run(4, step=killed, report=lambda record: None)
    cut = quiet(Training(log, config, held_out=VALIDATION, path=path), 4)
    for name, value in whole.averaged.state_dict().items():
        assert torch.equal(value, cut.averaged.state_dict()[name]), name
    assert whole.best["epoch"] == cut.best["epoch"]
    for one, two in zip(whole.history, cut.history, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]


def test_training_stops_where_validation_has_not_risen(log: Log, tmp_path: Path) -> None:
    config = TrainConfig(model=TINY, epochs=50, users=5, rate=0.0, patience=2, every=1)
    training = quiet(Training(log, config, held_out=VALIDATION, path=tmp_path / "a.pt"), 50)
    assert len(training.history) == 3 and training.best["epoch"] == 1


def test_the_program_tests_once_and_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = "--layers 1 --width 8 --head-dim 4 --window 6 --epochs 2 --users 5 --refit --device cpu"
    args = program.arguments(["--source", str(source), "--out", str(out), *flags.split()])
    first = program.run(args, Console(quiet=True))
    assert set(first["metrics"]) == {
        "validation",
        *("test", "test, window filtered"),
        *("refit, test", "refit, test, window filtered"),
    }
    assert json.loads((out / "result.json").read_text()) == first
    assert program.run(args, Console(quiet=True)) == first
    assert program.table(first).row_count == len(first["metrics"]) + len(program.PUBLISHED)
    args.rate = 1.0
    with pytest.raises(HeadwaterError, match="another configuration"):
        program.run(args, Console(quiet=True))


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


@pytest.mark.parametrize(
    "wrong", [{"width": 10, "head_dim": 4}, {"layers": -1}, {"dropout": 1.0}, {"temperature": 0.0}]
)
def test_a_wrong_model_is_one_error(wrong: dict[str, float]) -> None:
    with pytest.raises(HeadwaterError, match=next(iter(wrong))):
        ModelConfig(**wrong)


def test_the_program_says_what_is_wrong_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["movielens", "--source", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: source is")
