"""One HTML page of a run and its searches: needs no network, readable on a phone.

    python scripts/report.py                            (the latest run under runs/)
    python scripts/report.py runs/vitl --out vitl.html
    python scripts/report.py runs/vitl --clips 0        (leaves data and network alone)

Writes RUN/report.html: curves, alphas, decisions with their margins, the front, the chosen
architecture (the best on `select` of the searches scored alike) beside the largest, controls,
scores, clips that it gets right and wrong, faults, configuration. A run that was killed, is still
training or was never searched gives a page of what there is. Clips need a checkpoint and the data
(--set vimnas.data.k400.root=... where they have moved); without, a word stands there. Costs a few
seconds, and for the clips some batches of each dataset. Exit code 2: there is no run.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from vimnas_ds.config import ConfigError
from vimnas_ds.durable import write_text
from vimnas_ds.page.clips import contact_sheets, find_clips, without_clips
from vimnas_ds.page.document import build_page
from vimnas_ds.page.record import Record, read_record
from vimnas_ds.processes import end_process
from vimnas_ds.search.cli import run_script
from vimnas_ds.search.run import latest_run, open_run
from vimnas_ds.space import Arch
from vimnas_ds.train.ranks import CannotStart, start_ranks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="its folder; default: the latest run's")
    add("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    add(
        "--clips",
        type=int,
        default=32,
        metavar="N",
        help="samples of each dataset looked at for right and wrong ones (default 32); 0: none",
    )
    add("--split", choices=("select", "test"), default="select", help="of the clips")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the run's configuration, e.g. a data root",
    )
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> int:
    if args.clips < 0:
        raise ConfigError(f"--clips must be at least 0, got {args.clips}")
    record = read_record(args.run or latest_run())
    out = args.out or record.files.root / "report.html"
    page = build_page(record, clips_of(record, args), datetime.now().astimezone())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    print(f"written to {out}: {len(page.encode()) / 1e6:.2f} MB")
    return 0


def clips_of(record: Record, args: argparse.Namespace) -> str:
    """The page's part with samples, or a word why there are none."""
    if not args.clips:
        return ""
    try:
        name = record.choice.name if record.choice else "largest"
        ranks = start_ranks(engine=False)
        run = open_run(record.files.root, ranks, args.set, args.clips)
        try:
            space = run.net.space
            pick = record.picks.get(name)
            arch = Arch.from_json(pick["arch"]) if pick else space.largest()
            space.validate(arch)
            found = {d: find_clips(run, arch, d, args.split, args.clips) for d in run.datasets}
        finally:
            run.close()
    except (CannotStart, ValueError, OSError) as err:  # of this package, in words
        return without_clips(f"No clips are shown: {err}")
    except Exception as err:  # the network, the data, their readers: the page comes without
        return without_clips(f"No clips are shown: {type(err).__name__}: {err}")
    return contact_sheets(found, name, args.split)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: report(args))


if __name__ == "__main__":
    end_process(main())
