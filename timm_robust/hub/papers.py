"""BibTeX citations for models, objectives and AutoAttack, from papers.bib."""
import re
from functools import cache
from pathlib import Path
from typing import Dict, List

__all__ = ['citations']

_OF_OBJECTIVE = {
    'nofrost': ('wang2022removing',),
    'nofrost_star': ('wang2022removing',),
    'sat': ('madry2018towards',),
    'madry': ('madry2018towards',),
    'trades': ('zhang2019theoretically',),
    'fat': ('zhang2020attacks',),
    'trades_fat': ('zhang2019theoretically', 'zhang2020attacks'),
    'mbnat': ('xie2020intriguing',),
    'apart': ('apart2022',),
}
_OF_MODEL = {'nofrost': ('wang2022removing', 'brock2021characterizing'), 'robustnorm': ('awais2020towards',)}


@cache
def _entries() -> Dict[str, str]:
    """Entries of papers.bib by key, verbatim: each begins with '@' and ends with a line '}'."""
    text = Path(__file__).with_name('papers.bib').read_text(encoding='utf-8')
    return {m[1]: m[0] for m in re.finditer(r'^@\w+\{([^,]+),\n.*?^\}$', text, flags=re.M | re.S)}


def citations(model: str, objective: str, autoattack: bool) -> List[str]:
    """BibTeX entries for a model trained with an objective.

    Args:
        model: Name of the architecture.
        objective: Name of the objective, '' if unknown.
        autoattack: Whether AutoAttack was run.
    """
    family = next((keys for name, keys in _OF_MODEL.items() if model.startswith(name)), ())
    keys = [*family, *_OF_OBJECTIVE.get(objective, ()), *(['croce2020reliable'] if autoattack else []), 'rw2019timm']
    return [_entries()[key] for key in dict.fromkeys(keys)]
