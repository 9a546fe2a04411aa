import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from helpers import TinyNet, make_image_folder
from torch.utils.data import DataLoader, TensorDataset

from timm_robust.attacks import FGSM, MIM, PGD, AutoAttack, Clean, CWLinf, Linf
from timm_robust.cli.main import main
from timm_robust.data import balanced_indices
from timm_robust.errors import InputError
from timm_robust.evaluation import (
    EvaluationReport,
    ThreatFacts,
    evaluate_attacks,
    example_images,
    plan_attacks,
)
from timm_robust.evaluation.accuracy import image_seeds, sweep_eps
from timm_robust.evaluation.journal import Journal
from timm_robust.inputs import weights_sha256
from timm_robust.layers import set_bn_mode
from timm_robust.models import NormalizedModel

THREAT = Linf(8 / 255)
CPU = torch.device('cpu')


def data(n=20, classes=4):
    return torch.rand(n, 3, 8, 8), torch.arange(n) % classes


def evaluate(model, x, y, names='clean,fgsm,pgd3', batch_size=8, threat=THREAT, **kwargs):
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    specs = plan_attacks(names, threat)
    return evaluate_attacks(model, loader, range(len(x)), specs, device=CPU, progress=False, **kwargs)


def undecided_net(x):
    """A network whose logits are centred on these images, so that a perturbation changes some of its verdicts."""
    model = TinyNet().eval()
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
    return model


def labels_of(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def test_verdicts_are_those_of_a_plain_forward_pass():
    x, _ = data()
    model = undecided_net(x)
    y = labels_of(model, x)
    y[::5] = (y[::5] + 1) % 4  # these are wrong when clean, and count as wrong
    evaluation = evaluate(model, x, y, threat=Linf(0.005))
    clean, fgsm_result, pgd_result = evaluation.results
    assert clean.correct == (labels_of(model, x) == y).tolist() and clean.accuracy == 80.
    adv = FGSM()(model, x, y, Linf(0.005))
    expected = (labels_of(model, adv) == y) & torch.tensor(clean.correct)
    assert fgsm_result.correct == expected.tolist()
    assert 0 < sum(fgsm_result.correct) < 16, 'the comparison says nothing'
    assert all(not p or c for p, c in zip(pgd_result.correct, clean.correct))
    worst = [a and b and c for a, b, c in zip(clean.correct, fgsm_result.correct, pgd_result.correct)]
    assert evaluation.worst_case == worst and evaluation.labels == y.tolist()


@pytest.mark.parametrize('batch_size', [2, 7])
def test_resumes_with_batches_of_another_size(batch_size):
    x, _ = data(24)
    model = undecided_net(x)
    y = labels_of(model, x)
    journal = Journal(None, {})
    evaluate(model, x[:9], y[:9], batch_size=3, batches_in_pool=3, threat=Linf(0.005), journal=journal)
    resumed, whole = (
        evaluate(model, x, y, batch_size=batch_size, batches_in_pool=2, threat=Linf(0.005), **kept)
        for kept in ({'journal': journal}, {}))
    assert [r.correct for r in resumed.results] == [r.correct for r in whole.results]
    assert resumed.labels == y.tolist()


def test_outcome_depends_neither_on_batch_size_nor_on_order():
    x, _ = data(24)
    model = undecided_net(x)
    y = labels_of(model, x)
    threat = Linf(0.005)
    outcomes = [evaluate(model, x, y, 'fgsm_rs,pgd2', batch_size=b, threat=threat) for b in (1, 7, 24)]
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0].results, other.results):
            assert a.correct == b.correct
    order = torch.randperm(24)
    specs = plan_attacks('fgsm_rs,pgd2', threat)
    shuffled = evaluate_attacks(
        model, DataLoader(TensorDataset(x[order], y[order]), batch_size=5), order.tolist(), specs, device=CPU,
        progress=False)
    for a, b in zip(outcomes[0].results, shuffled.results):
        assert [a.correct[i] for i in order] == b.correct
    assert 0 < sum(outcomes[0].results[0].correct) < 24, 'the comparison says nothing'


def test_batch_dependent_networks_are_attacked_in_whole_batches():
    model = NormalizedModel(timm.create_model('robustnorm_resnet20_cifar', num_classes=4)).eval()
    sizes = []
    model.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 4
    evaluation = evaluate(set_bn_mode(model, 'batch'), x, y, batch_size=8)
    assert evaluation.batch_dependent and set(sizes) == {8}
    sizes.clear()
    assert not evaluate(set_bn_mode(model, 'population'), x, y, batch_size=8).batch_dependent
    assert min(sizes) < 8, 'images already wrong were attacked'
    set_bn_mode(model, 'batch')
    with pytest.raises(InputError, match='pgd-targeted5'):
        evaluate(model, x, y, 'pgd-targeted5')


