"""Evaluation: accuracy under attack, diagnosis, benchmarks, properties; results in one report."""
from .accuracy import Runner, index_seeds
from .config import EvalConfig, ThreatConfig
from .diagnostics import diagnose
from .facts import DataFacts, Example, Finding, ModelFacts, RunFacts, ThreatFacts, versions
from .join import join_reports
from .journal import Journal
from .outcome import AttackOutcome, EpsPoint, GammaPoint, wilson_interval
from .plan import Plan, make_plan
from .report import EvaluationReport, accuracy_on_all_images, read_reports
from .run import evaluate
from .surface import LossSurface, loss_surface
from .transfer import TransferReport, transfer

__all__ = [
    'AttackOutcome',
    'DataFacts',
    'EpsPoint',
    'EvalConfig',
    'EvaluationReport',
    'Example',
    'Finding',
    'GammaPoint',
    'Journal',
    'LossSurface',
    'ModelFacts',
    'Plan',
    'RunFacts',
    'Runner',
    'ThreatConfig',
    'ThreatFacts',
    'TransferReport',
    'diagnose',
    'evaluate',
    'index_seeds',
    'join_reports',
    'loss_surface',
    'make_plan',
    'accuracy_on_all_images',
    'read_reports',
    'transfer',
    'versions',
    'wilson_interval',
]
