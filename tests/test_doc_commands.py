"""Every command, option and code block of README and docs exists; wrong ones are found."""

import pytest

from tests.doc_commands import ROOT, commands_of, problems

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRONG = {
    "an indented command": "\n    quatom quantize MODEL TARGET --no-such-option\n",
    "a fenced command": "```bash\nquatom quantise MODEL TARGET\n```\n",
    "a command over two lines": "```bash\nquatom eval MODEL \\\n    --perplexty a.txt\n```\n",
    "a command after a variable": "\n    CUDA_VISIBLE_DEVICES=0 quatom serve m --prt 1 &\n",
    "a command in a list": "- a\n\n        quatom plan MODEL --gpus H200\n",
    "a command in a table": "| a | `quatom waremup MODEL` |\n",
    "a command in a sentence": "Run `quatom serve --restart-motor` again.\n",
    "an option in a sentence": "Set `--max-num-sequences` to 8.\n",
    "an extra": "\n    pip install '.[server]'\n",
    "an extra in a sentence": "Install `pip install 'quatom[evals]'`.\n",
    "a target of make": "\n    make tests-gpu\n",
    "a module": "\n    python -m quatom.benchmark.tune_linears\n",
    "a script": "\n    python scripts/update_table.py\n",
    "a Dockerfile": "\n    docker build -f deploy/Dockerfile.gpu .\n",
    "a name of the library": "```python\nimport quatom\n\nquatom.LMM('a')\n```\n",
    "an import": "```python\nfrom quatom.integration import vllm\n```\n",
    "Python that is none": "```python\nllm = quatom.LLM('a'\n```\n",
    "a recipe": '```json\n{"base": "quatom-w4a8kv4", "weights": {"groups": 64}}\n```\n',
    "a configuration": "```yaml\nmodel: m\nmax-num-seq: 8\n```\n",
    "an endpoint": "\n    curl http://127.0.0.1:8000/v1/complete -d '{}'\n",
    "a body": "\n    curl http://127.0.0.1:8000/v1/completions -d '{\"model\": }'\n",
}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_and_code_of_a_page(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for words in commands_of(text):  # some commands look for their input while they parse
        for word in words:
            if word.endswith(".jsonl"):
                (tmp_path / word).touch()
    assert list(problems(text)) == []


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_one_is_found(kind):
    assert len(list(problems(WRONG[kind]))) == 1


def test_there_are_commands_in_the_docs():
    found = {words[0] for page in PAGES for words in commands_of(page.read_text("utf-8"))}
    assert found >= {"quantize", "eval", "serve", "generate", "plan", "report", "bench"}
