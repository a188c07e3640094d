"""grace's models as a model of lmms-eval: found by its registry, the answers those of our own."""

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import lmms_interface
import pytest
from packed_models import export_tiny
from PIL import Image

from grace.evaluation import mme, synthetic
from grace.evaluation.answer import answer
from grace.integrations import lmms
from grace.integrations.lmms import requests
from grace.nn import FusedLinear

GROUP = "lmms_eval.models"
GREEDY = {"max_new_tokens": 4, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False,
          "until": ["\n\n"]}  # fmt: skip
needs_lmms = pytest.mark.skipif(not lmms_interface.INSTALLED, reason="lmms-eval is not installed")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms") / "packed"
    export_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("lmms") / "mme"
    synthetic.draw(root, images_per_subtask=2, seed=3)
    return mme.load(root)


@pytest.fixture(autouse=True)
def _interface(monkeypatch):
    lmms_interface.provide(monkeypatch)


def registered():
    """The class that lmms-eval comes to, by the entry point of pyproject.toml."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (line,) = re.findall(rf'^\[project\.entry-points\."{GROUP}"\]\n(.*)$', text, re.M)
    name, value = re.fullmatch(r'(\w+) = "(.*)"', line).groups()
    manifest = importlib.metadata.EntryPoint(name, value, GROUP).load()()
    assert name == manifest.model_id == "grace"
    module, _, kind = manifest.chat_class_path.rpartition(".")
    return getattr(importlib.import_module(module), kind)


def made(folder, **more):
    given = {"batch_size": "5", "device": "cpu", "max_batch_size": None, **more}
    return registered().create_from_arg_string(f"pretrained={folder},dtype=float32", given)


def asked(model, rows, *generation):
    """Requests about rows as lmms-eval makes them; generation arguments by turns."""
    model.task_dict["mme"] = {"test": rows}

    def messages(row):
        content = [{"type": "image", "url": Image.open(row.image)}]
        content.append({"type": "text", "text": row.question})
        return [{"role": "user", "content": content}]

    return [
        SimpleNamespace(args=(row.question, messages, generation[n % len(generation)],
                              n, "mme", "test"))
        for n, row in enumerate(rows)
    ]  # fmt: skip


def test_registry_finds_a_chat_model():
    from lmms_eval.api.model import lmms as base

    kind = registered()
    assert issubclass(kind, base)
    assert kind.is_simple is False
    assert lmms.manifest().simple_class_path is None


@needs_lmms
def test_lmms_eval_itself_loads_the_entry_point(monkeypatch):
    from lmms_eval.models import registry_v2

    registry, value = registry_v2.ModelRegistryV2(), f"{lmms.__name__}:manifest"
    found = importlib.metadata.EntryPoints([importlib.metadata.EntryPoint("grace", value, GROUP)])
    monkeypatch.setattr(registry_v2, "entry_points", lambda: found)
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("grace") is registered()


@pytest.mark.parametrize("graphs", [True, False])
def test_answers_are_those_of_grace_evaluate(packed, rows, graphs):
    model = made(packed, graphs=graphs)
    assert any(isinstance(module, FusedLinear) for module in model.model.modules())
    told = model.generate_until(asked(model, rows, GREEDY))
    own = answer(model.model, model.processor, rows, batch_size=5, max_new_tokens=4, progress=False)
    assert [result.text.strip() for result in told] == own
    assert len(set(own)) > 1
    assert (model._decoder._generator is not None) == graphs
    scores = [mme.score(mme.answered(rows, said)) for said in (own, [r.text for r in told])]
    assert scores[0] == scores[1]


def test_tokens_are_counted(packed, rows):
    model = made(packed)
    for result, row in zip(model.generate_until(asked(model, rows, GREEDY)), rows, strict=True):
        turn = [{"role": "user", "content": [{"type": "image"},
                                             {"type": "text", "text": row.question}]}]  # fmt: skip
        text = model.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        with Image.open(row.image) as image:
            alone = model.processor(text=[text], images=[image.convert("RGB")])
        assert result.token_counts.input_tokens == len(alone["input_ids"][0])
        words = len(result.text.split())  # the tiny tokenizer's tokens are words
        assert result.token_counts.output_tokens == min(words + 1, 4)  # and the end
    assert requests.new_tokens([5, 2, 0, 2], [2]) == 2
    assert requests.new_tokens([5, 6], [2]) == 2


def test_requests_of_several_kinds_keep_their_order(packed, rows):
    model = made(packed)
    one, two = {**GREEDY, "max_new_tokens": 1}, {**GREEDY, "until": ["zzz"]}
    model.task_dict["mme"] = {"test": rows}
    mixed = model.generate_until(asked(model, rows, one, two))
    for kind, first in ((one, 0), (two, 1)):
        alone = model.generate_until(asked(model, rows, kind))
        assert [r.text for r in mixed[first::2]] == [r.text for r in alone[first::2]]
    assert all(result.token_counts.output_tokens == 1 for result in mixed[::2])


def test_text_alone_and_several_pictures(packed):
    model = made(packed)
    picture = Image.new("L", (40, 30), 200)
    documents = [[], [picture, picture], [picture]]
    model.task_dict["t"] = {"s": documents}

    def messages(pictures):
        content = [{"type": "image", "url": one} for one in pictures]
        content.append({"type": "text", "text": "Is it red ?"})
        return [{"role": "system", "content": "Be brief"}, {"role": "user", "content": content}]

    given = [SimpleNamespace(args=("Is it red ?", messages, GREEDY, n, "t", "s")) for n in range(3)]
    counts = [result.token_counts.input_tokens for result in model.generate_until(given)]
    per_picture = counts[2] - counts[0]
    assert per_picture > 9
    assert counts[1] - counts[0] == 2 * per_picture
    (alone,) = model.generate_until(given[:1])  # a batch without a picture
    assert alone.token_counts.input_tokens == counts[0]


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        (GREEDY, {"max_new_tokens": 4, "num_beams": 1, "do_sample": False}),
        (None, {"max_new_tokens": 99, "do_sample": False}),
        ({"max_gen_toks": 7, "temperature": 0.7}, {"max_new_tokens": 7, "do_sample": True,
                                                   "temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False}, {"max_new_tokens": 99, "do_sample": False}),
        ({"temperature": 0, "do_sample": True}, {"max_new_tokens": 99, "do_sample": False}),
        ({"do_sample": True, "top_p": None, "top_k": 5}, {"max_new_tokens": 99, "do_sample": True,
                                                          "top_k": 5}),
        ({"image_aspect_ratio": "pad"}, {"max_new_tokens": 99, "do_sample": False}),
        ({"repetition_penalty": 1.2}, {"max_new_tokens": 99, "do_sample": False,
                                       "repetition_penalty": 1.2}),
    ],
)  # fmt: skip
def test_generation_arguments(asked, options, caplog):
    assert requests.options_of(asked, 99) == options
    logged = [record.getMessage() for record in caplog.records]
    assert logged == ["lmms: not heeded in generation_kwargs: image_aspect_ratio"] * (
        "image_aspect_ratio" in (asked or {})
    )


def test_where_an_answer_ends():
    assert requests.ends_of({"until": ["\n\n", "</s>", ""]}) == ("</s>",)
    assert requests.ends_of({"until": "Q:"}) == ("Q:",)
    assert requests.ends_of({"until": None}) == requests.ends_of(None) == ()
    assert requests.cut("Yes\nQ: no A: yes", ("A:", "Q:")) == "Yes\n"
    assert requests.cut("Yes", ("Q:",)) == "Yes"


def test_an_answer_is_cut_at_the_end_that_a_task_names(packed, rows):
    model = made(packed)
    whole = model.generate_until(asked(model, rows[:4], GREEDY))
    letter = whole[0].text.strip()[1]
    found = model.generate_until(asked(model, rows[:4], {**GREEDY, "until": [letter]}))
    assert [result.text for result in found] == [r.text.split(letter)[0] for r in whole]
    assert found[0].text != whole[0].text


def test_what_it_does_not_do_is_told(packed, rows, tmp_path):
    model = made(packed)
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(ValueError, match="lmms: content must be text or images, got video"):
        requests.conversation(video)
    with pytest.raises(ValueError, match="max_new_tokens must be a number of at least 1, got 0"):
        requests.options_of({"max_new_tokens": 0}, 9)
    with pytest.raises(NotImplementedError, match="must generate answers"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])
    with pytest.raises(ValueError, match="batch_size must be a number of at least 1, got 'auto'"):
        made(packed, batch_size="auto")
    with pytest.raises(ValueError, match="dtype must be one of"):
        registered()(str(packed), dtype="int8")
    with pytest.raises(OSError, match="absent must be a directory"):
        made(tmp_path / "absent")


def test_the_model_is_let_go(packed):
    import gc
    import weakref

    model = made(packed)
    network = weakref.ref(model.model)
    model.clean()
    gc.collect()
    assert network() is None


TASK = """
task: grace_drawn
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function shim.mme_doc_to_visual
doc_to_text: !function shim.mme_doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
process_results: !function shim.mme_process_results
metric_list:
  - {{metric: mme_perception_score, aggregation: !function shim.mme_aggregate_results,
     higher_is_better: true}}
  - {{metric: mme_cognition_score, aggregation: !function shim.mme_aggregate_results,
     higher_is_better: true}}
