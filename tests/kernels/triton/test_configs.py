"""The table of tiles: what it must hold, how it is looked up and how a user replaces it."""

import json

import pytest

from vllm_bmos.kernels.triton import configs


def clear():
    for cached in (configs.table, configs.tiles_for, configs.batch_invariant):
        cached.cache_clear()


@pytest.fixture
def fresh(monkeypatch):
    """Forget the tables of this process before and after."""
    clear()
    yield monkeypatch
    monkeypatch.undo()
    clear()


ROW = {
    "M": 8, "BN": 32, "BM": 8, "BKW": 64, "NACC": 4, "warps": 2, "stages": 3, "registers": 128,
}  # fmt: skip


def test_lookup_takes_the_first_tile_that_is_large_enough(fresh):
    limits = [tile.M for tile in configs.tiles_for(86)]
    assert limits == sorted(limits)
    for M in range(1, 600):
        tile = configs.tile_for(86, M)
        assert (tile and tile.M) == next((limit for limit in limits if limit >= M), None)
    assert configs.tile_for(100, 64) is None


def test_an_unknown_architecture_uses_the_default(fresh):
    assert configs.tiles_for(87) == configs.table()["default"]
    assert configs.tiles_for(120) == configs.table()["default"]


def test_all_with_tensor_memory_have_the_tiles_of_the_first(fresh):
    assert configs.tiles_for(103) == configs.tiles_for(110) == configs.table()["sm_100"]


def test_batch_invariance_uses_one_tile(fresh):
    fresh.setenv(configs.BATCH_INVARIANT_ENV, "1")
    assert len({configs.tile_for(90, M) for M in (1, 16, 17, 511, 512, 8192)}) == 1


@pytest.mark.parametrize("limits", [[8], [8, None]])
def test_batch_invariance_refuses_tiles_that_depend_on_the_batch(fresh, tmp_path, limits):
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"batch_invariant": [{**ROW, "M": M} for M in limits]}))
    fresh.setenv(configs.CONFIGS_ENV, str(file))
    with pytest.raises(ValueError, match="batch_invariant: expected one tile with M null"):
        configs.table()


def test_a_file_replaces_an_entry(fresh, tmp_path):
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"sm_86": [{**ROW, "BN": 64}]}))
    fresh.setenv(configs.CONFIGS_ENV, str(file))
    assert [tile.BN for tile in configs.tiles_for(86)] == [64]
    assert configs.tiles_for(90) == configs.table()["default"]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "no tile"),
        ([{**ROW, "BN": 48}], "BN"),
        ([{**ROW, "BKW": 128}], "BKW"),
        ([{**ROW, "M": 0}], "M"),
        ([{**ROW, "M": "8"}], "M"),
        ([{**ROW, "extra": 1}], "extra"),
        ([{key: value for key, value in ROW.items() if key != "warps"}], "warps"),
        ([ROW, ROW], "grow"),
        ([{**ROW, "M": None}, ROW], "grow"),
        ({"M": 8}, "a list"),
        ([8], "the fields"),
    ],
)
def test_a_bad_file_is_named(fresh, tmp_path, rows, named):
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"sm_86": rows}))
    fresh.setenv(configs.CONFIGS_ENV, str(file))
    with pytest.raises(ValueError, match=named) as raised:
        configs.table()
    assert "tiles.json" in str(raised.value) and "sm_86" in str(raised.value)


def test_a_missing_or_broken_file_is_named(fresh, tmp_path):
    for content in (None, "{"):
        file = tmp_path / "none.json"
        if content:
            file.write_text(content)
        fresh.setenv(configs.CONFIGS_ENV, str(file))
        with pytest.raises(ValueError, match=r"none\.json"):
            configs.table()
