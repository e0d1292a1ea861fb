import pytest

from tract_transfer.registry import Registry, did_you_mean


@pytest.fixture
def shapes() -> Registry:
    registry = Registry("SHAPES")

    @registry.register("square")
    def build_square(side: float) -> float:
        return side * side

    registry.register("a/circle of any name")(len)
    return registry


def test_an_entry_is_what_was_registered(shapes):
    assert shapes.get("square")(3) == 9
    assert shapes.get("a/circle of any name") is len
    assert "square" in shapes
    assert {name for name, _ in shapes} == {"square", "a/circle of any name"}


def test_registering_gives_the_entry_back(shapes):
    def triangle() -> None: ...

    assert shapes.register("triangle")(triangle) is triangle


def test_a_name_is_taken_once(shapes):
    with pytest.raises(AssertionError, match="square"):
        shapes.register("square")(len)
    assert shapes.get("square") is not len


def test_a_miss_names_the_nearest_and_all(shapes):
    with pytest.raises(KeyError) as error:
        shapes.get("sqare")
    assert error.value.args[0] == (
        "SHAPES has no 'sqare'. Did you mean 'square'? Known: ['a/circle of any name', 'square']"
    )
    with pytest.raises(KeyError) as error:
        shapes.get("zzz")
    assert "Did you mean" not in error.value.args[0]


@pytest.mark.parametrize(
    "name, known, expected",
    [
        ("resnt", ["vit", "resnet"], " Did you mean 'resnet'?"),
        ("resnet", ["vit", "swin"], ""),
        ("x", [], ""),
    ],
)
def test_did_you_mean(name, known, expected):
    assert did_you_mean(name, known) == expected
