"""Puts committed results into README.md: ``python tools/readme.py`` (``--check`` only compares).

Numbers in the README stand between markers and come from ``studies/*/study.json`` and
``benchmarks/results``; nothing there is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import plot_dequant_gemm, plot_generate, plot_training_step  # noqa: E402
from benchmarks.pages import gpu_results as results_of  # noqa: E402
from benchmarks.plot_training_step import steps  # noqa: E402
from benchmarks.results import since  # noqa: E402
from benchmarks.results import table as benchmark_table  # noqa: E402
from grace.study.arms import FULL, METHODS  # noqa: E402
from grace.study.claims import signed  # noqa: E402
from grace.study.comparisons import ABOVE, UNSEPARATED  # noqa: E402
from grace.study.report import findings, footnotes, read_study, resample, table  # noqa: E402
from grace.study.sections import overview  # noqa: E402

STUDIES = ROOT / "studies"


def as_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown; numbers stand on the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def default_study() -> str:
    """Totals of the committed default study by method and bits, its chart over bits, and what more
    steps gave; of all post-training arms only the best at each number of bits."""
    study = read_study(STUDIES / "default")
    arms, config, drawn = study["arms"], study["config"], study["benchmark"]
    size = {arm["method"]: arm["parameters"] / 1e6 for arm in arms}
    head = (
        f"A student of {size['student']:.1f} million parameters under a teacher of "
        f"{size['teacher']:.1f}, both trained from nothing; {drawn['questions']:,} held-out "
        f"questions about {drawn['images']:,} drawn images, MME's score over "
        f"{len(drawn['subtasks'])} subtasks (at most {200 * len(drawn['subtasks']):,}) with its "
        f"95 % interval, {len(config['seeds'])} seeds of {config['steps']:,} steps, 4- and 8-bit "
        f"models scored as deployed. {config['label_errors']:.0%} of the yes/no answers that arms "
        "learn from are wrong; the teacher learned from exact ones."
    )
    if left := study.get("unfinished"):
        head += f" Not run yet: {len(left)} of the arms, a seed each."
    resampled = resample(study)
    shown = overview({"arms": telling_arms(arms)}, resampled)
    chart = "![Score over bits](studies/default/bits.png)"
    table_of = as_table(shown.header, shown.rows)
    best = (
        "Post-training: RTN, GPTQ and AWQ, symmetric and with zero points, of the student as it "
        "came and of the one trained on; the best by these very scores."
    )
    parts = [reading(study), longer_study(), chart]
    return "\n".join([head, "", *table_of, "", best, *(x for part in parts for x in ("", part))])


def reading(study: dict) -> str:
    """What GRACE is above, and that plain distillation is not told apart from it; ValueError where
    the results say something else."""
    found = {(c.arm, c.to): c for c in findings(study).comparisons}
    low = sorted({arm["bits"] for arm in study["arms"]} - {FULL}, reverse=True)
    above, best = [], []
    for bits in low:
        others = [arm for arm in study["arms"] if arm["bits"] == bits and not arm["trained"]]
        ours = [found[f"grace-{bits}", name] for name in ("control", *(a["name"] for a in others))]
        against_kd = found[f"grace-{bits}", f"kd-{bits}"]
        if {c.verdict for c in ours} != {ABOVE} or against_kd.verdict != UNSEPARATED:
            raise ValueError(f"the README's sentence about {bits} bits must be another now")
        above.append(f"{signed(ours[0].difference)} at {bits} bits")
        best.append(f"{min(round(c.difference.value) for c in ours[1:])} at {bits} bits")
    return (
        f"GRACE minus the student trained on as long: {', '.join(above)}. GRACE minus the best "
        f"post-training arm: {', '.join(best)}. QAT under plain distillation (QAT + KD) is not "
        "told apart from GRACE at any bits."
    )


def telling_arms(arms: list[dict]) -> list[dict]:
    """Arms of the README's table: the best post-training ones, and no variants of GRACE."""
    low = [arm for arm in arms if METHODS[arm["method"]].quantized and not arm["trained"]]
    tried = len({arm["label"] for arm in low})
    best = [
        {**max(of_bits, key=lambda arm: arm["total"]), "label": f"best of {tried} post-training"}
        for bits in dict.fromkeys(arm["bits"] for arm in low)
        for of_bits in [[arm for arm in low if arm["bits"] == bits]]
    ]
    trained = [a for a in arms if METHODS[a["method"]].quantized and a["trained"]]
    whole = [arm for arm in arms if not METHODS[arm["method"]].quantized]
    return [*whole, *best, *(arm for arm in trained if "-" not in arm["method"])]