def test_an_attack_that_cheats_is_caught(monkeypatch):
    model, (x, _) = TinyNet().eval(), data()
    y = labels_of(model, x)
    for cheat in (lambda x: (x + 2 * THREAT.eps).clamp(0, 1), lambda x: x + THREAT.eps):
        monkeypatch.setattr(FGSM, '__call__', lambda self, model, x, y, threat, cheat=cheat, **how: cheat(x))
        with pytest.raises(RuntimeError, match='fgsm left its threat model'):
            evaluate(model, x, y, 'fgsm')


def test_refusals():
    model, (x, y) = TinyNet().eval(), data()
    with pytest.raises(InputError, match='training mode'):
        evaluate(TinyNet().train(), x, y)
    with pytest.raises(InputError, match=r'pixels span \[-1'):
        evaluate(model, x * 2 - 1, y)
    with pytest.raises(InputError, match='--num-classes 4: the data has label 7'):
        evaluate(model, x, y + 4)
    broken = TinyNet().eval()
    nn.init.constant_(broken.fc.bias, float('nan'))
    with pytest.raises(InputError, match='not finite'):
        evaluate(broken, x, y)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(InputError, match='tuple'):
        evaluate(Pair().eval(), x, y)


def test_plan_attacks():
    specs = plan_attacks('clean, fgsm,pgd20,mim5,cw30,pgd', THREAT, restarts=3)
    assert [s.attack for s in specs] == [
        Clean(), FGSM(), PGD(steps=20, restarts=3), MIM(steps=5), CWLinf(steps=30, restarts=3), PGD(restarts=3)]
    assert [s.threat for s in specs] == [None, *[THREAT] * 5]


def test_what_is_written_of_an_attack_names_the_defaults_it_passes_on():
    fgsm, autoattack = (s.describe() for s in plan_attacks('fgsm,autoattack', THREAT))
    assert fgsm['steps'] == 1
    assert [p.get('steps', p.get('query_limit')) for p in autoattack['parts']] == [100, 100, 100, 5000]


def test_autoattack_in_an_evaluation_and_its_examples():
    x, _ = data(12)
    model = undecided_net(x)
    threat = Linf(0.005)
    evaluation = evaluate(model, x, labels_of(model, x), 'clean,fgsm,autoattack', threat=threat)
    seeds = image_seeds(0, range(12))
    adv = AutoAttack()(model, x, labels_of(model, x), threat, seed=seeds)
    result = evaluation.results[2]
    assert result.correct == (labels_of(model, adv) == labels_of(model, x)).tolist()
    later = [f and not r for f, r in zip(evaluation.results[1].correct, result.correct)]
    assert any(later) and any(result.correct), 'the comparison says nothing'
    examples = example_images(model, x, evaluation, count=12)
    held = [e for e in examples if not e.fooled]
    assert len(held) == sum(result.correct) and {e.attack for e in held} == {'autoattack'}
    fooled = [e.attack for e in examples if e.fooled]
    assert sum(a.startswith('autoattack/') for a in fooled) == sum(later) and set(fooled) - {'fgsm'}


def test_a_surrogate_gets_no_more_than_a_batch_at_once():
    x, _ = data()
    model = undecided_net(x)
    sizes = []
    surrogate = TinyNet().eval()
    surrogate.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    evaluate(model, x, labels_of(model, x), 'clean,pgd3', batch_size=3, surrogate=surrogate)
    assert max(sizes) == 3


def test_a_sweep_is_an_evaluation_for_each_eps():
    x, _ = data()
    model = undecided_net(x)
    y = labels_of(model, x)
    sweep = {eps: plan_attacks('pgd3' if eps else 'clean', Linf(eps))[0] for eps in (.02, 0, .002, .3)}
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    points = sweep_eps(model, lambda: loader, range(20), sweep, device=CPU, progress=False)
    alone = {
        eps: evaluate(model, x, y, 'pgd3', threat=Linf(eps)).results[0].accuracy
        for eps in (.002, .02, .3)}
    curve = {p.eps: p.accuracy for p in points}
    assert curve == {0: 100., **alone} and list(curve) == sorted(curve) and len(set(curve.values())) > 2


def test_the_first_look_at_a_clean_image_counts():
    """A resume on another device may classify an image otherwise; it must not pass for robust without an attack."""
    x, _ = data()
    model = undecided_net(x)
    y = labels_of(model, x)
    journal = Journal(None, {})
    journal.record('clean', list(range(20)), [True] * 20, 0., y.tolist())
    y[3] = (y[3] + 1) % 4
    wide = Linf(.9)
    result = evaluate(model, x, y, 'clean,pgd3', threat=wide, journal=journal).results[1]
    assert result.attacked == 20 and result.correct[3] is False


def test_balanced_indices():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    chosen = balanced_indices(labels, 100, 30, seed=1)
    assert len(set(chosen)) == 30 and (np.bincount(labels[chosen]) == 10).all()
    assert chosen == balanced_indices(labels, 100, 30, seed=1) != balanced_indices(labels, 100, 30, seed=2)
    assert (np.bincount(labels[chosen[:9]]) == 3).all(), 'a prefix is not balanced'
    assert sorted(balanced_indices(labels, 100, None, seed=1)) == list(range(100))
    assert len(balanced_indices(None, 100, 7, seed=1)) == 7


