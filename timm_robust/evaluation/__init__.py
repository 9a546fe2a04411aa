from .accuracy import evaluate_attacks
from .diagnostics import diagnose
from .examples import example_images
from .facts import DataFacts, Example, Finding, ModelFacts, RunFacts, ThreatFacts, versions
from .join import join_reports
from .journal import Journal
from .outcome import AttackSpec, plan_attacks
from .report import AttackOutcome, EvaluationReport, read_reports, wilson_interval
from .surface import LossSurface, loss_surface

__all__ = [
    'AttackOutcome',
    'AttackSpec',
    'DataFacts',
    'EvaluationReport',
    'Example',
    'Finding',
    'Journal',
    'LossSurface',
    'ModelFacts',
    'RunFacts',
    'ThreatFacts',
    'diagnose',
    'evaluate_attacks',
    'example_images',
    'join_reports',
    'loss_surface',
    'plan_attacks',
    'read_reports',
    'versions',
    'wilson_interval',
]