def longer_study() -> str:
    """What the default study's arms at 4 bits reach with more steps."""
    study = read_study(STUDIES / "default" / "longer")
    resampled = resample(study)
    arms = {arm["name"]: arm for arm in study["arms"]}
    told = [
        f"{arms[name]['label']}{f', {bits} bits' if bits < FULL else ''}, {total.value:.0f} "
        f"[{total.low:.0f}, {total.high:.0f}]"
        for name in ("control", "kd-4", "grace-4")
        for total, bits in [(resampled.total(name), arms[name]["bits"])]
    ]
    steps = study["config"]["steps"]
    return f"[With {steps:,} steps](studies/default/longer/report.md): {'; '.join(told)}."


def quickstart() -> str:
    """Table, what stands behind it, and chart of the committed quickstart."""
    study = read_study(STUDIES / "quickstart")
    shown = as_table(*table(study))
    notes = [f"<sub>{note}</sub>\n" for note in footnotes(study)]
    chart = "![Score of every method at 4 and 2 bits](studies/quickstart/scores.png)"
    return "\n".join([*shown, "", *notes, chart])


CPU_ROWS = (1, 4, 16, 64, 256, 1024)


def dequant_gemm() -> str:
    """The results of dequant_gemm: means over layers of each GPU, one layer of each CPU."""
    gpus, cpus = [], []
    for path in sorted((ROOT / "benchmarks/results").glob("*/dequant_gemm.json")):
        content = json.loads(path.read_text())
        facts = content["environment"]
        if facts["device"].startswith("cpu-"):
            cpus.append(cpu_results(content, facts))
        else:
            gpus.append(gpu_results(content, facts))
    return "\n\n".join(gpus + cpus)


def gpu_results(content: dict, facts: dict) -> str:
    """Geometric means by size of layer, and the chart."""
    points = plot_dequant_gemm.points(content, {})
    chart = f"docs/ops/dequant_gemm_{facts['device']}.png"
    head = (
        f"`dequant_gemm` on {facts['device'].upper()}, W4, group 128, bfloat16, torch "
        f"{facts['torch']}, commit {facts['commit'][:7]}, weights not in a cache: speed-up "
        "(geometric means over layers) by rows of x. Peers are Marlin, Machete, PyTorch's "
        "tinygemm, humming-kernels and gemlite in the same run; "
        "[by layer](docs/ops/dequant_gemm.md#measured), with the targets."
    )
    image = f"![Speed-up and share of the floor]({chart})"
    return "\n\n".join([head, plot_dequant_gemm.summary(points), image])


def cpu_results(content: dict, facts: dict) -> str:
    """One layer, with the machine."""
    head = (
        f"`dequant_gemm` on a CPU, W4, group 128, µs (medians), {facts['device']}, "
        f"threads: {facts['threads']}, torch {facts['torch']}. The floor is set by a sum over "
        "memory and a large product of torch, timed beforehand: a time below it says that this "
        "product was not the machine's best."
    )
    rows = [
        row
        for row in content["rows"]
        if row["size"]["N"] == row["size"]["K"] and row["size"]["M"] in CPU_ROWS
    ]
    return f"{head}\n\n{benchmark_table({**content, 'rows': rows})}"


TRAINING = ("fake_quant", "gated_dkd", "cka", "linear_gated_dkd")


