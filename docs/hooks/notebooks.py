"""Every notebook becomes a page, and stays a file to download.

With FASTVAE_DOCS_EXECUTE=1, which `make docs` sets, the notebooks are run first, and the page shows their output.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

EXECUTE = os.environ.get("FASTVAE_DOCS_EXECUTE") == "1"


def on_files(files: Files, *, config: Any) -> Files:
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            for page in pages(file, config):
                files.append(page)
    return files


def pages(notebook: File, config: Any) -> list[File]:
    """The notebook as Markdown, and the pictures that it drew."""
    source = Path(notebook.abs_src_path)
    cells = nbformat.read(source, as_version=4)
    if EXECUTE:
        NotebookClient(cells, timeout=300, kernel_name="python3").execute()
    name = notebook.src_uri.removesuffix(".ipynb")
    body, resources = MarkdownExporter().from_notebook_node(
        cells, {"unique_key": source.stem, "output_files_dir": f"{source.stem}-files"}
    )
    download = f"\n[Download this notebook]({source.name})\n"
    heading, _, rest = body.partition("\n")
    made = [File.generated(config, f"{name}.md", content=f"{heading}\n{download}{rest}")]
    folder = Path(notebook.src_uri).parent
    for picture, data in resources["outputs"].items():
        made.append(File.generated(config, (folder / picture).as_posix(), content=data))
    return made
