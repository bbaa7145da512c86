"""`quatom agree`: hold one backend's choices of tokens against another's."""

from pathlib import Path
from typing import Annotated

import typer

from quatom.cli.options import DeviceOption


def agree(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")],
    choices: Annotated[Path, typer.Argument(help="File of recorded choices.")],
    record: Annotated[
        Path | None,
        typer.Option(help="Text file of prompts: record the choices after them."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="With --record: number of prompts.")] = 64,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="With --record: tokens per prompt.")
    ] = 128,
    num_tokens: Annotated[int, typer.Option(min=1, help="With --record: choices per prompt.")] = 64,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of activations: float32, bfloat16 or float16.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Result file to write or add to.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Model name in the result file; default: the folder's.")
    ] = None,
) -> None:
    """Record a model's greedy choices, or feed recorded ones to it and compare."""
    import torch

    from quatom.cli.common import check_output, print_table
    from quatom.engine.config import EngineConfig
    from quatom.evaluation.agreement import (
        Choices,
        agreement_entry,
        compare_choices,
        cut_prompts,
        record_choices,
    )
    from quatom.evaluation.results import add_results, read_results
    from quatom.loading import load
    from quatom.quantize.calibration_data import check_token_ids
    from quatom.quantize.text_files import read_text

    recorded = None if record is not None else Choices.read(choices)
    text = None if record is None else read_text(record)
    check_output(None if record is None else choices)
    if json is not None:
        read_results(json)
    loaded = load(model, device=device, dtype=dtype)
    if recorded is None:
        assert text is not None
        tokens = loaded.require_tokenizer().encode(text, add_special_tokens=False)
        check_token_ids(torch.tensor(tokens), loaded.config.vocab_size, str(record))
        prompts = cut_prompts(tokens, num_prompts, prompt_tokens)
        config = EngineConfig(max_num_seqs=num_prompts, max_model_len=prompt_tokens + num_tokens)
        record_choices(loaded, prompts, num_tokens, config).save(choices)
        print(
            f"Recorded {num_prompts * num_tokens} choices of {loaded.recipe.name} on "
            f"{loaded.backend_name}, {num_tokens} after each of {num_prompts} prompts, in {choices}"
        )
        return
    recorded.check_tokens(loaded.config.vocab_size)
    longest = max(map(len, recorded.prompts)) + len(recorded.tokens[0])
    config = EngineConfig(
        max_num_seqs=len(recorded.prompts),
        max_model_len=longest,
        # Prompts known from the first time would run in pieces of other lengths the second time,
        # which other kernels multiply.
        prefix_caching=False,
    )
    measured = compare_choices(loaded, recorded, config)
    title = name or Path(model).resolve().name
    print_table(
        f"{title}, {loaded.recipe.name}: {loaded.backend_name} against {recorded.backend}",
        ("positions", "agree", "mean gap where not", "noise", "unexplained", "same twice"),
        [
            (
                str(measured.positions),
                f"{100 * measured.share:.2f} %",
                f"{measured.mean_gap:.3f}",
                f"{measured.noise:.3f}",
                str(measured.unexplained),
                "yes" if measured.repeatable else "no",
            )
        ],
    )
    if json is not None:
        add_results(json, [agreement_entry(loaded, recorded, measured, title)])