def training_ops() -> str:
    """Forward and backward of the ops of training, on each GPU."""
    parts = []
    for folder in sorted((ROOT / "benchmarks/results").iterdir()):
        found = [folder / f"{op}.json" for op in TRAINING if (folder / f"{op}.json").exists()]
        if found and not folder.name.startswith("cpu-"):
            contents = [json.loads(path.read_text()) for path in found]
            parts.append(training_results(contents))
    return "\n\n".join(parts)


def training_results(contents: list[dict]) -> str:
    """A line a size, beside the formulas in eager PyTorch."""
    facts = contents[0]["environment"]
    head = (
        f"Forward and backward on {facts['device'].upper()}, bfloat16, torch {facts['torch']}, "
        f"commit {facts['commit'][:7]}, medians. The floor is that of the bytes or products that "
        "no implementation avoids; memory is what a call allocates, its results included."
    )
    columns = ["op", "size", "floor, µs", "grace, µs", "eager, µs", "speed-up"]
    columns += ["compile, µs", "speed-up", "grace, MiB", "eager, MiB"]
    lines = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2)]
    for content in contents:
        sides: dict[str, dict[str, dict]] = {}
        for row in content["rows"]:
            size = " ".join(f"{key}={value}" for key, value in row["size"].items()) + since(row)
            sides.setdefault(size, {})[row["side"]] = row
        for size, rows in sides.items():
            lines.append([f"`{content['benchmark']}`", size, *training_line(rows)])
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    chart = f"docs/ops/training_ops_{facts['device']}.png"
    image = f"![Time over the floor, and memory, by size]({chart})"
    return "\n".join([head, "", *shown, "", image])


def training_step() -> str:
    """A whole step against the student's fine-tuning and the teacher's forward."""
    parts = []
    for gpu, content in results_of("training_step").items():
        head = (
            f"A step of `GraceTrainer` without its optimizer on {gpu.upper()}, ms, beside the "
            "student's fine-tuning (SFT) and the teacher's forward alone, and the paper's step in "
            "plain PyTorch (held: quantized weights stay from forward to backward); "
            "[what the time goes to, memory, two GPUs](docs/training_step.md)."
        )
        parts.append(f"{head}\n\n{plot_training_step.time_table(steps(content))}")
    return "\n\n".join(parts)


def generation() -> str:
    """Whole answers with an image, against bf16 as transformers generates."""
    parts = []
    for gpu, content in results_of("generate").items():
        head = (
            f"Answers of 128 tokens about an image on {gpu.upper()}, random weights of the public "
            "sizes, decode in ms a token: transformers' `generate` in bf16, the same on a static "
            "cache and compiled, and `Generator` at 4 bits; "
            "[every side, memory, kernels](docs/generation.md#measured)."
        )
        table = plot_generate.headline(plot_generate.cells(content))
        image = f"![Time of a token and memory](docs/generation_{gpu}.png)"
        parts.append(f"{head}\n\n{table}\n\n{image}")
    return "\n\n".join(parts)


def training_line(rows: dict[str, dict]) -> list[str]:
    """Of one size: times, speed-ups and memory; a dash for what was not timed."""
    ours = rows["grace"]
    cells = [f"{ours['floor_us']:.0f}", f"{ours['us']:.0f}"]
    for side in ("eager", "compile"):
        time = rows.get(side, {}).get("us")
        cells += ["–", "–"] if time is None else [f"{time:.0f}", f"{time / ours['us']:.1f}×"]
    memory = (row.get("peak_mib") for row in (ours, rows.get("eager", {})))
    return cells + ["–" if mib is None else f"{mib:.0f}" for mib in memory]


def filled(text: str) -> str:
    """The README with every marked block made anew."""
    for make in (quickstart, default_study, generation, dequant_gemm, training_ops, training_step):
        name = make.__name__
        pattern = rf"(<!-- begin {name} .*?-->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(
            pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"readme: README.md must have one block {name}, got {count}")
    return text


def main() -> int:
    """Writes the README, or says with exit code 1 that it is not what the results give."""
    path = ROOT / "README.md"
    new = filled(path.read_text())
    if "--check" in sys.argv[1:]:
        if new != path.read_text():
            print("README.md is not what the committed results give: python tools/readme.py")
            return 1
        return 0
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
