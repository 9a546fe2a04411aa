"""`timm-robust train` as a file, for launchers that need one: torchrun train_scripts/train.py ..."""
import sys

from timm_robust.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