def test_weights_hash_sees_every_value():
    model = TinyNet()
    first = weights_sha256(model)
    assert first == weights_sha256(model)
    with torch.no_grad():
        model.fc.bias[3] += 1e-6
    assert first != weights_sha256(model)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_weights_hash_of_half_precision_is_that_of_the_float32_network_it_becomes(dtype):
    model = TinyNet()
    half = {k: v.to(dtype) for k, v in model.state_dict().items()}
    assert weights_sha256(half) != weights_sha256(model)
    model.load_state_dict(half)
    assert weights_sha256(half) == weights_sha256(model)
    assert weights_sha256({k: v.double() for k, v in half.items()}) != weights_sha256(model), 'more than float32 holds'


def test_eval_command_writes_all_it_takes_to_repeat_it(tmp_path, capsys):
    folder = make_image_folder(tmp_path / 'images', per_class=12)
    torch.manual_seed(0)
    model = timm.create_model('robustnorm_resnet20_cifar', num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    command = ['eval', '--model', 'robustnorm_resnet20_cifar', '--num-classes', '2', '--checkpoint',
               str(tmp_path / 'weights.pth'), '--data-dir', str(folder), '--attacks', 'clean,fgsm,pgd3',
               '--num-examples', '10', '-j', '0', '-b', '4', '--seed', '5', '--device', 'cpu']
    assert main([*command, '--output', str(tmp_path / 'a'), '--eps-sweep', '0,1/255,8/255', '--save-images', '3']) == 0
    table = capsys.readouterr().out
    for text in ('Linf 8/255', '10 images', 'seed 5', 'cumulative', 'pgd3'):
        assert text in table
    report = EvaluationReport.load(tmp_path / 'a')
    assert report.model.weights_sha256 == weights_sha256(model)
    assert report.threat == ThreatFacts('Linf', 8 / 255, 'Linf 8/255')
    assert report.data.num_examples == 10 == len(report.data.labels) and report.data.class_names == ('a', 'b')
    assert report.settings.seed == 5 and report.settings.command.startswith('timm-robust eval')
    assert {'timm', 'torch', 'timm_robust'} <= set(report.versions)
    assert [a.name for a in report.attacks] == ['clean', 'fgsm', 'pgd3']
    for a in report.attacks:
        assert a.accuracy == 100 * sum(a.correct) / 10
    assert [p.eps for p in report.eps_sweep] == [0, 1 / 255, 8 / 255]
    for name in ('eps_sweep.png', 'images.png'):
        assert (tmp_path / 'a' / name).stat().st_size > 3000
    assert main([*command, '--output', str(tmp_path / 'b')]) == 0
    again = EvaluationReport.load(tmp_path / 'b')
    assert [a.correct for a in again.attacks] == [a.correct for a in report.attacks]
    assert again.data == report.data

    # the images are the ones the indices name, through the model's own preprocessing
    from PIL import Image
    from timm.data import create_transform, resolve_data_config
    transform = create_transform(**resolve_data_config({}, model=model))
    files = [(p, k) for k, c in enumerate('ab') for p in sorted(
        (folder / 'validation' / c).iterdir(), key=lambda p: int(p.stem))]
    chosen = [files[i] for i in report.data.indices]
    assert tuple(k for _, k in chosen) == report.data.labels
    x = torch.stack([transform(Image.open(p).convert('RGB')) for p, _ in chosen])
    with torch.no_grad():
        predicted = model.eval()(x).argmax(1)
    assert report['clean'].correct == tuple(bool(p == k) for p, (_, k) in zip(predicted, chosen))

    assert main([*command, '--output', str(tmp_path / 'c'), '--bn-mode', 'batch']) == 0
    assert 'WARNING: This network normalizes by the current batch' in capsys.readouterr().out
    assert EvaluationReport.load(tmp_path / 'c').settings.batch_dependent is True


def test_pixels_reach_the_attack_unnormalized():
    # the same numbers through NormalizedModel and through a network that normalizes by hand
    model = timm.create_model('nofrost_resnet20_cifar').eval()
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    wrapped = NormalizedModel(model).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    a = FGSM().craft(wrapped, x, y, THREAT)
    b = FGSM().craft(lambda p: model((p - mean) / std), x, y, THREAT)
    assert torch.equal(a, b) and (a - x).abs().max() <= THREAT.eps * (1 + 3e-6)


@pytest.mark.parametrize('allowed', [True, False])
def test_float32_is_not_tf32_and_the_flags_come_back(allowed, monkeypatch):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before, seen = [b.allow_tf32 for b in backends], []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append([b.allow_tf32 for b in backends])
            return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)

    loader = [(torch.full((4, 3, 8, 8), .7), torch.zeros(4, dtype=torch.int64))]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        evaluate_attacks(Watched().eval(), loader, range(4), plan_attacks('clean,pgd2', Linf(8 / 255)),
                         device=torch.device('cpu'))
        assert len(seen) > 2 and not any(map(any, seen))
        assert [b.allow_tf32 for b in backends] == [allowed] * 2
    finally:
        for backend, flag in zip(backends, before):
            backend.allow_tf32 = flag
