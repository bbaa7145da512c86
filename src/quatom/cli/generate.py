"""`quatom generate`: complete a prompt, streaming to the terminal."""

from typing import Annotated

import typer

from quatom.cli.options import DeviceOption


def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF or checkpoint.")],
    prompt: Annotated[
        str, typer.Option(help="Text to continue, or the user's message with --chat.")
    ],
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Largest number of tokens to generate.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, help="Temperature of sampling; 0 takes the most likely token every time."
        ),
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed that makes sampling reproducible.")] = None,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template.")] = False,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of activations: float32, bfloat16 or float16.")
    ] = None,
) -> None:
    """Generate text from a model or a packed checkpoint."""
    from quatom.engine.llm import LLM
    from quatom.engine.sampling import SamplingParams

    llm = LLM(model, device=device, dtype=dtype, max_num_seqs=1)
    if chat:
        token_ids = llm.encode_chat([{"role": "user", "content": prompt}])
    else:
        token_ids = llm.encode(prompt)
        typer.echo(prompt, nl=False)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    for text in llm.stream(token_ids, params):
        typer.echo(text, nl=False)
    typer.echo()
