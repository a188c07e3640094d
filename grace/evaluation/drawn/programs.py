"""Sums and small Python programs with what comes out of them, computed without running them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .vocabulary import word

Program = tuple[str, int]  # the text and the number that comes out


def calculation(level: str, rng: Random) -> Program:
    """A sum, difference or product; three numbers at level "hard"."""
    most = {"easy": 20, "medium": 60, "hard": 99}[level]
    a, b, c = (rng.randint(2, most) for _ in range(3))
    sign = rng.choice("+-") if level == "easy" else rng.choice("+-×")
    if sign == "×":
        a, b = rng.randint(2, 9 if level == "medium" else 19), rng.randint(2, 9)
        return (f"{a} × {b} + {c}", a * b + c) if level == "hard" else (f"{a} × {b}", a * b)
    if sign == "-":
        a, b = max(a, b), min(a, b)
        return (f"{a} - {b} + {c}", a - b + c) if level == "hard" else (f"{a} - {b}", a - b)
    return (f"{a} + {b} + {c}", a + b + c) if level == "hard" else (f"{a} + {b}", a + b)


def program(level: str, rng: Random) -> Program:
    """A Python program that prints one number, of more lines at higher levels."""
    forms = {
        "easy": (_assign, _length),
        "medium": (_length, _list, _loop),
        "hard": (_list, _loop, _branch, _nested),
    }
    form: Callable[[Random], Program] = rng.choice(forms[level])
    return form(rng)


def _assign(rng: Random) -> Program:
    a, b, c = (rng.randint(2, 9) for _ in range(3))
    return f"a = {a}\nb = {b}\nprint(a * b + {c})", a * b + c


def _length(rng: Random) -> Program:
    name, times, more = word(rng, rng.randint(3, 7)).lower(), rng.randint(1, 4), rng.randint(0, 9)
    return f'name = "{name}"\nprint(len(name) * {times} + {more})', len(name) * times + more


def _list(rng: Random) -> Program:
    numbers, new = [rng.randint(1, 20) for _ in range(rng.randint(3, 4))], rng.randint(1, 20)
    index = rng.randrange(len(numbers))
    text = f"n = {numbers}\nn.append({new})\nprint(sum(n) - n[{index}])"
    return text, sum(numbers) + new - numbers[index]


def _loop(rng: Random) -> Program:
    start, turns, step = rng.randint(0, 9), rng.randint(3, 6), rng.randint(1, 5)
    text = f"total = {start}\nfor i in range({turns}):\n    total += {step} * i\nprint(total)"
    return text, start + step * turns * (turns - 1) // 2


def _branch(rng: Random) -> Program:
    x, divisor, rest = rng.randint(5, 40), rng.randint(2, 4), rng.randint(0, 1)
    more, less = rng.randint(2, 9), rng.randint(2, 5)
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
