"""The quickstart's training and validation pictures share no scan; its shards are whole, usable and written once."""

import numpy as np
import pytest

from mimo_gemma4.data import digits
from mimo_gemma4.data.digits import SIDE, split_scans
from mimo_gemma4.data.quickstart import ensure_shards
from mimo_gemma4.errors import DataError
from tests.shard_maker import TileProcessor, open_dataset, text_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "TRAIN_SAMPLES", 600)  # a tenth, for speed
        yield ensure_shards("digits", tmp_path_factory.mktemp("digits") / "data")


def pictures(dataset, indexes):
    for index in indexes:
        [item] = dataset.media(index)
        with open(item.shard, "rb") as file:
            file.seek(item.offset)
            tiles = TileProcessor().decode(file.read(item.size))["tiles"]
        side = SIDE // 8
        image = tiles.view(side, -1, 8, 8).transpose(1, 2).reshape(SIDE, -1).numpy()
        yield np.split(image, image.shape[1] // SIDE, axis=1), text_of(dataset.messages(index)[-1])


def content(tile):
    """A tile without its margin and contrast: what is left of the scan."""
    rows, columns = np.flatnonzero(tile.any(1)), np.flatnonzero(tile.any(0))
    cut = tile[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (cut / cut.max() > 0.5).tobytes() + bytes(cut.shape)


def test_no_scan_is_on_both_sides(shards):
    train_scans, valid_scans = split_scans()
    assert sorted([*train_scans, *valid_scans]) == list(range(1797))
    train, valid = (open_dataset(paths) for paths in shards)
    shown = {content(tile) for tiles, _ in pictures(train, range(len(train))) for tile in tiles}
    held_out = [content(tile) for tiles, _ in pictures(valid, range(len(valid))) for tile in tiles]
    assert len(held_out) == len(valid_scans)
    # Rounding and contrast change few of the binarised pixels, so a shared scan would be seen here often.
    assert not shown & set(held_out)


def test_sizes_answers_and_counts(shards):
    train, valid = (open_dataset(paths) for paths in shards)
    assert len(train) == 600 and len(valid) == 240
    for dataset in (train, valid):
        for tiles, answer in pictures(dataset, range(0, len(dataset), 40)):
            assert len(answer) == len(tiles) and answer.isdigit()
    sizes = {(train.media(i)[0].header.width, train.media(i)[0].header.height) for i in range(100)}
    assert sizes == {(SIDE, SIDE), (2 * SIDE, SIDE)}, "every shard mixes both"


def test_shards_are_written_once_and_leave_nothing_partial(shards):
    train, valid = shards
    before = [path.stat().st_mtime_ns for path in (*train, *valid)]
    assert ensure_shards("digits", train[0].parent) == shards
    assert [path.stat().st_mtime_ns for path in (*train, *valid)] == before
    assert not list(train[0].parent.glob(".partial*"))


def test_shards_that_were_there_before_are_not_written_over(tmp_path):
    own = tmp_path / "train-000002.tar"
    own.write_text("mine")
    with pytest.raises(DataError, match=f"data.quickstart would write over {own}: set data.quickstart=null"):
        ensure_shards("digits", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [own.name] and own.read_text() == "mine"
