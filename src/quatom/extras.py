"""Packages that only some commands need, and the extra of this package that installs each."""

EXTRAS = {
    "serve": (
        "fastapi",
        "httpx",
        "uvicorn",
        "pydantic",
        "prometheus_client",
        "llguidance",
        "jsonschema_rs",
        "msgspec",
        "yaml",
        "zmq",
    ),
    "eval": ("lm_eval", "datasets"),
    "sentencepiece": ("sentencepiece", "google.protobuf"),
    "gpu": ("triton",),
}
"""Names under which the packages of an extra are imported."""


def how_to_install(module: str | None) -> str | None:
    """One line about a module that could not be imported; None if no extra installs it."""
    package = (module or "").split(".")[0]
    for extra, packages in EXTRAS.items():
        if package in {name.split(".")[0] for name in packages}:
            return f"this needs {package}, which is not installed: pip install 'quatom[{extra}]'"
    return None
