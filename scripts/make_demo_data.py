"""Makes the demo's four datasets: generated files in the formats of ImageNet, Kinetics and SSV2.

    python scripts/make_demo_data.py --out runs/demo_data

Costs about 50 CPU-seconds (half a minute on two free cores) and 55 MB of disk: 800 training and 256
test files in each dataset, eight classes each. A folder that already holds the set is left as it
is, in under a second, so it is safe to run before every demo. Expect progress lines and then

    imagenet: 800 train, 256 test
    ...
    runs/demo_data is ready after 30 s
"""

import argparse
import sys
import time
from pathlib import Path

from vimnas_ds.arguments import folder
from vimnas_ds.data.demo import make_demo_data


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=folder, default=Path("runs/demo_data"), help="the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_per_class", type=int, default=100)
    parser.add_argument("--test_per_class", type=int, default=32)
    parser.add_argument("--workers", type=int, help="processes; by default one per CPU")
    parser.add_argument("--force", action="store_true", help="make the set anew")
    options = parser.parse_args(argv)
    for name, least in (("train_per_class", 1), ("test_per_class", 1), ("workers", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")

    start = time.perf_counter()
    try:
        counts = make_demo_data(
            out=options.out,
            seed=options.seed,
            train_per_class=options.train_per_class,
            test_per_class=options.test_per_class,
            workers=options.workers,
            force=options.force,
            report=lambda line: print(line, flush=True),
        )
    except ValueError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 2
    for dataset, files in counts.items():
        print(f"{dataset}: {files['train']} train, {files['test']} test")
    print(f"{options.out} is ready after {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
