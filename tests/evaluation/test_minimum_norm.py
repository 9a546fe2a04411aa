"""Accuracy at every eps from one run of an attack that looks for the nearest image that fools; best known accuracy."""
import pytest
import torch
import torch.nn as nn

from timm_robust.attacks import DDN, FMN, Attack, AutoAttack, Best, Linf, Quick, make_threat
from timm_robust.evaluation import EvaluationReport, evaluate
from timm_robust.evaluation.render.words import eps_curves, eps_header, eps_rows, headline


@pytest.fixture
def problem():
    """A linear network, and images at many distances from its boundary, some of them misclassified."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()
    x = torch.rand(24, 3, 4, 4) * .4 + .3
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
        y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    return model, x, y


def measured(problem, attacks, threat, **kwargs):
    return evaluate(*problem, threat=threat, attacks=attacks, progress=False, diagnose=False, save_images=2, **kwargs)


@pytest.mark.parametrize('attack, norm, eps', [(FMN(steps=30), 'Linf', .01), (DDN(), 'L2', .05)])
def test_one_run_gives_the_accuracy_at_every_eps(problem, attack, norm, eps, tmp_path):
    threat = make_threat(norm, eps)
    report = measured(problem, ['clean', attack], threat, output=str(tmp_path / 'out'))
    outcome = report[str(attack)]
    assert EvaluationReport.load(tmp_path / 'out') == report
    assert outcome.distances[:3] == (0., 0., 0.) and None not in outcome.distances
    assert outcome.correct == tuple(d > eps for d in outcome.distances)
    assert 0 < outcome.accuracy < 87.5, 'the comparison says nothing'
    for factor in (.3, .8, 1.7):
        again = measured(problem, ['clean', attack], make_threat(norm, eps * factor))
        assert again.accuracy(str(attack)) == pytest.approx(outcome.accuracy_at(eps * factor))
    curve = eps_curves(report)[str(attack)]
    assert curve[0.] == report.clean_accuracy and curve[2 * eps] == outcome.accuracy_at(2 * eps)
    assert list(curve) == sorted(curve) and list(curve.values()) == sorted(curve.values(), reverse=True)
    assert eps_header(report) == ('eps', f'{attack} (%)')
    assert eps_rows(report)[4] == (f'{eps:g}', f'{outcome.accuracy:.2f}')
    assert (tmp_path / 'out' / 'eps_sweep.png').exists()
    median = torch.tensor(outcome.distances).double().quantile(.5).item()
    text = (tmp_path / 'out' / 'report.md').read_text()
    assert f'the median distance of the nearest adversarial image is {median:.4g} in {norm} (' in text


def test_the_curve_stands_beside_the_sweep(problem):
    report = measured(problem, ['clean', FMN(steps=30), 'pgd5'], Linf(.01), eps_sweep=[0, .01])
    assert eps_header(report) == ('eps', 'pgd5 (%)', 'fmn30 (%)') and list(eps_curves(report)) == ['pgd5', 'fmn30']
    assert [row[1:] for row in eps_rows(report)] == [
        ('87.50', '87.50'), (f"{report.accuracy('pgd5'):.2f}", f"{report.accuracy('fmn30'):.2f}")]
    few = measured(problem, ['clean', 'fgsm', FMN(steps=30)], Linf(.01), worst_case=True)
    assert not eps_curves(few), 'of images that were not attacked nothing is known'


def test_best_takes_over_what_autoattack_found(problem, monkeypatch):
    calls, run = [], Attack.attack_images

    def counted(self, model, images, *args):
        calls.append((str(self), len(images)))
        if self.name in ('square', 'fab-t'):
            self = FMN(steps=1)  # these would take long, and are not what this is about
        return run(self, model, images, *args)

    monkeypatch.setattr(Attack, 'attack_images', counted)
    report = measured(problem, 'clean,autoattack,best', Linf(.005))
    names = [name for name, _ in calls if name != 'fmn1']
    first = names.index('malt')
    assert names[:first] == ['apgd-ce', 'apgd-t', 'fab-t', 'square'] and names[first:first + 2] == ['malt', 'apgd-pm']
    assert next(count for name, count in calls if name == 'malt') == sum(report['autoattack'].correct)
    assert [m['attack'] for m in report['best'].members] == ['apgd', 'apgd-t', 'fab-t', 'square', 'malt', 'apgd']
    assert report.best_known.accuracy == report.accuracy('best') <= report.robust_accuracy.accuracy
    assert report.robust_accuracy.attacks == ('autoattack',)
    assert 'Best known robust accuracy: ' in headline(report) and 'upper bound' not in headline(report)
    content = report.to_dict()
    assert content['best_known_accuracy'] == report.accuracy('best')
    assert EvaluationReport.from_dict(content).best_known == report.best_known
    alone = measured(problem, 'best', Linf(.005))
    assert alone.robust_accuracy == alone.best_known and 'at most' not in headline(alone)
    assert 'Best known' not in headline(alone)


@pytest.mark.parametrize('num_classes, quick, more', [
    (2, 'apgd-pm50,malt-gap', 'malt-gap,apgd-pm'), (3, 'apgd-pm50,malt-gap', 'malt-gap,apgd-pm'),
    (4, 'apgd-pm50,malt', 'malt,apgd-pm'), (1000, 'apgd-pm50,malt', 'malt,apgd-pm')])
def test_ensembles_by_number_of_classes(num_classes, quick, more):
    assert ','.join(map(str, Quick().members(num_classes))) == quick
    assert Quick().members(num_classes)[1].num_targets == min(5, num_classes - 1)
    members = Best().members(num_classes)
    assert members[:4] == AutoAttack().members(num_classes) and ','.join(map(str, members[4:])) == more
