"""The seams of timm's train.py that `timm-robust timm-train` holds on to, and as little else as trains a network."""
import argparse
import csv
import json
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import yaml
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import random_seed

config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument('-c', '--config', default='')

parser = argparse.ArgumentParser()
for flag, value in {
    'data-dir': '', 'model': '', 'num-classes': 2, 'epochs': 1, 'batch-size': 8, 'lr': .01, 'seed': 42, 'workers': 0,
    'output': '', 'experiment': '', 'eval-metric': 'top1', 'val-split': 'validation', 'device': 'cpu', 'mixup': 0.,
    'cutmix': 0., 'model-ema-decay': .5, 'opt': 'sgd',
}.items():
    parser.add_argument(f'--{flag}', type=type(value), default=value)
for flag in ('model-ema', 'no-prefetcher', 'jsd-loss', 'channels-last', 'grad-checkpointing', 'torchscript'):
    parser.add_argument(f'--{flag}', action='store_true')
parser.add_argument('--cutmix-minmax', type=float, nargs='+', default=None)
parser.add_argument('--kd-model-name', default=None)
parser.add_argument('--start-epoch', type=int, default=None)


def _parse_args():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        parser.set_defaults(**yaml.safe_load(Path(args_config.config).read_text()))
    args = parser.parse_args(remaining)
    return args, yaml.safe_dump(args.__dict__)


def main():
    args, args_text = _parse_args()
    args.prefetcher, args.distributed = not args.no_prefetcher, False
    device = torch.device(args.device)
    random_seed(args.seed, 0)
    model = create_model(args.model, num_classes=args.num_classes)
    config = resolve_data_config(vars(args), model=model)
    common = dict(
        input_size=config['input_size'], mean=config['mean'], std=config['std'], num_workers=args.workers,
        device=device, use_prefetcher=args.prefetcher, batch_size=args.batch_size, persistent_workers=False)
    loader_train = create_loader(create_dataset('', args.data_dir, split='train'), is_training=True, **common)
    loader_eval = create_loader(
        create_dataset('', args.data_dir, split=args.val_split), is_training=False, **common)
    task = ClassificationTask(
        model=model, criterion=nn.CrossEntropyLoss(), device=device, dtype=None, verbose=False)
    model, eval_model = task.get_trainable_module(), task.get_eval_model()
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
    output = Path(args.output, args.experiment)
    output.mkdir(parents=True)
    (output / 'args.yaml').write_text(args_text)
    rows = []
    for epoch in range(args.start_epoch or 0, args.epochs):
        loss = train_one_epoch(epoch, model, loader_train, optimizer, args, task=task)
        metrics = validate(eval_model, loader_eval, nn.CrossEntropyLoss(), args, device=device, amp_autocast=suppress)
        if args.model_ema:
            metrics = validate(task.get_eval_model(ema=True), loader_eval, nn.CrossEntropyLoss(), args, device=device,
                               amp_autocast=suppress, log_suffix=' (EMA)')
        rows.append({'epoch': epoch, 'train_loss': loss.item(), **{f'eval_{k}': v for k, v in metrics.items()}})
    with open(output / 'summary.csv', 'w') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print('--result\n' + json.dumps({'best': max(m[f'eval_{args.eval_metric}'] for m in rows)}))


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    model.train()
    for input, target in loader:
        loss = task(input, target)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.update_ema()
    return loss


def validate(model, loader, loss_fn, args, device=None, amp_autocast=suppress, model_dtype=None, log_suffix=''):
    model.eval()
    total = correct = loss = 0.
    with torch.inference_mode():
        for input, target in loader:
            output = model(input)
            total, correct = total + len(target), correct + (output.argmax(1) == target).sum().item()
            loss += loss_fn(output, target).item() * len(target)
    return OrderedDict(loss=loss / total, top1=100. * correct / total)


if __name__ == '__main__':
    main()
