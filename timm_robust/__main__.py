import sys

from timm_robust_command import main

if __name__ == '__main__':
    sys.exit(main())
