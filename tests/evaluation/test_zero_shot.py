"""Zero-shot: our adapter against the harness's own, its cache, and errors that name the remedy."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra 'eval' (pip install 'quatom[eval]')")

from lm_eval.api.instance import Instance

from quatom.errors import ArgumentError, CalibrationError, CheckpointError, ModelError, RequestError
from quatom.evaluation.harness_model import QuatomLM
from quatom.evaluation.harness_tasks import TASKS, load_tasks, quiet
from quatom.evaluation.request_cache import RequestCache, model_key
from quatom.evaluation.zero_shot import evaluate_tasks
from quatom.loading import load
from tests.conftest import SHARED_DATA
from tests.evaluation.task_rows import ROWS, write_task_rows
from tests.families.models import save_tiny, tiny_model


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    return write_task_rows(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def loaded(tiny_llama_dir):
    return load(tiny_llama_dir)


# lm-eval 0.4.13 reuses logits for requests of equal tokens but another split, and then scores the
# wrong ones (-93.7 instead of the -78.6 that it gives for the request alone): without that cache.
HARNESS = {"batch_size": 3, "device": "cpu", "logits_cache": False}


@pytest.fixture(scope="module")
def harness_model(tiny_llama_dir):
    """The harness's own Hugging Face adapter on the same float32 weights."""
    pytest.importorskip("accelerate", reason="the harness's Hugging Face adapter imports it")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return HFLM(pretrained=model, tokenizer=tokenizer, **HARNESS)


