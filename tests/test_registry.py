import pytest

from tract_transfer.registry import NameTakenError, Registry, did_you_mean


@pytest.fixture
def shapes() -> Registry:
    registry = Registry("SHAPES")

    @registry.register("square")
    def build_square(side: float) -> float:
        return side * side

    assert build_square(3) == 9  # the decorator returns what it registers
    registry.register("a/circle of any name")(len)
    return registry


def test_get_returns_the_registered_entry(shapes):
    assert shapes.get("square")(3) == 9
    assert shapes.get("a/circle of any name") is len
    assert "square" in shapes
    assert {name for name, _ in shapes} == {"square", "a/circle of any name"}


def test_a_name_can_be_registered_once(shapes):
    with pytest.raises(NameTakenError, match=r"SHAPES has 'square' already: .*test_registry"):
        shapes.register("square")(len)
    assert shapes.get("square") is not len


def test_an_unknown_name_lists_all_and_suggests_the_nearest(shapes):
    with pytest.raises(KeyError) as error:
        shapes.get("sqare")
    assert error.value.args[0] == (
        "SHAPES has no 'sqare'. Did you mean 'square'? Known: ['a/circle of any name', 'square']"
    )


def test_only_a_near_name_is_suggested():
    assert did_you_mean("resnt", ["vit", "resnet"]) == " Did you mean 'resnet'?"
    assert did_you_mean("resnet", ["vit", "swin"]) == did_you_mean("x", []) == ""
