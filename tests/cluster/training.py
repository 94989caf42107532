"""The training that the cluster tests disturb: `training.py prepare FOLDER ITERATIONS`, `training.py compare A B`."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))
from soak_resume import same, write_options


def compare(a: Path, b: Path) -> int:
    """Exit code 0 if the last checkpoints of the runs in two folders are equal bit for bit."""
    names = [max((folder / 'experiments/run/training_states').glob('[0-9]*.state'), key=lambda p: int(p.stem)).stem
             for folder in (a, b)]
    if names[0] != names[1]:
        print(f'the runs ended at iterations {names[0]} and {names[1]}')
        return 1
    for name in (f'models/net_g_{names[0]}.pth', f'training_states/{names[0]}.state'):
        if not same(*(torch.load(folder / 'experiments/run' / name, weights_only=True) for folder in (a, b))):
            print(f'{name} differs')
            return 1
    print(f'iteration {names[0]}: weights, EMA, optimizer and scheduler are equal bit for bit')
    return 0


if __name__ == '__main__':
    command, *values = sys.argv[1:]
    if command == 'prepare':
        write_options(Path(values[0]), int(values[1]), workers=1)
    else:
        sys.exit(compare(Path(values[0]), Path(values[1])))
