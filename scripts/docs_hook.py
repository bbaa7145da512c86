"""What mkdocs does beside its configuration: pictures of benchmarks/results belong to the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures, which pages link to outside of docs/."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to the pictures at their copies in the site."""
    return re.sub(r"\]\(((?:\.\./)+)\.\./benchmarks/results/", r"](\1results/", markdown)
