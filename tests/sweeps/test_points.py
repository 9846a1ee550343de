"""Expressions of a sweep: what they take, what they refuse, and names that no two points share."""

import itertools
import math
import re

import pytest

from popgen.errors import ArgumentError
from popgen.sweeps.points import Choices, Interval, bindings, grid, parse, point_name, random_points

HARD_VALUES = [
    "1",
    "1.0",
    "-1",
    "'1'",
    "True",
    "'True'",
    "None",
    "'None'",
    "'a'",
    "'a b'",
    "'a-b'",
    "'a/b'",
    "'../a'",
    "'a,B.y=1'",
    "'A'",
    "''",
    "'ä'",
    "[1, 2]",
    "(1, 2)",
    "(1,)",
    "{'a': [1, 2]}",
    "@torch.optim.SGD",
    "@torch.optim.SGD()",
    "[@a.B(), @a.C()]",
    "%MACRO",
    "@scope/a.B()",
]


def values_of(expression: str) -> list[str]:
    (swept,) = parse([expression]).values()
    assert isinstance(swept, Choices)
    return [str(value) for value in swept.values]


def test_a_list_takes_whatever_can_be_bound() -> None:
    assert values_of(f"A.x = [{', '.join(HARD_VALUES)}]") == HARD_VALUES
    assert values_of(f"A.x=[{' ,'.join(HARD_VALUES)} , ]") == HARD_VALUES
    assert values_of("A.x = ['], [', \"it's, so\"]") == ["'], ['", '"it\'s, so"']


def test_one_value_has_one_text_however_it_is_written() -> None:
    assert values_of('A.x = [1e-4, 1_000, "text", [1,2]]') == ["0.0001", "1000", "'text'", "[1, 2]"]
    assert values_of("A.x = range(1, 7, 2)") == ["1", "3", "5"]


@pytest.mark.parametrize(
    "expressions, message",
    [
        (["A.x = []"], "A.x has an empty list"),
        (["A.x = [1, 2, 1.0, 1]"], "A.x has the value 1 twice"),
        (["A.x = [1e-3, 0.001]"], "A.x has the value 0.001 twice"),
        (["A.x = [1, , 2]"], "nothing between two commas"),
        (["A.x = [1]", "A.x = [2]"], "A.x twice"),
        (["A.x = [1]", "m.n.A.x = [2]"], "sweep names A.x and m.n.A.x, which are the same"),
        (["s/m.A.x = [1]", "s/A.x = [2]"], "sweep names s/m.A.x and s/A.x, which are the same"),
        (["A.x = 3"], "must be a list"),
        (["A.x = [1, 2"], "must be a list"),
        (["A.x = [1], 2"], "must be a list"),
        (["A.x = ['a]"], "must be a list"),
        (["A.x ="], "must be a list"),
        (["A.x"], "must be a name, ="),
        (["A x = [1]"], "must be a name, ="),
        (["A.x = uniform(2, 1)"], "the lower number first"),
        (["A.x = uniform(1, 1)"], "the lower number first"),
        (["A.x = log_uniform(0, 1)"], "must be above 0"),
        (["A.x = log_uniform(-1e-3, 1)"], "must be above 0"),
        (["A.x = log_uniform(1)"], "must have two numbers"),
        (["A.x = uniform(a, b)"], "must have numbers"),
        (["A.x = uniform('a', 1)"], "a finite number, got 'a'"),
        (["A.x = range(5, 2)"], "is empty"),
        (["A.x = range(1, 5, 0)"], "other than 0"),
        (["A.x = range(1.5)"], "one to three integers"),
        (["A.x = normal(0, 1)"], "must be a list"),
    ],
)
def test_what_is_refused(expressions: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)) as refusal:
        parse(expressions)
    assert "\n" not in str(refusal.value)


def test_the_grid_against_itertools() -> None:
    swept = parse(["C.z = ['u', 'v']", "A.x = [1, 2, 3]", "B.y = range(2)"])
    expected = [
        [f"A.x = {x}", f"B.y = {y}", f"C.z = {z!r}"] for x, y, z in itertools.product((1, 2, 3), (0, 1), ("u", "v"))
    ]
    assert [bindings(point) for point in grid(swept, max_points=12)] == expected
    with pytest.raises(ArgumentError, match=r"has 12 points.*--max_points=12 allows"):
        grid(swept, max_points=11)
    with pytest.raises(ArgumentError, match="1,000,000,000 points"):  # counted, not formed
        grid(parse(["A.x = range(1_000_000_000)"]), max_points=100)
    with pytest.raises(ArgumentError, match="A.x has an interval.*--num_random"):
        grid(parse(["A.x = uniform(0, 1)"]), max_points=100)


def test_random_points_are_different_repeatable_and_grow_by_their_number() -> None:
    swept = parse(["A.x = log_uniform(1e-5, 1e-1)", "B.y = [1, 2]", "C.z = uniform(-1, 0.5)"])
    points = random_points(swept, 50, seed=3, max_points=50)
    assert random_points(swept, 20, seed=3, max_points=50) == points[:20]
    assert random_points(swept, 50, seed=4, max_points=50) != points
    assert len({point_name(point) for point in points}) == 50
    assert all(1e-5 <= float(point["A.x"]) <= 1e-1 and -1 <= float(point["C.z"]) <= 0.5 for point in points)


def test_draws_are_uniform_in_the_number_or_in_its_logarithm() -> None:
    swept = {"A.x": Interval(1e-4, 1.0, is_log=True), "B.y": Interval(2.0, 6.0, is_log=False)}
    points = random_points(swept, 400, seed=0, max_points=400)
    for name, of in (
        ("A.x", lambda text: math.log10(float(text)) / 4 + 1),
        ("B.y", lambda text: float(text) / 4 - 0.5),
    ):
        shares = sorted(of(point[name]) for point in points)  # uniform on [0, 1]
        distance = max(abs(share - i / 400) for i, share in enumerate(shares))
        assert distance < 1.95 / math.sqrt(400), name  # Kolmogorov and Smirnov, at 0.001


def test_all_of_a_few_points_are_found_and_no_more_are_promised() -> None:
    swept = parse(["A.x = [1, 2]", "B.y = [1, 2, 3]"])
    key = lambda point: tuple(point.values())  # noqa: E731
    assert sorted(random_points(swept, 6, 0, 10), key=key) == grid(swept, 10)
    with pytest.raises(ArgumentError, match="num_random must be at most .* gave 6"):
        random_points(swept, 7, seed=0, max_points=10)
    with pytest.raises(ArgumentError, match="11 points"):
        random_points(swept, 11, seed=0, max_points=10)
    with pytest.raises(ArgumentError, match="num_random must be an integer of at least 1"):
        random_points(swept, 0, seed=0, max_points=10)


def test_names_are_safe_short_and_never_shared() -> None:
    points = [{"A.x": value} for value in HARD_VALUES]
    points += [{"A.x": "'a'", "B.y": "1"}, {"s/A.x": "1"}, {"s.A.x": "1"}, {"s/t/A.x": "1"}]
    points += [{"A.x": repr("long" * n)} for n in range(30, 120)]
    names = [point_name(point) for point in points]
    assert len({name.lower() for name in names}) == len(names) - 1  # 'a' and 'A' differ by their case alone
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.,=+@-]*", name, re.ASCII) and len(name) < 200 for name in names)


def test_a_name_does_not_depend_on_the_order_of_the_bindings() -> None:
    assert point_name({"B.y": "1", "A.x": "2"}) == point_name({"A.x": "2", "B.y": "1"}) == "A.x=2,B.y=1"
