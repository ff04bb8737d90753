"""Pages of the site that stand elsewhere: the README as its home, files of the root, and the command line's options."""

from pathlib import Path

from cli_reference import cli_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}}
DOWNLOADS = ["LICENSE", "CITATION.cff", "notebooks/smart_batching.ipynb"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for path in DOWNLOADS:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "cli.md", content=cli_reference()))
    return files
