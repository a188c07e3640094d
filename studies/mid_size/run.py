"""A mid-sized student through the whole of grace: warm-up, `grace train`, export, INT4 score.

    python studies/mid_size/run.py --out runs/mid-size            # minutes on one GPU
    python studies/mid_size/run.py --out /tmp/small --scale tiny  # seconds on a CPU: says nothing

A LLaVA of 88 million parameters with random weights learns the questions of the synthetic
benchmark in full precision. It then is student and teacher: `grace train` trains its decoder at
4 bits under the model itself (another teacher: `--teacher DIR`). Three models are scored on the
held-out questions: the student as it was, the student rounded to nearest (RTN), and the trained
one, both of these exported and loaded as users load them, on packed kernels.

OUT/mid_size.json holds scores, seconds and memory, OUT/report.md the same to read; OUT/run is an
ordinary run of `grace train`. What is done already in OUT is not done again. The committed results
beside this file are of a student that stopped early under a teacher of its size that did not:

    python studies/mid_size/run.py --out runs/teacher --seed 1 --steps 2
    python studies/mid_size/run.py --out runs/mid-size --warm-up-steps 200 \
        --teacher runs/teacher/student

    python studies/mid_size/run.py --report studies/mid_size    # report.md from mid_size.json
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import transformers
import typer

from grace.evaluation import answer, make_tiny, mme, synthetic, tiny
from grace.evaluation.tiny_training import Recipe, train
from grace.export import export
from grace.nn import PackedLinear
from grace.quantization import quantize
from grace.training.files import write_whole
from grace.training.run import run
from grace.training.run_config import parse_config

RESULT, REPORT = "mid_size.json", "report.md"
TITLES = {"student": "student", "rtn": "RTN, INT{bits}", "grace": "GRACE, INT{bits}"}
ARMS = ("student", "rtn", "grace")


@dataclass(frozen=True)
class Scale:
    """Everything that has a size.

    Attributes:
        recipe: size of the student and its warm-up.
        train_images, questions: drawn to train on; a row is one question.
        heldout_images: a subtask, two questions each.
        training: options of `grace train`.
    """

    recipe: Recipe
    train_images: int
    questions: int
    heldout_images: int
    training: dict[str, Any]


MID = Scale(
    Recipe(
        tiny.Size(768, 2048, layers=12, heads=12, vision_width=256, vision_layers=4),
        threshold=0.95,
        align=120,
        drill=400,
        early=500,
        steps=800,
        cooldown=200,
        lr=5e-4,
    ),
    train_images=3200,
    questions=6,
    heldout_images=200,
    training={
        "max_steps": 300,
        "per_device_train_batch_size": 64,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "bits": 4,
        "group_size": 128,
        "logging_steps": 5,
        "save_strategy": "no",
        "dataloader_num_workers": 6,
    },
)
TINY = Scale(
    replace(
        MID.recipe,
        size=tiny.Size(32, 64, layers=2, heads=2, vision_width=16, vision_layers=1),
        align=1,
        drill=1,
        early=1,
        steps=1,
        cooldown=1,
        images=4,
    ),
    train_images=8,
    questions=2,
    heldout_images=2,
    training={
        **MID.training,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "group_size": 32,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
    },
)
SCALES = {"mid": MID, "tiny": TINY}


class Study:
    """The stages in their order, each timed; `seconds` and `parameters` are what they found."""

    def __init__(self, out: Path, scale: Scale, seed: int, say: Callable[[str], None]) -> None:
        self.out, self.scale, self.seed, self.say = out, scale, seed, say
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and say that it is over."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.say(f"{name}: {self.seconds[name]} s")

    def warm_up(self) -> Path:
        """The student in full precision, trained on questions drawn anew every step."""
        directory = self.out / "student"
        if directory.is_dir():
            return directory
        torch.set_float32_matmul_precision("high")
        model: Any = tiny.make_model(self.scale.recipe.size, self.seed).to(self.device)
        processor = tiny.make_processor()
        rng = Random(f"mid-size {self.seed}")
        steps, accuracy = train(model, processor, self.scale.recipe, rng, self.say)
        make_tiny.save(model, processor, directory)
        facts = {"steps": steps, "validation": accuracy, "parameters": model.num_parameters()}
        write_whole(self.out / "warm_up.json", json.dumps(facts))
        return directory

    def draw(self) -> None:
        """Rows to train on, and the held-out benchmark."""
        if (self.out / "data" / "drawn").is_file():
            return
        shutil.rmtree(self.out / "data", ignore_errors=True)
        data, scale = self.out / "data", self.scale
        synthetic.training_rows(
            data / "train",
            images=scale.train_images,
            seed=self.seed,
            questions_per_image=scale.questions,
        )
        synthetic.draw(data / "heldout", images_per_subtask=scale.heldout_images, seed=self.seed)
        (data / "drawn").touch()

    def train(self, student: Path, teacher: Path, options: dict[str, Any]) -> Path:
        """`grace train`; the trained student."""
        final = self.out / "run" / "final"
        if final.is_dir():
            return final
        shutil.rmtree(self.out / "run", ignore_errors=True)
        config = {
            "student": str(student),
            "teacher": str(teacher),
            "data": str(self.out / "data" / "train" / "train.json"),
            "output_dir": str(self.out / "run"),
            "seed": self.seed,
            "use_cpu": self.device == "cpu",
            **self.scale.training,
            **options,
        }
        return run(parse_config(config))

    def pack(self, model: Any, name: str) -> Any:
        """Exported, and loaded as users do: on packed kernels."""
        directory = self.out / f"{name}-packed"
        processor = transformers.AutoProcessor.from_pretrained(self.out / "student")
        export(model, directory, processor=processor, overwrite=directory.exists())
        # A GPU's kernels take half precision.
        packed = self.load(directory, torch.float16 if self.device == "cuda" else torch.float32)
        if not any(isinstance(part, PackedLinear) for part in packed.modules()):
            raise RuntimeError(f"mid_size: {directory} must load as packed layers, got none")
        return packed

    def load(self, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
        """A checkpoint on the device."""
        load = transformers.AutoModelForImageTextToText.from_pretrained
        return load(directory, dtype=dtype).to(self.device).eval()

    def score(self, student: Path, trained: Path, bits: int, group_size: int) -> dict[str, Any]:
        """MME scores of the three models on the held-out questions."""
        rows = mme.load(self.out / "data" / "heldout")
        processor = transformers.AutoProcessor.from_pretrained(student)
        batches = answer.prepare(processor, rows, batch_size=128)

        def scored(model: Any) -> dict[str, Any]:
            said = answer.answer(model, processor, batches, max_new_tokens=1, progress=False)
            return mme.score(mme.answered(rows, said))

        rounded = self.load(student)
        quantize(rounded, bits=bits, group_size=group_size)
        return {
            "student": scored(self.load(student)),
            "rtn": scored(self.pack(rounded, "rtn")),
            "grace": scored(self.pack(self.load(trained), "grace")),
        }


def study(
    out: Path,
    scale: Scale,
    *,
    seed: int = 0,
    teacher: Path | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Any]:
    """All stages; writes and returns what `mid_size.json` holds.

    Args:
        out: folder of the study.
        scale: its sizes.
        seed: of weights, data and training.
        teacher: a checkpoint with the student's tokenizer and image grid; None: the student.
        say: told of progress.
        **options: of `grace train`, over the scale's.
    """
    stages = Study(out, scale, seed, say)
    out.mkdir(parents=True, exist_ok=True)
    with stages.stage("warm-up"):
        student = stages.warm_up()
    with stages.stage("draw"):
        stages.draw()
    with stages.stage("train"):
        trained = stages.train(student, teacher or student, options)
    training = {**scale.training, **options}
    with stages.stage("score"):
        scores = stages.score(student, trained, training["bits"], training["group_size"])
    result = {
        "scores": scores,
        "seconds": stages.seconds,
        "training": training,
        "recipe": asdict(scale.recipe),
        "seed": seed,
        "warm_up": json.loads((out / "warm_up.json").read_text()),
        "summary": json.loads((out / "run" / "summary.json").read_text()),
        "device": torch.cuda.get_device_name() if stages.device == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_whole(out / RESULT, json.dumps(result, indent=1) + "\n")
    shutil.copyfile(out / "run" / "curves.png", out / "curves.png")
    report(out)
    return result


def report(out: Path) -> str:
    """Writes and returns Markdown of a result: a line a subtask, a column a model."""
    result = json.loads((out / RESULT).read_text())
    scores, training, summary = (result[name] for name in ("scores", "training", "summary"))
    titles = [TITLES[arm].format(bits=training["bits"]) for arm in ARMS]
    lines = [["subtask", *titles], ["---", *["---:"] * len(ARMS)]]
    for name in scores["student"]["subtasks"]:
        values = [scores[arm]["subtasks"][name]["score"] for arm in ARMS]
        lines.append([name, *(f"{value:.1f}" for value in values)])
    lines.append(["total", *(f"{scores[arm]['total']:.1f}" for arm in ARMS)])
    peak = summary.get("peak_gpu_gib")
    memory = "" if peak is None else f", peak {peak:.1f} GiB on the GPU"
    text = f"""# A mid-sized student through `grace train`

