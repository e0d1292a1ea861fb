"""Which keys make another run, and which only say where and how fast."""

from tract_transfer.engine.run_folder import changed_keys, deciding_keys, flatten

CONFIG = {
    "output_dir": "a", "name": "x", "method": "vanilla", "seed": 0,
    "data": {"cache": "none", "num_workers": 2, "batch_size": 8},
    "engine": {"log": {"every_iters": 20}, "precision": "fp32"},
}  # fmt: skip


def changed(**sections):
    return changed_keys(CONFIG, {**CONFIG, **sections})


def test_places_and_speed_may_differ():
    assert changed(output_dir="b", engine={"log": {"every_iters": 5}, "precision": "fp32"}) == []
    assert changed(data={"cache": "ram", "num_workers": 0, "batch_size": 8}) == []


def test_what_decides_numbers_may_not():
    assert changed(seed=1) == ["seed: 0 then, 1 now"]
    data = {"cache": "none", "num_workers": 2, "batch_size": 4}
    assert changed(data=data) == ["data.batch_size: 8 then, 4 now"]


def test_a_key_that_is_gone_differs():
    assert changed(engine={"log": {}}) == ["engine.precision: 'fp32' then, None now"]


def test_the_device_cache_augments_by_other_numbers():
    data = {"cache": "device", "num_workers": 2, "batch_size": 8}
    assert changed(data=data) == ["data.cache: 'none' then, 'device' now"]


def test_what_decides_is_the_same_exactly_where_nothing_has_changed():
    def deciding(**sections):
        return deciding_keys({**CONFIG, **sections})

    assert deciding() == deciding(output_dir="b", name="y", method="tract")
    assert deciding() != deciding(seed=1)
    cached = {"num_workers": 0, "batch_size": 8}
    assert deciding() == deciding(data={**cached, "cache": "ram"})
    assert deciding() != deciding(data={**cached, "cache": "device"})


def test_flat_keys_are_dotted_and_empty_sections_stay():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": []}) == {"a.b.c": 1, "a.d": {}, "e": []}
