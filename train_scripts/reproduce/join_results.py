"""Join evaluations of parts of a test set into one report that names the published network and the whole data set.

In the given order, the parts must make up the class-balanced selection of `timm-robust eval --num-examples`, and the
network must have the weights that were measured.
"""
import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from timm_robust.evaluation import EvaluationReport, evaluate, join_reports

REPLACED = {'--model': 1, '--checkpoint': 1, '--data-dir': 1, '--subset': 1, '--num-examples': 1, '--output': 1,
            '--resume': 0}


def command(part: str, model: str, data_dir: str, num_examples: int) -> str:
    """The command that would measure all images, derived from the command of a part."""
    words, kept = iter(shlex.split(part)), []
    for word in words:
        if word in REPLACED:
            for _ in range(REPLACED[word]):
                next(words)
        else:
            kept.append(word)
    own = ['--model', model, '--data-dir', data_dir, '--num-examples', str(num_examples)]
    return shlex.join([*kept[:2], *own, *kept[2:]])


def main() -> None:
    """Join the parts, and check model, images and labels."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
    parser.add_argument('results', nargs='+', help='results.json of each part')
    parser.add_argument('--model', required=True, metavar='NAME', help='name of the network for timm.create_model')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder of the images')
    parser.add_argument('--output', required=True, metavar='DIR', help='folder of the report')
    args = parser.parse_args()
    report = join_reports([EvaluationReport.load(path) for path in args.results])
    seed, count = report.settings.seed, report.data.num_examples
    whole = evaluate(  # for the facts about all images
        args.model, args.data_dir, attacks='clean', split=report.data.split, num_examples=count, seed=seed,
        batch_size=report.settings.batch_size, workers=0, allow_chance=True, diagnose=False, save_images=0,
        progress=False)
    if whole.model.weights_sha256 != report.model.weights_sha256:
        sys.exit(f'{args.model}: its weights are not those that were measured')
    if whole.data.indices != report.data.indices:
        sys.exit(f'the images are not the balanced selection of {count:,} with seed {seed}, or not in its order')
    if whole.data.labels != report.data.labels or whole['clean'].correct != report['clean'].correct:
        sys.exit('the labels do not match the images, or clean images have other predictions')
    report = replace(
        report,
        model=replace(report.model, name=args.model, checkpoint=''),
        data=whole.data,
        settings=replace(report.settings, command=command(report.settings.command, args.model, args.data_dir, count)))
    report.save(Path(args.output))
    print(report)


if __name__ == '__main__':
    main()
