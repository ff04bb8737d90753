"""YAML configs of the command line: read strictly, and saved next to the logs."""

from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning as L
import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import SaveConfigCallback


class _ConfigDumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes configs, including string enumerations such as a `Timer`'s default `interval`, which PyYAML's cannot."""


_ConfigDumper.add_multi_representer(str, yaml.SafeDumper.represent_str)
set_dumper("yaml", partial(yaml.dump, Dumper=_ConfigDumper, sort_keys=False, allow_unicode=True))


def _check_keys(node: yaml.Node | None) -> None:
    """Rejects a key that is given twice in a mapping; YAML would silently ignore the first.

    Raises:
        YAMLError: A key is given twice.
    """
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in keys[:number]:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
        parts = [value for _, value in node.value]
    for part in parts:
        _check_keys(part)


def _load_config(text: str) -> Any:
    """Reads YAML as jsonargparse does, but rejects repeated keys."""
    _check_keys(yaml.compose(text, yaml.SafeLoader))
    return _load_yaml(text)


_load_yaml = get_loader("yaml")
set_loader("yaml", _load_config, (yaml.YAMLError,))


class ConfigSaver(SaveConfigCallback):
    """Saves the config next to the logs, and never overwrites another one.

    If the file exists, Lightning's callback either replaces it or fails, and without a logger it writes to the working
    directory, where the user's own `config.yaml` may be. Here, a run without a logger saves no config. If another
    config has the name, for example that of `fit` in a folder that `test` logs to, the stage is added:
    `config-test.yaml`, then `config-test-v1.yaml` and so on, numbered like checkpoints.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Saves the config once per run."""
        if not trainer.loggers:
            return
        folder = trainer.log_dir  # on every rank: Lightning broadcasts it
        fn = trainer.state.fn
        assert folder is not None
        assert fn is not None
        if trainer.is_global_zero and not self.already_saved:
            name, saved = Path(self.config_filename), self.parser.dump(self.config, skip_none=False)
            fs = get_filesystem(folder)
            for ending in chain(["", f"-{fn.value}"], (f"-{fn.value}-v{number}" for number in count(1))):
                self.config_filename = f"{name.stem}{ending}{name.suffix}"
                path = f"{folder}/{self.config_filename}"
                if not fs.exists(path) or fs.cat_file(path).decode() == saved:  # a requeued run saves the same again
                    break
        super().setup(trainer, pl_module, stage)
