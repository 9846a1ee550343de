"""The points of a sweep: expressions such as `Adam.lr = [1e-4, 2e-4]` in, the bindings of each point out.

Pure functions. A value is text all the way, as a config file would have it, so anything that can be bound can be swept.
"""

import ast
import hashlib
import io
import itertools
import keyword
import math
import random
import re
import tokenize
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from popgen.errors import ArgumentError, check_integer, check_number
from popgen.streams import stream_seed

Point: TypeAlias = Mapping[str, str]  # the text of a value by the name that it is bound to
SEED = "Experiment.seed"
FORMS = "a list such as [1e-4, 2e-4], range(5), uniform(0.0, 1.0) or log_uniform(1e-5, 1e-2)"
LONGEST_NAME = 150
DIGITS = 6  # of a number drawn from an interval


class Choices(NamedTuple):
    """Values to take in turn, or to choose from with equal probability."""

    values: Sequence[str] | range

    def draw(self, source: random.Random) -> str:
        """Returns one of them."""
        return str(source.choice(self.values))


class Interval(NamedTuple):
    """Numbers between two bounds, uniform themselves or in their logarithm; for a random search alone."""

    low: float
    high: float
    is_log: bool

    def draw(self, source: random.Random) -> str:
        """Returns a number of six significant digits, so that names stay readable."""
        low, high = (math.log(bound) if self.is_log else bound for bound in (self.low, self.high))
        drawn = source.uniform(low, high)
        rounded = float(f"{math.exp(drawn) if self.is_log else drawn:.{DIGITS}g}")
        return repr(min(max(rounded, self.low), self.high))


def parse(expressions: Sequence[str]) -> dict[str, Choices | Interval]:
    """Returns what each name is to take, in the order of the names.

    Raises:
        ArgumentError: if an expression is not of the form `Name = values`, has no values or the same one twice, or a
            name occurs twice, in full or not.

    Example:
        >>> parse(["Adam.lr = log_uniform(1e-5, 1e-2)", "Experiment.optimizer = [@torch.optim.Adam, @torch.optim.SGD]"])
        ... # doctest: +ELLIPSIS
        {'Adam.lr': Interval(...), 'Experiment.optimizer': Choices(values=('@torch.optim.Adam', '@torch.optim.SGD'))}
    """
    swept: dict[str, Choices | Interval] = {}
    for expression in expressions:
        name = bound_name(expression)
        if not re.fullmatch(r"[\w./]+", name) or "=" not in expression:
            raise ArgumentError(f"sweep must be a name, = and {FORMS}; got {expression!r}")
        if name in swept:
            raise ArgumentError(f"sweep names {name} twice; put all of its values into one list")
        for other in swept:
            if may_be_the_same(name, other):
                raise ArgumentError(f"sweep names {other} and {name}, which are the same; put all values into one list")
        swept[name] = _parse_values(name, " ".join(expression.partition("=")[2].split("\n")).strip())
    return dict(sorted(swept.items()))


def may_be_the_same(one: str, other: str) -> bool:
    """Returns whether two names are the same, or one of them is the other with more of its modules.

    Example:
        >>> may_be_the_same("Adam.lr", "torch.optim.Adam.lr")
        True
    """
    (scope, _, name), (other_scope, _, other_name) = one.rpartition("/"), other.rpartition("/")
    short, long = sorted((name, other_name), key=len)
    return scope == other_scope and f".{long}".endswith(f".{short}")


def bound_name(binding: str) -> str:
    """Returns the name that a binding or the expression of a sweep is about.

    Example:
        >>> bound_name("Adam.lr = 1e-3")
        'Adam.lr'
    """
    return binding.partition("=")[0].strip()


def grid(swept: Mapping[str, Choices | Interval], max_points: int) -> list[Point]:
    """Returns every combination of the values, the last name varying fastest.

    Raises:
        ArgumentError: if a name has an interval, or there are more than `max_points`.

    Example:
        >>> [list(point.values()) for point in grid(parse(["B.x = ['u', None]", "A.y = range(2)"]), max_points=10)]
        [['0', "'u'"], ['0', 'None'], ['1', "'u'"], ['1', 'None']]
    """
    lists = []
    for name, values in swept.items():
        if isinstance(values, Interval):
            raise ArgumentError(f"{name} has an interval, of which there is no grid; --num_random=20 draws 20 points")
        lists.append(values.values)
    _check_number_of_points(math.prod(map(len, lists)), max_points)
    return [dict(zip(swept, map(str, values), strict=True)) for values in itertools.product(*lists)]


def random_points(swept: Mapping[str, Choices | Interval], num_points: int, seed: int, max_points: int) -> list[Point]:
    """Returns different points, each name drawn on its own; the first ones are the same however many are asked for.

    Raises:
        ArgumentError: if there are not so many, or they are more than `max_points`.

    Example:
        >>> swept = parse(["Adam.lr = log_uniform(1e-5, 1e-2)", "LATENT_DIM = [20, 40]"])
        >>> points = random_points(swept, 3, seed=0, max_points=10)
        >>> len(points), points == random_points(swept, 4, seed=0, max_points=10)[:3]
        (3, True)
    """
    check_integer("num_random", num_points, minimum=1)
    _check_number_of_points(num_points, max_points)
    points: list[Point] = []
    draws = 1_000 + 20 * num_points
    for i in range(draws):
        sources = {name: random.Random(stream_seed(seed, "sweep", name, i)) for name in swept}
        point = {name: values.draw(sources[name]) for name, values in swept.items()}
        if point not in points:
            points.append(point)
        if len(points) == num_points:
            return points
    raise ArgumentError(
        f"num_random must be at most the number of different points, got {num_points}: {draws:,} draws gave "
        f"{len(points)}; without it a sweep over lists takes them all"
    )