def requests_of(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


# Both sum in float32, in another order. On this model, whose planted outlier channels make rounding
# errors large, the harness's own float32 answers differ from its float64 ones by up to 1.3e-4 nats
# a token; ours differ from its float32 ones by 1e-5. A wrong target, shift or mask costs nats.
PER_TOKEN = 2**-13

PAIRS = [
    ("Question: why?\nAnswer:", " because"),
    ("Question: why?\nAnswer:", " no"),
    ("Question: why?\nAnswer:", " b"),  # shares its input with nothing
    ("Question: why? ", "trailing spaces of the context move"),
    ("", "no context at all"),
    ("<s>begins with the beginning of text", " x"),
    ("umlauts äöü", " and 漢字"),
    ("x" * 700, " left end is cut off"),
    ("same", "A"),
    ("same", "B"),
    ("A question of more than one block of the cache, forty tokens:", " first choice"),
    ("A question of more than one block of the cache, forty tokens:", " second choice"),
    ("A question of more than one block of the cache, forty tokens:", " second"),
    ("A question of more than one block", " of the cache, forty tokens: second"),
]


def test_loglikelihoods_equal_those_of_the_harness(loaded, harness_model):
    requests = requests_of("loglikelihood", *PAIRS)
    got = QuatomLM(loaded, batch_tokens=100, progress=False).loglikelihood(requests)
    want = harness_model.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    for (ours, _), (theirs, _), (_, text) in zip(got, want, PAIRS, strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=PER_TOKEN * (len(text.encode()) + 1))


def test_the_one_greedy_token_of_all_is_recognized(loaded, harness_model):
    requests = [(None, [79, 110, 99], [token]) for token in range(320)]
    got = QuatomLM(loaded, progress=False)._loglikelihood_tokens(requests)
    want = harness_model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    (best,) = (i for i, (_, greedy) in enumerate(got) if greedy)

    requests = [(None, [79, 110, 99], [best, token]) for token in range(320)]
    got = QuatomLM(loaded, progress=False)._loglikelihood_tokens(requests)
    want = harness_model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert sum(greedy for _, greedy in got) == 1


def test_a_tokenizer_that_begins_texts_itself_does_so_once(loaded, harness_model):
    from copy import deepcopy
    from dataclasses import replace

    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(loaded.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    theirs = HFLM(pretrained=harness_model.model, tokenizer=tokenizer, **HARNESS)
    ours = QuatomLM(replace(loaded, tokenizer=tokenizer), progress=False)
    for text, begins in (("a", 1), ("<s>a", 1), ("<s><s>a", 2)):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text).count(256) == begins
    requests = requests_of("loglikelihood", *PAIRS)
    got, want = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    for (ours_, _), (theirs_, _), (_, text) in zip(got, want, PAIRS, strict=True):
        assert ours_ == pytest.approx(theirs_, rel=0, abs=PER_TOKEN * (len(text.encode()) + 1))


def test_longrope_has_its_short_factors_for_short_requests(tmp_path):
    """The model's 128 positions go beyond the 64 of its pre-training; these requests do not."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    loaded = load(save_tiny(tmp_path, "phi3-longrope"))
    model, tokenizer = tiny_model("phi3-longrope"), AutoTokenizer.from_pretrained(tmp_path)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, **HARNESS)
    pairs = [("The first few words", " of it"), ("And", " others that are longer than it is.")]
    got = QuatomLM(loaded, progress=False).loglikelihood(requests_of("loglikelihood", *pairs))
    want = harness.loglikelihood(requests_of("loglikelihood", *pairs))
    for (ours, _), (theirs, _), pair in zip(got, want, pairs, strict=True):
        assert ours == pytest.approx(theirs, abs=PER_TOKEN * len(pair[1]))


@pytest.mark.parametrize("text", ["A short text.", "A long text. " * 60])
def test_rolling_loglikelihoods_equal_those_of_the_harness(loaded, harness_model, text):
    """The second one is longer than the model: 780 tokens in windows of 512."""
    requests = requests_of("loglikelihood_rolling", (text,))
    (got,) = QuatomLM(loaded, progress=False).loglikelihood_rolling(requests)
    (want,) = harness_model.loglikelihood_rolling(requests, disable_tqdm=True)
    assert got == pytest.approx(want, rel=0, abs=PER_TOKEN * len(text))


def test_generated_text_equals_that_of_the_harness(loaded, harness_model):
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    short = options | {"max_gen_toks": 5}
    arguments = [("Once upon a time", options), ("The", options), ("A much longer one", short)]
    requests = requests_of("generate_until", *arguments)
    got = QuatomLM(loaded, progress=False).generate_until(requests)
    assert got == harness_model.generate_until(requests, disable_tqdm=True)
    assert all(got)


def test_generation_stops_before_a_stop_string(loaded):
    model = QuatomLM(loaded, progress=False)
    ask = {"until": [], "max_gen_toks": 12}
    (whole,) = model.generate_until(requests_of("generate_until", ("Once", ask)))
    stop = whole[4:6]
    (cut,) = model.generate_until(requests_of("generate_until", ("Once", ask | {"until": stop})))
    assert cut == whole.split(stop)[0]


def test_metrics_of_every_task_equal_those_of_the_harness(loaded, harness_model, task_dir):
    from lm_eval.evaluator import evaluate

    entries = evaluate_tasks(loaded, list(TASKS), data_dir=task_dir, progress=False)
    with quiet():
        theirs = evaluate(
            harness_model,
            {"tasks": load_tasks(list(TASKS), task_dir), "groups": {}},
            bootstrap_iters=0,
            log_samples=False,
        )["results"]
    assert {entry["task"] for entry in entries} == set(TASKS)
    for entry in entries:
        metric = entry["metric"]
        want = theirs[entry["task"]][metric if "," in metric else f"{metric},none"]
        # Accuracies are counts; LAMBADA's perplexity is exp of a mean of at most 6 tokens' loss.
        assert entry["value"] == pytest.approx(want, rel=6 * PER_TOKEN), entry
        assert entry["examples"] == len(next(v for k, v in ROWS.items() if entry["task"] in k))
        assert entry["all_examples"]


def test_entries_have_the_harness_metrics_and_count_what_was_run(loaded, task_dir):
    entries = evaluate_tasks(
        loaded,
        ["boolq", "hellaswag"],
        data_dir=task_dir,
        limit=2,
        model_name="tiny",
        progress=False,
    )
    assert [(e["task"], e["metric"], e["examples"], e["all_examples"]) for e in entries] == [
        ("boolq", "acc", 2, False),
        ("hellaswag", "acc", 2, True),
        ("hellaswag", "acc_norm", 2, True),
    ]
    assert {(e["model"], e["recipe"], e["num_fewshot"]) for e in entries} == {("tiny", "fp16", 0)}
    # Two examples of which one is right differ by 1/2 from their mean: 1/2 of standard error.
    errors = {0.0: 0.0, 0.5: 0.5, 1.0: 0.0}
    assert all(e["standard_error"] == errors[e["value"]] for e in entries)


class CountingModel:
    """Counts forward passes, and may fail at one."""

    def __init__(self, model, fail_at=None):
        self.model, self.fail_at, self.calls = model, fail_at, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.model(*args)

    def __getattr__(self, name):
        return getattr(self.model, name)


def counting(loaded, **options):
    from dataclasses import replace

    return replace(loaded, model=CountingModel(loaded.model, **options))


def run_with(loaded, folder, pairs=PAIRS):
    cache = RequestCache(folder, model_key(loaded))
    try:
        model = QuatomLM(loaded, batch_tokens=64, cache=cache, progress=False)
        return model.loglikelihood(requests_of("loglikelihood", *pairs))
    finally:
        cache.close()


def assert_same(answers, want):
    """Requests that are asked again share their batch with others than before.

    A CPU may then add up a product of floats in another order. Each logit moves by some units of
    2^-24 of its terms; their sums here are below 1000.
    """
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in want]
    sums, wanted = (torch.tensor([x for x, _ in rows]) for rows in (answers, want))
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=0.0)


def test_an_interrupted_run_goes_on_and_gives_the_same_answers(loaded, tmp_path):
    fresh = counting(loaded)
    want = run_with(fresh, tmp_path / "fresh")
    with pytest.raises(KeyboardInterrupt):
        run_with(counting(loaded, fail_at=3), tmp_path)
    rest = counting(loaded)
    assert_same(run_with(rest, tmp_path), want)
    assert rest.model.calls == fresh.model.calls - 2
    again = counting(loaded)
    assert run_with(again, tmp_path) == want
    assert again.model.calls == 0


def test_a_line_cut_off_by_a_kill_is_asked_again(loaded, tmp_path):
    want = run_with(loaded, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    for calls in (1, 0):  # the rest of the cut line is gone, or the second run could not read it
        again = counting(loaded)
        assert_same(run_with(again, tmp_path), want)
        assert again.model.calls == calls


def test_answers_are_kept_apart_by_model_recipe_and_dtype(loaded, tmp_path, tiny_qwen2_dir):
    from dataclasses import replace

    from quatom.presets import PRESETS

    others = [
        load(tiny_qwen2_dir),
        replace(loaded, plan=replace(loaded.plan, recipe=PRESETS["w8a8"])),
        replace(loaded, dtype=torch.bfloat16),
    ]
    assert len({model_key(model) for model in (loaded, *others)}) == 4


def test_generated_text_is_kept_with_its_options(loaded, tmp_path):
    cache = RequestCache(tmp_path, "key")
    first = counting(loaded)
    long = ("Once", {"until": [], "max_gen_toks": 6})
    ask = requests_of("generate_until", long, ("Once", {"until": [], "max_gen_toks": 2}))
    got = QuatomLM(first, cache=cache, progress=False).generate_until(ask)
    assert got[0].startswith(got[1])
    assert got[0] != got[1]
    cache.close()
    again = counting(loaded)
    cache = RequestCache(tmp_path, "key")
    assert QuatomLM(again, cache=cache, progress=False).generate_until(ask) == got
    assert again.model.calls == 0


@pytest.mark.parametrize("damage", ["not json\n", '{"format": 0, "model": "key"}\n'])
def test_a_damaged_cache_is_refused(tmp_path, damage):
    RequestCache(tmp_path, "key").close()
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    with pytest.raises(CheckpointError, match="delete it"):
        RequestCache(tmp_path, "key")


def test_one_pass_serves_answers_with_the_same_input(loaded):
    model = counting(loaded)
    adapter = QuatomLM(model, batch_tokens=1, progress=False)
    adapter.loglikelihood(requests_of("loglikelihood", ("same", "A"), ("same", "B")))
    assert model.model.calls == 1


def test_an_unknown_task_is_named(loaded, task_dir):
    with pytest.raises(CalibrationError, match=r"'pica' cannot run .* piqa, arc_easy"):
        evaluate_tasks(loaded, ["piqa", "pica"], data_dir=task_dir, progress=False)


@pytest.mark.slow
def test_a_task_unknown_to_the_harness_is_named(loaded):
    with pytest.raises(CalibrationError, match=r"no task 'pica': `lm-eval ls tasks`"):
        evaluate_tasks(loaded, ["pica"], progress=False)


def test_a_missing_file_is_named_with_the_remedy(loaded, tmp_path):
    match = r"hellaswag.validation\.jsonl does not exist: put the rows of hellaswag's validation"
    with pytest.raises(CalibrationError, match=match):
        evaluate_tasks(loaded, ["hellaswag"], data_dir=tmp_path, progress=False)


def test_offline_without_data_the_error_names_data_dir(loaded, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CalibrationError, match=r"Couldn't reach the Hub; offline, .* --data-dir"):
        evaluate_tasks(loaded, ["piqa"], progress=False)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"goal": "x", "sol1": "y"}', r"validation\.jsonl:1 has no field 'sol2'"),
        ("[1]", r"validation\.jsonl:1 is no row of piqa"),
        ("", "is empty"),
    ],
)
def test_a_damaged_row_is_named_with_its_line(loaded, tmp_path, line, match):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(line + "\n")
    with pytest.raises(CalibrationError, match=match):
        evaluate_tasks(loaded, ["piqa"], data_dir=tmp_path, progress=False)


def test_a_limit_below_one_is_refused(loaded, task_dir):
    with pytest.raises(ArgumentError, match="limit must be at least 1, got 0"):
        evaluate_tasks(loaded, ["piqa"], data_dir=task_dir, limit=0)


def test_a_model_without_a_tokenizer_is_refused(loaded):
    from dataclasses import replace

    with pytest.raises(ModelError, match=r"put tokenizer\.json"):
        QuatomLM(replace(loaded, tokenizer=None))


def test_a_sampling_task_is_refused(loaded):
    requests = requests_of("generate_until", ("x", {"do_sample": True, "temperature": 0.7}))
    with pytest.raises(RequestError, match="greedily only"):
        QuatomLM(loaded, progress=False).generate_until(requests)


def test_an_answer_longer_than_the_model_is_refused(loaded):
    requests = requests_of("loglikelihood", ("x", "y" * 600))
    with pytest.raises(RequestError, match="600 tokens cannot be scored by a model of 512"):
        QuatomLM(loaded, progress=False).loglikelihood(requests)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
def test_the_published_files_have_the_official_counts():
    counts = {name: len(task.eval_docs) for name, task in load_tasks(TASKS, SHARED_DATA).items()}
    assert counts == {
        "piqa": 1838,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "boolq": 3270,
        "hellaswag": 10042,
        "winogrande": 1267,
        "lambada_openai": 5153,
    }


def test_rows_of_the_fixtures_reach_the_prompts(task_dir):
    """The definitions are the harness's: prompts as its documentation shows them."""
    tasks = load_tasks(["arc_easy", "boolq", "winogrande"], task_dir)
    first = {name: next(iter(task.eval_docs)) for name, task in tasks.items()}
    assert tasks["arc_easy"].doc_to_text(first["arc_easy"]) == (
        "Question: Which of these is hot?\nAnswer:"
    )
    assert tasks["arc_easy"].doc_to_target(first["arc_easy"]) == 1
    assert tasks["boolq"].doc_to_target(first["boolq"]) == 0
    assert tasks["winogrande"].doc_to_choice(first["winogrande"])[1].endswith("because the box")


@pytest.fixture
def without_ends(tiny_llama_dir, tmp_path):
    """A model whose tokenizer names no token that begins or ends a text."""
    import json
    import shutil

    folder = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        settings.pop(name)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load(folder)


def test_without_bos_and_eos_only_texts_without_context_are_refused(loaded, without_ends):
    pair = requests_of("loglikelihood", ("Question: why?\nAnswer:", " because"))
    model = QuatomLM(without_ends, progress=False)
    assert model.loglikelihood(pair) == QuatomLM(loaded, progress=False).loglikelihood(pair)
    generated = requests_of("generate_until", ("a", {"until": ["\n"], "max_gen_toks": 4}))
    assert len(model.generate_until(generated)) == 1
    alone = requests_of("loglikelihood", ("", "no context at all"))
    with pytest.raises(ModelError, match=r"neither bos_token nor eos_token") as caught:
        model.loglikelihood(alone)
    assert "\n" not in str(caught.value)


def test_tokens_and_values_that_are_none_are_refused(tiny_llama_dir):
    from dataclasses import replace

    loaded = load(tiny_llama_dir)
    config = replace(loaded.config, vocab_size=256)
    fewer = replace(loaded, plan=replace(loaded.plan, config=config))
    requests = requests_of("loglikelihood", ("a", " b</s>"))
    with pytest.raises(CalibrationError, match=r"token id 257, and the model has 256 tokens"):
        QuatomLM(fewer, progress=False).loglikelihood(requests)
    with torch.no_grad():
        for parameter in [*loaded.model.parameters(), *loaded.model.buffers()]:
            parameter.mul_(torch.nan) if parameter.is_floating_point() else None
    with pytest.raises(ModelError, match=r"log-probabilities that are not finite"):
        QuatomLM(loaded, progress=False).loglikelihood(requests)


def test_solved_examples_stand_before_a_question(task_dir):
    (task,) = load_tasks(["gsm8k"], task_dir).values()
    assert task.get_config("num_fewshot") == 5
    shown = task.fewshot_context(task.test_docs()[0], 5)
    assert shown.count("Question: One and") == 5
    assert shown.endswith("Question: Two and two apples?\nAnswer:")
