"""Pictures of drawn scenes, and the files and rows made of them."""

import json
from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from grace.evaluation.drawn import benchmark, vocabulary
from grace.evaluation.drawn.composing import compose
from grace.evaluation.drawn.examples import Examples
from grace.evaluation.drawn.levels import LEVELS
from grace.evaluation.drawn.outlines import outline
from grace.evaluation.drawn.rendering import FONTS, _font, render
from grace.evaluation.drawn.scenes import Scene
from grace.evaluation.drawn.topics import pose


def test_shapes_are_where_and_what_the_scene_says():
    rng, checked = Random(6), 0
    for _ in range(12):
        scene = compose(pose("color", "easy", "train", rng), 0, "easy", "train", rng)
        pixels = np.asarray(render(scene), float)
        for item in scene.items:
            if item.shape not in ("ring", "moon"):
                x, y = round(item.x), round(item.y)
                shown = pixels[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
                color = np.array(vocabulary.COLORS[item.color])
                assert np.abs(shown - 0.97 * color).max() < 0.07 * 255 + 4, item
                checked += 1
    assert checked > 60


def test_what_covers_a_shape_leaves_most_of_it():
    rng = Random(8)
    for _ in range(40):
        scene = compose(pose("existence", "hard", "train", rng), 0, "hard", "train", rng)
        owner = Image.new("L", (336, 336))
        for number, item in enumerate(scene.items, 1):
            corners = outline(item.shape, item.x, item.y, item.radius, item.angle)
            ImageDraw.Draw(owner).polygon(corners, fill=number)
        for number, item in enumerate(scene.items, 1):
            alone = Image.new("L", (336, 336))
            corners = outline(item.shape, item.x, item.y, item.radius, item.angle)
            ImageDraw.Draw(alone).polygon(corners, fill=1)
            visible = (np.asarray(owner) == number).sum() / np.asarray(alone).sum()
            assert visible > 0.5, (item, visible)


def test_levels_differ_in_clutter_noise_and_text():
    """Noise: what is left of neighbouring pixels' differences in the median."""
    noise, items = {}, {}
    for level in LEVELS:
        scene = compose(pose("OCR", level, "train", Random(2)), 0, level, "train", Random(2))
        pixels = np.asarray(render(scene), float)
        noise[level] = np.median(np.abs(np.diff(pixels, axis=0)))
        items[level] = len(scene.items)
    assert noise["easy"] < 5 < noise["medium"] < 10 < noise["hard"]
    assert (items["easy"], items["medium"], items["hard"]) == (0, 4, 8)


def test_text_decides_the_picture_and_fits_it():
    for level in LEVELS:
        scene = compose(pose("code_reasoning", level, "train", Random(2)), 0, level, "train",
                        Random(2))  # fmt: skip
        shown = np.asarray(render(scene), float)
        other = np.asarray(render(Scene(level, scene.seed, scene.items, "print(1)")), float)
        assert (np.abs(shown - other) > 60).mean() > 0.01


def test_every_font_comes_with_matplotlib_and_has_all_letters():
    for name in FONTS:
        blank = bytes(_font(name, 20).getmask("\U0010fffd"))
        for letter in 'ABDEFGIKLMNOPRSTUVZabcdefghijklmnopqrstuvwxyz0123456789+-×%[]()=.,:<>"_':
            assert bytes(_font(name, 20).getmask(letter)) != blank, (name, letter)


def contents(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        benchmark.draw(tmp_path / name, images_per_subtask=2, seed=seed, level="hard", pixels=48)
        benchmark.training_rows(tmp_path / f"{name}-rows", images=9, seed=seed, pixels=48)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    rows = [contents(tmp_path / f"{name}-rows") for name in "abc"]
    assert rows[0] == rows[1] != rows[2]


def test_training_rows_are_the_examples(tmp_path):
    file = benchmark.training_rows(tmp_path, images=18, seed=3, levels=("easy",), pixels=48)
    rows = json.loads(file.read_text())
    examples = Examples(3, levels=("easy",))
    assert len(rows) == 3 * 18
    assert set(Counter(row["subtask"] for row in rows).values()) == {6}
    for index in range(18):
        mine = rows[3 * index : 3 * index + 3]
        assert mine == examples[index].rows(f"images/00/{index:07d}.png")
        with Image.open(tmp_path / mine[0]["image"]) as image:
            assert image.tobytes() == examples[index].picture(48).tobytes()
    assert not (tmp_path / "train.json.part").exists()


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="images_per_subtask must be even and at least 2, got 3"):
        benchmark.draw(tmp_path / "x", images_per_subtask=3, seed=0)
    with pytest.raises(ValueError, match="level must be one of easy, medium, hard, got 'odd'"):
        benchmark.draw(tmp_path / "x", images_per_subtask=2, seed=0, level="odd")
    with pytest.raises(ValueError, match="split must be one of train, validation, heldout, got"):
        benchmark.training_rows(tmp_path / "x", images=1, seed=0, split="test")
    with pytest.raises(ValueError, match="pixels must be at least 32, got 8"):
        benchmark.draw(tmp_path / "x", images_per_subtask=2, seed=0, pixels=8)
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        benchmark.training_rows(tmp_path / "x", images=0, seed=0)
    with pytest.raises(ValueError, match="levels must name some of easy, medium, hard, got none"):
        benchmark.training_rows(tmp_path / "x", images=1, seed=0, levels=())
    with pytest.raises(ValueError, match="index must be at least 0, got -1"):
        Examples(0)[-1]
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="root must be an empty folder"):
        benchmark.draw(tmp_path, images_per_subtask=2, seed=0)


def test_command_draws_what_evaluate_reads(tmp_path, capsys):
    from grace.cli import main
    from grace.evaluation import mme

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["draw", *map(str, arguments)])
        return left.value.code

    small = ("--pixels", 32, "--seed", 4)
    assert run("benchmark", tmp_path / "a", "--images-per-subtask", 2, *small) == 0
    assert "36 questions, heldout, medium" in capsys.readouterr().out
    assert len(mme.load(tmp_path / "a")) == 36
    assert run("rows", tmp_path / "b", "--images", 3, "--level", "hard", *small) == 0
    rows = json.loads((tmp_path / "b" / "train.json").read_text())
    assert [row["level"] for row in rows] == ["hard"] * 9
    assert run("benchmark", tmp_path / "a", *small) == 2
    assert "root must be an empty folder" in capsys.readouterr().err
