"""The stages of an evaluation: attacks and benchmarks, saved at once, then sweeps, example images and diagnosis."""
import hashlib
import logging
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch

from ..attacks import AutoAttack, Clean, FastModel, logits_of, make_fast_model
from ..devices import halving
from ..errors import InputError
from ..inputs import ImagesConfig, Peers
from ..layers import at_gamma, has_batch_statistics
from .accuracy import Runner, assemble
from .benchmarks import Benchmarks
from .config import DTYPES, EvalConfig
from .diagnostics import diagnose
from .examples import example_images
from .facts import DataFacts, RunFacts, versions
from .journal import FolderLock, Journal
from .outcome import AttackOutcome, EpsPoint, GammaPoint
from .plan import Plan, threat_facts
from .probes import Probe
from .report import RESULTS, EvaluationReport
from .sources import Source, open_data
from .subject import Subject, network_sha256, open_model, open_surrogate, without_addresses
from .surface import loss_surface

__all__ = ['GAMMAS', 'Stages']

GAMMAS = tuple(i / 10 for i in range(11))

_NUM_DIAGNOSED = 100
_NOT_RANDOMIZED = (
    'Two passes of this network agree, so it is not randomized: autoattack-rand is weaker than autoattack here.')

_logger = logging.getLogger(__name__)