def bindings(point: Point) -> list[str]:
    """Returns the bindings of a point.

    Example:
        >>> bindings({"Adam.lr": "0.001", "LATENT_DIM": "20"})
        ['Adam.lr = 0.001', 'LATENT_DIM = 20']
    """
    return [f"{name} = {value}" for name, value in point.items()]


def point_name(point: Point) -> str:
    """Returns the name of a point's run directory: its bindings, and a digest where a character had to give way.

    Two points have two names: only letters, digits and `._+-@` are kept as they are, and whatever else a name or a
    value holds (spaces, brackets, quotes other than around a plain word) adds the digest of the exact text.

    Example:
        >>> point_name({"Adam.lr": "0.0001", "BinaryMNIST.protocol": "'fixed'"})
        'Adam.lr=0.0001,BinaryMNIST.protocol=fixed'
        >>> point_name({"GatedDense.sizes": "[300, 300]"})
        'GatedDense.sizes=300,300-971ab369'
    """
    exact = ",".join(f"{name}={_plain(value)}" for name, value in sorted(point.items()))
    name = re.sub(r"[^\w.,=+@-]+", "-", exact, flags=re.ASCII)
    if name == exact and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(repr(sorted(point.items())).encode()).hexdigest()[:8]
    tidy = re.sub(r"-*([,=])-*", r"\1", name)[:LONGEST_NAME].strip("-")
    return f"{tidy}-{digest}"


def setting_name(name: str) -> str:
    """Returns the name under which a run shows what is bound to a swept name.

    Example:
        >>> setting_name("torch.optim.Adam.lr"), setting_name("encoder/GatedDense.units"), setting_name("LATENT_DIM")
        ('Adam.lr', 'encoder/GatedDense.units', 'LATENT_DIM')
    """
    scope, slash, selector = name.rpartition("/")
    return scope + slash + ".".join(selector.split(".")[-2:])


def _check_number_of_points(count: int, max_points: int) -> None:
    if count > max_points:
        raise ArgumentError(
            f"the sweep has {count:,} points, more than --max_points={max_points}; --max_points={count} allows them"
        )


def _parse_values(name: str, text: str) -> Choices | Interval:
    """Returns what stands after the equals sign."""
    if match := re.fullmatch(r"(range|uniform|log_uniform)\s*\((.*)\)", text):
        return _parse_range(name, match[1], match[2])
    values = tuple(_canonical(item) for item in _items(name, text))
    if not values:
        raise ArgumentError(f"sweep: {name} has an empty list; give at least one value")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ArgumentError(f"sweep: {name} has the value {value} twice")
    return Choices(values)


def _parse_range(name: str, form: str, text: str) -> Choices | Interval:
    given = f"sweep: {name} = {form}({text})"
    try:
        arguments = ast.literal_eval(f"({text},)")
    except (ValueError, SyntaxError):
        raise ArgumentError(f"{given} must have numbers between the parentheses") from None
    if form == "range":
        if not 1 <= len(arguments) <= 3 or not all(type(argument) is int for argument in arguments):
            raise ArgumentError(f"{given} must have one to three integers: start, stop (which is left out) and step")
        if len(arguments) == 3 and arguments[2] == 0:
            raise ArgumentError(f"{given} must have a step other than 0")
        if not range(*arguments):
            raise ArgumentError(f"{given} is empty: start must lie before stop")
        return Choices(range(*arguments))
    if len(arguments) != 2:
        raise ArgumentError(f"{given} must have two numbers, the lowest and the highest")
    numbers = [float(argument) if isinstance(argument, int) else argument for argument in arguments]
    low, high = (check_number(f"{given}: a bound", number) for number in numbers)
    if low >= high:
        raise ArgumentError(f"{given} must have the lower number first, and a higher one")
    if form == "log_uniform" and low <= 0.0:
        raise ArgumentError(f"{given} must be above 0, where logarithms are")
    return Interval(low, high, is_log=form == "log_uniform")


def _items(name: str, text: str) -> list[str]:
    """Returns the text of every item of a list, split at the commas that no bracket and no quote holds."""
    unreadable = ArgumentError(f"sweep: the values of {name} must be {FORMS}; got {text!r}")
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
    except (tokenize.TokenError, SyntaxError):
        raise unreadable from None
    if not tokens or tokens[0].string != "[" or any(token.type == tokenize.ERRORTOKEN for token in tokens):
        raise unreadable
    items, depth, start = [], 0, 1
    for token in tokens:
        depth += (token.string in ("[", "(", "{")) - (token.string in ("]", ")", "}"))
        ends = depth == 0
        if ends or (depth == 1 and token.string == ","):
            items.append(text[start : token.start[1]].strip())
            start = token.end[1]
        if ends:
            if token is not tokens[-1]:
                raise unreadable
            break
    else:
        raise unreadable
    if not items[-1]:  # an empty list, or a comma after the last item
        items.pop()
    if not all(items):
        raise ArgumentError(f"sweep: {name} has nothing between two commas of {text!r}")
    return items


def _canonical(value: str) -> str:
    """Returns one text for every way of writing a number, text or a list of them; references stay as they are."""
    try:
        return repr(ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return value


def _plain(value: str) -> str:
    """Returns a plain word without its quotes; nothing else that can be bound looks like one."""
    word = value[1:-1]
    is_word = value == repr(word) and word.isascii() and word.isidentifier() and not keyword.iskeyword(word)
    return word if is_word else value
