"""`timm-robust timm-train` as a file, for launchers that need one: torchrun train_scripts/timm_train.py TRAIN.PY ..."""
import sys

from timm_robust.cli import main

if __name__ == '__main__':
    sys.exit(main(['timm-train', *sys.argv[1:]]))