{result["warm_up"]["parameters"] / 1e6:.0f} million parameters, {summary["steps"]} steps of
{training["per_device_train_batch_size"]} rows on {result["device"]}: {summary["seconds"]:.0f} s,
{summary["median_tokens_per_second"]:,.0f} tokens/s{memory}. Scores are MME's, 200 a subtask, on
{scores["student"]["questions"]:,} held-out questions; both INT{training["bits"]} models are
exported ones on packed kernels. GRACE's steps are further training, too: what of the difference is
theirs the control of a study tells, this run does not.

""" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text += "\n\n![Curves of the run](curves.png)\n"
    write_whole(out / REPORT, text)
    return text


def main(
    out: Annotated[Path | None, typer.Option(help="Folder of the study.")] = None,
    scale: Annotated[str, typer.Option(help="mid or tiny.")] = "mid",
    seed: Annotated[int, typer.Option(help="Of weights, data and training.")] = 0,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint; default: the student.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of `grace train`.")] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of `grace train`.")] = None,
    warm_up_steps: Annotated[int | None, typer.Option(help="Most steps on questions.")] = None,
    warm_up_lr: Annotated[float | None, typer.Option(help="Of the warm-up.")] = None,
    only_report: Annotated[
        Path | None, typer.Option("--report", help="Folder of a result to write a report of.")
    ] = None,
) -> None:
    """Run the study, or what is left of it, and print its report."""
    if only_report is not None:
        print(report(only_report))
        return
    if out is None:
        raise typer.BadParameter("--out or --report must be given")
    if scale not in SCALES:
        raise typer.BadParameter(f"scale must be one of {', '.join(SCALES)}, got {scale}")
    chosen = SCALES[scale]
    changed = {"steps": warm_up_steps, "lr": warm_up_lr}
    recipe = replace(chosen.recipe, **{k: v for k, v in changed.items() if v is not None})
    given = {"max_steps": steps, "bits": bits, "learning_rate": learning_rate}
    options = {name: value for name, value in given.items() if value is not None}
    study(out, replace(chosen, recipe=recipe), seed=seed, teacher=teacher, **options)
    print((out / REPORT).read_text())
    print(f"written: {out / RESULT}")


if __name__ == "__main__":
    typer.run(main)