def _network_sha256(subject: Subject) -> str:
    """Hash of everything known of a network that determines outcomes."""
    text = f'{network_sha256(subject.model)} {subject.facts.bn_mode} {subject.facts.gamma}'
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Stages:
    """One evaluation.

    Args:
        config: Settings.
        peers: The processes that share the images.
        model, data: As passed to `evaluate`.
        images: Fields of `ImagesConfig` that were passed to `evaluate`.
        checkpoint, device: Checkpoint and device of the network.
    """

    def __init__(
            self,
            config: EvalConfig,
            peers: Peers,
            model: Any,
            data: Any,
            images: Mapping[str, Any],
            checkpoint: str = '',
            device: Optional[str] = None,
    ):
        self.config, self.peers, self.plan, self.plans = config, peers, config.plan, config.plans
        output = peers.broadcast(config.output)
        self.folder = Path(output) if output else None
        if self.folder is not None:
            _refuse_unfit(self.folder, config.resume)
        self.subject = subject = open_model(
            model, checkpoint=checkpoint, device=device, main_branch=config.gamma_sweep)
        self.batch_dependent = has_batch_statistics(subject.model)
        self.probes: List[Probe] = []
        known = subject.facts.num_classes
        if self.plan and known:
            self._check_plan(known)  # before opening the data
        self.benchmarks = self._open_benchmarks(data, images) if config.benchmarks else None
        self.source: Optional[Source] = open_data(data, subject, seed=config.seed, **images) if self.plan else None
        self.surrogate = open_surrogate(config.surrogate, subject, config.surrogate_checkpoint)
        self.num_classes = known or self._count_classes(subject)
        if self.surrogate and self._count_classes(self.surrogate) != self.num_classes:
            raise InputError(f'has a different number of classes from the model, which has {self.num_classes}',
                             argument='surrogate', value=self.surrogate.facts.name)
        self.batch_size = self.source.batch_size if self.source else 0  # halved when memory runs out
        if self.plan:
            self._check_plan(self.num_classes)
        self.subject.facts = replace(subject.facts, num_classes=self.num_classes)

    def _check_plan(self, num_classes: int) -> None:
        for plan in self.plans:
            plan.check(num_classes, self.batch_dependent, bool(self.config.surrogate))

    def _count_classes(self, subject: Subject) -> int:
        x, _ = self._first(2)
        logits, _ = halving(lambda size: logits_of(subject.model, x[:size]), len(x))
        return logits.shape[1]

    def _open_benchmarks(self, data: Any, images: Mapping[str, Any]) -> Benchmarks:
        if self.subject.network is None:
            raise InputError('need a timm model, whose preprocessing is known', argument='benchmarks',
                             value=self.config.benchmarks)
        if not isinstance(data, ImagesConfig):
            if not (data is None or isinstance(data, (str, Path))):
                raise InputError('read images from folders', 'pass the folder as `data`', argument='benchmarks',
                                 value=self.config.benchmarks)
            data = ImagesConfig(data_dir=None if data is None else str(data), **images)
        return Benchmarks(self.config, self.subject.network, data)

    # facts

    def _report(self) -> EvaluationReport:
        """The report without results."""
        config, surrogate = self.config, self.surrogate
        given = self.source or self.benchmarks
        assert given is not None
        return EvaluationReport(
            model=self.subject.facts,
            data=given.facts,
            threat=threat_facts(*(plan.threat for plan in self.plans)),
            settings=RunFacts(
                seed=config.seed, batch_size=given.batch_size, batch_dependent=self.batch_dependent,
                worst_case=config.worst_case, exact=config.exact, fast_dtype=config.fast_dtype,
                device=_device_name(self.subject.device), surrogate=surrogate.facts.name if surrogate else '',
                surrogate_sha256=surrogate.facts.weights_sha256 if surrogate else '', command=config.command,
                date=datetime.now(timezone.utc).isoformat(timespec='seconds')))

    def _contexts(self, plans: Mapping[str, Plan]) -> Dict[str, Mapping[str, Any]]:
        """By outcome key, everything that determines the outcomes except the images."""
        known = ('timm_robust', 'timm', 'torch')
        common: Dict[str, Any] = {
            'network': _network_sha256(self.subject), 'versions': {k: v for k, v in versions().items() if k in known}}
        contexts: Dict[str, Mapping[str, Any]] = self.benchmarks.contexts(common) if self.benchmarks else {}
        if self.batch_dependent and self.source:
            common['batch_size'] = self.source.batch_size
        for prefix, plan in plans.items():
            own = {**common, **({'sweep': prefix} if prefix else {})}
            if plan.passes > 1:
                own['passes'] = plan.passes
            contexts[plan.clean_key] = own
            for attack in plan.real_attacks:
                for key, member in plan.members(attack, self.num_classes):
                    contexts[key] = {
                        **own, 'attack': member.to_dict(), 'threat': str(plan.threat), 'seed': self.config.seed,
                        'exact': self.config.exact, 'fast_dtype': self.config.fast_dtype,
                        'surrogate': _network_sha256(self.surrogate) if self.surrogate else None}
        return contexts

    def _check_peers(self) -> None:
        """Reject processes with different networks, images or settings, as in the validation of a training loop.

        Each would evaluate its share of something else, and the report would be of nothing at all.
        """
        if self.peers.size == 1:
            return
        settings = replace(self.config, output='', resume=False, progress=None, command='')
        mine = {
            'model': _network_sha256(self.subject),
            'data': self.source and self.source.fingerprint(),
            'settings': without_addresses(f'{settings} {self._contexts(self._plans())}')}
        all_processes = self.peers.gather(mine)
        for name, value in mine.items():
            if any(other[name] != value for other in all_processes):
                raise InputError(
                    f'must be the same in all {self.peers.size} processes of torch.distributed, which share the images',
                    'pass `distributed=False` for each process to evaluate its own', argument=name)

    def _plans(self) -> Dict[str, Plan]:
        """The plans of the evaluation and of its sweeps, by the prefix of their outcome keys."""
        if not self.plan:
            return {}
        plans = {p.prefix: p for p in (*self.plans, *self.config.swept_plans().values())}
        return {**plans, **{p.prefix: p for p in self._gamma_plans().values()}}

    def _gamma_plans(self) -> Dict[float, Plan]:
        if not (self.plan and self.config.gamma_sweep):
            return {}
        attacks = (Clean(), self.plan.real_attacks[-1])
        return {gamma: Plan(attacks, self.plan.threat, prefix=f'gamma {gamma:g}/') for gamma in GAMMAS}

    # stages

    def run(self) -> EvaluationReport:
        """Run all stages; every process returns the report of the primary one."""
        self._check_peers()
        with ExitStack() as stack:
            if self.folder is not None and self.peers.primary:
                stack.enter_context(FolderLock(self.folder))
                _refuse_unfit(self.folder, self.config.resume)  # another run may have ended since the first check
            self.peers.meet()  # no process starts before the folder is locked
            return self._run()

    def _run(self) -> EvaluationReport:
        report = self._report()
        self.journal = Journal(
            self.folder, self._contexts(self._plans()), rank=self.peers.rank)
        self.peers.meet()  # no process writes while another still reads the files
        self.fast_model = self._make_fast_model()
        with self.journal:
            if self.plan:
                outcomes = tuple(outcome for plan in self.plans for outcome in self._attack(plan))
                if len(self.plans) > 1:
                    outcomes = tuple(
                        o if o.is_clean else replace(o, name=f'{o.name} {o.threat}') for o in outcomes)
                report = replace(
                    report, attacks=outcomes, data=self._data_facts(report),
                    settings=self._doubts(report.settings))
            if self.benchmarks:
                self.benchmarks.run(self.journal, self.peers, self.config.progress)
                self._merge()
                report = replace(report, benchmarks=self.benchmarks.results(self.journal))
            self._save(report)
            report = self._sweeps(report)
        if self.peers.primary:
            report = self._optional_stages(report)
            if self.folder is not None:
                Journal.remove(self.folder)
        return self.peers.broadcast(report)

    def _doubts(self, settings: RunFacts) -> RunFacts:
        """What the probes of all processes found; several passes are for a randomized network, and only for that."""
        assert self.plan is not None
        randomized, one_pass = any(found.randomized for found in self.probes), self.plan.passes == 1
        texts = [text for found in self.probes for text in found.suspicions]
        if not one_pass and not randomized:
            texts.append(_NOT_RANDOMIZED)
        return replace(
            settings, randomized=randomized if one_pass else None, suspicions=tuple(dict.fromkeys(texts)))

    def _save(self, report: EvaluationReport) -> None:
        if self.folder is not None and self.peers.primary:
            report.save(self.folder)

    def _merge(self) -> None:
        self.journal.merge(self.peers.gather(self.journal.state()))

    def _data_facts(self, report: EvaluationReport) -> DataFacts:
        assert self.source is not None
        indices = self.source.indices
        digest = hashlib.sha256(' '.join(self.journal.hashes[i] for i in indices).encode()).hexdigest()
        labels = tuple(self.journal.labels[i] for i in indices)
        return replace(report.data, indices=tuple(indices), labels=labels, sha256=digest)

    def _make_fast_model(self) -> Optional[FastModel]:
        if not self.plan or not self.plan.real_attacks or self.config.exact or self.surrogate or self.batch_dependent:
            return None
        assert self.source is not None
        x, _ = self._first(8)
        dtype = DTYPES[self.config.fast_dtype]
        copied, _ = halving(lambda size: make_fast_model(self.subject.model, x[:size], dtype), len(x))
        return copied

    def _runner(self, plan: Plan) -> Runner:
        assert self.source is not None
        return Runner(
            self.subject.model, plan, self.journal, num_classes=self.num_classes, batch_size=self.batch_size,
            device=self.subject.device, seed=self.config.seed, fast_model=self.fast_model,
            surrogate=self.surrogate.model if self.surrogate else None, allow_chance=self.config.allow_chance,
            progress=self.config.progress if self.peers.primary else False)

    def _attack(self, plan: Plan) -> Tuple[AttackOutcome, ...]:
        """Outcomes of a plan on all images; this process attacks its share of them."""
        assert self.source is not None
        indices = self.source.indices
        own = self.peers.positions(len(indices), self.source.batch_size if self.batch_dependent else 1)
        runner = self._runner(plan)
        runner.run(self.source.loader(own) if own else (), [indices[i] for i in own])
        self.batch_size = runner.batch_size
        self.probes += [found for found in self.peers.gather(runner.probe) if found]
        self._merge()
        return assemble(plan, self.journal, indices, self.num_classes)

    def _sweeps(self, report: EvaluationReport) -> EvaluationReport:
        """Curves over eps and gamma; the processes share the images here too."""
        total = report.data.num_examples
        eps_points: List[EpsPoint] = []
        for eps, plan in self.config.swept_plans().items():
            self._log(f'Accuracy at {plan.threat} ...')
            eps_points.append(EpsPoint(eps, _count(self._attack(plan)[0]), total))
        gamma_points: List[GammaPoint] = []
        for gamma, plan in self._gamma_plans().items():
            self._log(f'Accuracy at gamma {gamma:g} ...')
            with at_gamma(self.subject.model, gamma):
                self.fast_model = self._make_fast_model()
                clean, robust = self._attack(plan)
            gamma_points.append(GammaPoint(gamma, _count(clean), _count(robust), total))
        if gamma_points:
            self.fast_model = self._make_fast_model()
        if eps_points or gamma_points:
            report = replace(report, eps_sweep=tuple(eps_points), gamma_sweep=tuple(gamma_points))
            self._save(report)
        return report

    def _log(self, text: str) -> None:
        if self.peers.primary:
            _logger.info(text)

    def _optional_stages(self, report: EvaluationReport) -> EvaluationReport:
        """Example images and diagnosis."""
        config = self.config
        if self.plan is None:
            return report
        if config.save_images and self.plan.real_attacks:
            report = self._optional('Adversarial images for the report', self._add_examples, report)
        wanted = config.diagnose
        if wanted is None:
            wanted = any(isinstance(attack, AutoAttack) for attack in self.plan.attacks)
        if wanted:
            report = self._optional('Diagnosis: is the robustness real?', self._add_findings, report)
        return report

    def _optional(
            self,
            title: str,
            stage: Callable[[EvaluationReport], EvaluationReport],
            report: EvaluationReport,
    ) -> EvaluationReport:
        """Run a stage and return the report with its results; if it fails, warn and return the report unchanged."""
        start = time.perf_counter()
        _logger.info(f'{title} ...')
        try:
            report = stage(report)
            self._save(report)
        except (InputError, RuntimeError, ValueError, OSError) as error:
            reason = ' '.join(str(error).split()) or type(error).__name__
            _logger.warning(f'{title}: skipped, {reason}. The accuracies are not affected.')
        else:
            _logger.info(f'{title}: {time.perf_counter() - start:.0f} seconds')
        return report

    def _first(self, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
        assert self.source is not None
        x, y = self.source.first(count)
        return x.to(self.subject.device), y.to(self.subject.device)

    def _add_examples(self, report: EvaluationReport) -> EvaluationReport:
        assert self.plan is not None and self.source is not None
        x, y = self._first(self.source.batch_size)
        return replace(report, examples=example_images(
            self._runner(self.plan), x, y, self.source.indices[:len(x)], report.attacks[:len(self.plan.attacks)],
            self.config.save_images))

    def _add_findings(self, report: EvaluationReport) -> EvaluationReport:
        assert self.plan is not None and self.source is not None
        x, y = self._first(_NUM_DIAGNOSED)
        size, seed = self.batch_size, self.config.seed
        findings = diagnose(
            self.subject.model, x, y, self.plan.threat, batch_size=size, seed=seed, fast_model=self.fast_model,
            surrogate=self.surrogate.model if self.surrogate else None, progress=self.config.progress)
        surface = loss_surface(self.subject.model, x, y, self.plan.threat, batch_size=size, seed=seed)
        return replace(report, findings=tuple(findings), surface=surface)


def _refuse_unfit(folder: Path, resume: bool) -> None:
    """Refuse a folder with results, and one with an unfinished evaluation unless it is resumed."""
    unfinished = Journal.exists(folder)
    if unfinished and not resume:
        raise InputError(
            'holds an unfinished evaluation', 'pass `resume=True` to continue it, or choose another folder',
            argument='output', value=str(folder))
    if (folder / RESULTS).exists() and not unfinished:
        raise InputError(f'already holds {RESULTS}', 'choose another folder', argument='output', value=str(folder))


def _count(outcome: AttackOutcome) -> int:
    return sum(map(bool, outcome.correct))


def _device_name(device: torch.device) -> str:
    return f'{device} ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else str(device)
