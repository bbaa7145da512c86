"""`quatom generate`: complete a prompt, streaming to the terminal."""

from typing import Annotated

import typer

from quatom.cli.options import DeviceOption


def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from, or the user's message.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token every time.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template.")] = False,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of activations: float32, bfloat16 or float16.")
    ] = None,
) -> None:
    """Generate text from a model or a packed checkpoint."""
    from quatom.checkpoint.chat import render_chat
    from quatom.cli.common import read_dtype
    from quatom.engine.llm import LLM
    from quatom.engine.sampling import SamplingParams
    from quatom.errors import ModelError

    llm = LLM(model, device=device, dtype=read_dtype(dtype), max_num_seqs=1)
    engine = llm.engine
    if chat:
        tokenizer = engine.tokenizer
        if tokenizer is None:
            raise ModelError(f"{model} has no tokenizer, and so no chat template: leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        token_ids = llm.encode(prompt)
        typer.echo(prompt, nl=False)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    engine.add(engine.make_request("generate", token_ids, params))
    while engine.has_work:
        for delta in engine.step():
            typer.echo(delta.text, nl=False)
    typer.echo()
