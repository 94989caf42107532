import sys

from elan_basicsr.cli import main

if __name__ == '__main__':
    sys.exit(main())
