"""Files that are damaged, or are something else: whatever parses them raises the project's errors and no others.

`python -m benchmarks.fuzz` searches the same parsers for longer.
"""

import pathlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.parsers import TARGETS
from popgen import config
from popgen.errors import PopgenError
from popgen.evaluation.image_table import ImageTable, read_table
from popgen.training import checkpoints

pytestmark = pytest.mark.usefixtures("as_a_user")
# The same inputs every time, and no files of hypothesis' own.
quick = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

EDITS = st.lists(st.tuples(st.integers(0, 4_000), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", TARGETS)
@quick
@given(data=st.data())
def test_odd_files_raise_the_project_s_errors_alone(name: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    target, seeds = made(name, tmp_path_factory)
    content = data.draw(st.sampled_from(seeds) | st.binary(max_size=200), "file")
    for position, removed, inserted in data.draw(EDITS, "edits"):
        position %= len(content) + 1
        content = content[:position] + inserted + content[position + removed :]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.parse(content)
    except PopgenError as error:
        assert str(error)


MADE: dict[str, Any] = {}


def made(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[bytes]]:
    if name not in MADE:
        target = TARGETS[name](tmp_path_factory.mktemp(name))
        MADE[name] = target, list(target.seeds())
    return MADE[name]


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_project_writes_is_read(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Otherwise odd files would be refused for a reason that has nothing to do with them."""
    target, seeds = made(name, tmp_path_factory)
    target.path.parent.mkdir(exist_ok=True)
    target.parse(seeds[0])


# --- laws ------------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner), max_leaves=20
)


@quick
@given(
    contents=st.dictionaries(st.text(max_size=8), NESTED, max_size=5),
    numbers=st.lists(st.floats(width=32, allow_nan=False)),
)
def test_a_checkpoint_gives_back_what_it_was_given(
    contents: dict, numbers: list[float], tmp_path: pathlib.Path
) -> None:
    checkpoints.save(tmp_path / "a.ckpt", {**contents, "tensor": torch.tensor(numbers)})
    found = checkpoints.load(tmp_path / "a.ckpt")
    assert torch.equal(found.pop("tensor"), torch.tensor(numbers))
    assert found == {name: value for name, value in contents.items() if name != "tensor"}


@quick
@given(columns=st.lists(st.lists(st.floats(allow_nan=False), min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_table_gives_back_what_was_found(columns: list[list[float]], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("table") / "images.csv"
    table = {f"column_{i}": torch.tensor(values, dtype=torch.float64) for i, values in enumerate(columns)}
    ImageTable(path).fill({"a": 1}, 3, lambda images: table)
    found = read_table(path).columns()
    assert all(torch.equal(found[name], values) for name, values in table.items())


@quick
@given(value=NESTED, other=NESTED)
def test_configurations_differ_where_their_values_do(value: Any, other: Any) -> None:
    texts = [f"Part.before = 1\nPart.value = {item!r}\n" for item in (value, other)]
    assert config.differences(texts[0], texts[0]) == []
    expected = [] if repr(value) == repr(other) else [f"Part.value: {value!r} -> {other!r}"]
    assert config.differences(*texts) == expected
