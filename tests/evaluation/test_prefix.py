"""The token that begins a text without context is one that the model has."""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'eval' (pip install 'quatom[eval]')")

from quatom.errors import CalibrationError
from quatom.evaluation.harness_model import QuatomLM
from quatom.loading import load
from tests.checkpoint.models import write_model
from tests.cli.commands import SMALL
from tests.conftest import write_byte_tokenizer


def test_a_beginning_that_the_vocabulary_lacks_is_refused(tmp_path):
    write_model(tmp_path, SMALL | {"vocab_size": 258})
    write_byte_tokenizer(tmp_path)
    assert QuatomLM(load(tmp_path)).prefix_token_id == 256
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "<new>"}))
    with pytest.raises(
        CalibrationError, match=r"bos_token of .* gives token id 258, and the model"
    ):
        _ = QuatomLM(load(tmp_path)).prefix_token_id
