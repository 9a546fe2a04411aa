"""Memory of an evaluation: in proportion to a pool, however many images there are, and little beyond the attack's."""
import sys
from pathlib import Path

import pytest

from timm_robust.attacks import parse_attacks

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.memory import ATTACKS, measured  # noqa: E402


@pytest.mark.parametrize('threat, attack', [
    pytest.param(threat, attack, id=f'{threat} {attack}') for threat, names in ATTACKS.items()
    for attack in parse_attacks(names) if 'targeted' not in attack.name])
def test_memory_is_that_of_a_pool(threat, attack):
    def of(count, batch_size, alone=False):
        return measured(attack, threat, count, batch_size, 24, alone)

    one = of(16, 2)
    assert of(48, 2) == pytest.approx(one, rel=.03), 'three pools instead of one'
    assert of(32, 4) == pytest.approx(one, rel=.03), 'a pool of twice the size'
    assert one <= 1.2 * of(16, 2, alone=True)
