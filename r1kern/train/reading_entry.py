"""How a reward model reads, kept in its `config.json`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from r1kern.config import PreferenceData, RewardModel
from r1kern.data.reading import Reading
from r1kern.data.template import TEMPLATES
from r1kern.errors import UserError
from r1kern.hf.config import read_hf_config
from r1kern.hf.scalar_head import has_scalar_head

log = logging.getLogger(__name__)

ENTRY = "r1kern_reading"


def reading_entry(data: PreferenceData) -> dict:
    """The entry of a model that was trained on `data`."""
    return {ENTRY: {"template": data.template, "reads": data.reads}}


def read_reading(options: RewardModel) -> Reading:
    """How a model reads: its own template, and of a response what the options say.

    Raises:
        UserError: the folder is no reward model, or does not name its template.
    """
    folder = options.path
    hf = read_hf_config(folder)
    if not has_scalar_head(hf):
        raise UserError(
            f"{folder} is no reward model ({(hf.architectures or ['no architecture'])[0]}): train "
            f"one from it with `r1kern reward`"
        )
    path = Path(folder) / "config.json"
    entry = json.loads(path.read_text()).get(ENTRY)
    if not isinstance(entry, dict) or entry.get("template") not in TEMPLATES:
        raise UserError(
            f'{path} does not say how the model reads: add "{ENTRY}": {{"template": "chat"}} '
            f"(or {', '.join(t for t in TEMPLATES if t != 'chat')}), as it was trained"
        )
    if entry.get("reads", options.reads) != options.reads:
        log.info("%s was trained on the %s, it reads the %s", folder, entry["reads"], options.reads)
    return Reading(entry["template"], options.reads)
