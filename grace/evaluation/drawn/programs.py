"""Sums and small Python programs with what comes out of them, computed without running them.

They are as small as what a model of some ten million parameters works out in one step, without
writing anything down: numbers of one or two digits, loops of some rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .vocabulary import word

Program = tuple[str, int]  # the text and the number that comes out


def calculation(level: str, rng: Random) -> Program:
    """A sum or difference, above level "easy" a product as well."""
    most = {"easy": 10, "medium": 20, "hard": 40}[level]
    a, b = (rng.randint(2, most) for _ in range(2))
    sign = rng.choice("+-" if level == "easy" else "+-×")
    if sign == "×":
        a, b = rng.randint(2, 9), rng.randint(2, 5 if level == "medium" else 12)
        return f"{a} × {b}", a * b
    if sign == "-":
        a, b = max(a, b), min(a, b)
        return f"{a} - {b}", a - b
    return f"{a} + {b}", a + b


def program(level: str, rng: Random) -> Program:
    """A Python program that prints one number, of more lines at higher levels."""
    forms = {
        "easy": (_assign, _length, _index),
        "medium": (_product, _sum, _short_loop),
        "hard": (_append, _loop, _branch, _nested),
    }
    form: Callable[[Random], Program] = rng.choice(forms[level])
    return form(rng)


def _assign(rng: Random) -> Program:
    a, b, sign = rng.randint(2, 9), rng.randint(2, 9), rng.choice("+*")
    return f"a = {a}\nb = {b}\nprint(a {sign} b)", a + b if sign == "+" else a * b


def _length(rng: Random) -> Program:
    name, more = word(rng, rng.randint(3, 7)).lower(), rng.randint(0, 3)
    return f'name = "{name}"\nprint(len(name) + {more})', len(name) + more


def _index(rng: Random) -> Program:
    numbers = [rng.randint(1, 20) for _ in range(rng.randint(3, 4))]
    index = rng.randrange(len(numbers))
    return f"n = {numbers}\nprint(n[{index}])", numbers[index]


def _product(rng: Random) -> Program:
    a, b, c = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 9)
    return f"a = {a}\nb = {b}\nprint(a * b + {c})", a * b + c


def _sum(rng: Random) -> Program:
    numbers = [rng.randint(1, 9) for _ in range(3)]
    return f"n = {numbers}\nprint(sum(n))", sum(numbers)


def _append(rng: Random) -> Program:
    numbers, new = [rng.randint(1, 9) for _ in range(2)], rng.randint(1, 9)
    index = rng.randrange(2)
    text = f"n = {numbers}\nn.append({new})\nprint(n[{index}] + n[2])"
    return text, numbers[index] + new


def _rounds(start: int, turns: int, step: int) -> Program:
    text = f"total = {start}\nfor i in range({turns}):\n    total += {step} * i\nprint(total)"
    return text, start + step * turns * (turns - 1) // 2


def _short_loop(rng: Random) -> Program:
    return _rounds(rng.randint(0, 5), rng.randint(3, 4), rng.randint(1, 3))


def _loop(rng: Random) -> Program:
    return _rounds(rng.randint(0, 9), rng.randint(3, 5), rng.randint(1, 4))


def _branch(rng: Random) -> Program:
    x, divisor, rest = rng.randint(5, 20), rng.randint(2, 3), rng.randint(0, 1)
    more, less = rng.randint(2, 5), rng.randint(2, 5)
    text = (
        f"x = {x}\nif x % {divisor} == {rest}:\n    x = x + {more}\n"
        f"else:\n    x = x - {less}\nprint(x)"
    )
    return text, x + more if x % divisor == rest else x - less


def _nested(rng: Random) -> Program:
    rows, columns, least = rng.randint(2, 4), rng.randint(2, 4), rng.randint(1, 3)
    text = (
        f"n = 0\nfor i in range({rows}):\n    for j in range({columns}):\n"
        f"        if i + j >= {least}:\n            n += {rows}\nprint(n)"
    )
    under = sum(min(columns, max(0, least - i)) for i in range(rows))
    return text, rows * (rows * columns - under)
