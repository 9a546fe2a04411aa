"""Join evaluations of parts of a test set into one report that names the published network and the whole data set.

In the given order, the parts must make up the class-balanced selection of `timm-robust eval --num-examples`, and the
network must have the weights that were measured.
"""
import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import timm
from timm.data import create_dataset

import timm_robust  # noqa: F401
from timm_robust.data import balanced_indices, class_names, dataset_labels
from timm_robust.evaluation import EvaluationReport, join_reports
from timm_robust.inputs import weights_sha256

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
    if weights_sha256(timm.create_model(args.model, pretrained=True)) != report.model.weights_sha256:
        sys.exit(f'{args.model}: its weights are not those that were measured')
    dataset = create_dataset('', root=args.data_dir, split=report.data.split)
    labels = dataset_labels(dataset)
    seed, count = report.settings.seed, report.data.num_examples
    indices = balanced_indices(labels, len(labels), count, seed)
    if list(report.data.indices) != indices:
        sys.exit(f'the images are not the balanced selection of {count:,} with seed {seed}, or not in its order')
    if list(report.data.labels) != [int(labels[i]) for i in indices]:
        sys.exit('the labels do not match the images')
    report = replace(
        report,
        model=replace(report.model, name=args.model, checkpoint=''),
        data=replace(report.data, data_dir=args.data_dir, subset='balanced', class_names=class_names(dataset)),
        settings=replace(report.settings, command=command(report.settings.command, args.model, args.data_dir, count)))
    report.save(Path(args.output))
    print(report)


if __name__ == '__main__':
    main()