lmms_eval_specific_kwargs:
  default: {{pre_prompt: "", post_prompt: "\\nAnswer the question using a single word or phrase."}}
"""


def as_dataset(rows, file):
    import datasets

    columns = {
        "question_id": [f"{row.subtask}/{row.image.name}" for row in rows],
        "image": [str(row.image) for row in rows],
        "question": [row.question for row in rows],
        "answer": [row.answer for row in rows],
        "category": [row.subtask for row in rows],
    }
    kept = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    kept.to_parquet(file)


@needs_lmms
def test_lmms_eval_runs_a_task_and_scores_as_we_do(packed, rows, tmp_path, monkeypatch):
    """The whole of lmms-eval: its registry, its task, its scores, on a drawn benchmark."""
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    MODEL_REGISTRY_V2.register_manifest(lmms.manifest(), overwrite=True)
    as_dataset(rows, tmp_path / "data.parquet")
    (tmp_path / "shim.py").write_text("from lmms_eval.tasks.mme.utils import *\n")
    (tmp_path / "drawn.yaml").write_text(TASK.format(data=tmp_path / "data.parquet"))
    tasks = TaskManager(include_path=str(tmp_path), model_name="grace")
    found = evaluator.simple_evaluate(
        model="grace", model_args=f"pretrained={packed},dtype=float32", tasks=["grace_drawn"],
        batch_size=5, device="cpu", task_manager=tasks, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    told = found["results"]["grace_drawn"]
    model = made(packed)
    own = answer(model.model, model.processor, rows, batch_size=5, max_new_tokens=4,
                 prompt=lambda question: mme.prompt(question, "llava"), progress=False)  # fmt: skip
    scores = mme.score(mme.answered(rows, own))
    assert told["mme_perception_score,none"] == pytest.approx(scores["perception"], rel=1e-12)
    assert told["mme_cognition_score,none"] == pytest.approx(scores["cognition"], rel=1e-12)
    assert scores["total"] > 0
    samples = sorted(found["samples"]["grace_drawn"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0].strip() for sample in samples] == own
