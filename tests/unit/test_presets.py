"""What a preset file may hold, and what is said of one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_store import presets as files
from feature_store.embeddings import EmbeddingKind
from feature_store.errors import SpecError
from jobs.training.config import Shift
from jobs.training.presets import downstream_training, preset
from models.upstream.sum import SumConfig
from tests.tiny import TINY


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes the dataset's own file, beside a copy of `base.toml`."""
    (tmp_path / "base.toml").write_text((files.FOLDER / "base.toml").read_text())
    monkeypatch.setattr(files, "FOLDER", tmp_path)

    def write(text: str) -> None:
        (tmp_path / f"{TINY.name}.toml").write_text(text)

    return write


def test_a_datasets_entry_takes_the_place_of_the_base_one_as_a_whole(written) -> None:
    written(
        '[upstream.sum]\narchitecture = "sum"\nshape.embeddings = 3\ntraining.shift = "distil"\n'
        '[downstream]\nkind = "raw"\ntables = { dim = 4 }\n'
    )
    chosen = preset(TINY, "sum")
    assert chosen.shape == SumConfig(embeddings=3)
    assert chosen.training.shift is Shift.DISTIL
    assert preset(TINY, "sequence").architecture == "sequence"
    downstream = downstream_training(TINY)
    assert downstream.kind is EmbeddingKind.RAW and downstream.tables.dim == 4


_SUM = '[upstream.sum]\narchitecture = "sum"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{_SUM}shape.tables.dims = 8", r"upstream.sum.shape.tables has 'dims', .* mean 'dim'\?"),
        (f"{_SUM}shapes.embeddings = 2", r"upstream.sum has 'shapes', .* mean 'shape'\?"),
        (f"{_SUM}training.epoch = 2", r"upstream.sum.training has 'epoch', .* mean 'epochs'\?"),
        (f'{_SUM}training.epochs = "two"', "training.epochs is 'two': .* valid integer"),
        (f'{_SUM}training.shift = "freeze"', "training.shift is 'freeze': .* 'regularise' or"),
        (f"{_SUM}training.limits.max_target = 2", r"training.limits has .* mean 'max_targets'\?"),
        (f"{_SUM}training = 3", "upstream.sum.training is 3: "),
        (f'{_SUM}shape.user = {{ interactions = ["dot"] }}', "shape.user.sizes is missing"),
        (f'{_SUM}shape.user = {{ sizes = [2], interactions = ["dots"] }}', "has 'dots': known are"),
        ('[upstream.sum]\narchitecture = "summ"', "architecture is 'summ': known are hybrid, "),
        ("[upstream.sum]\nshape.embeddings = 2", "upstream.sum.architecture is missing: name one"),
        ("[upstream]\nsum = 3", "has sum = 3: a table of settings is expected"),
        ("[sum]\nembeddings = 3", r"has \[sum\]: tables are \[upstream.<model>\] and"),
        ("[upstream.sum", "tiny.toml is no TOML: Expected ']'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(written, text: str, says: str) -> None:
    written(text)
    with pytest.raises(SpecError, match=says):
        preset(TINY, "sum")
