"""A checkpoint's whole state as plain safetensors, put together from what its ranks wrote.

    python scripts/consolidate.py runs/vitl --out runs/vitl_state

Writes OUT/supernet.safetensors (float32 weights), OUT/optimizer.safetensors (STATE/PARAMETER, each
shaped like its parameter: exp_avg, exp_avg_sq, with an EMA ema), OUT/counts.safetensors (updates of
every cell of the choice grid, int64), OUT/alphas.safetensors and OUT/position.json. Needs neither
DeepSpeed nor a launcher. To go on training on another number of ranks nothing needs converting:
`--resume` cuts the state anew.
Exit codes: 0 done, 2 the checkpoint or the folder cannot be used.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from vimnas_ds.config import ConfigError
from vimnas_ds.durable import publish_folder
from vimnas_ds.manifest import read_manifest
from vimnas_ds.tensor_file import save_tensors
from vimnas_ds.train.checkpoint import STATE_FILE
from vimnas_ds.train.fragments import whole_states
from vimnas_ds.train.run_files import ALPHAS_FILE, POSITION_FILE, WEIGHTS_FILE, find_checkpoint
from vimnas_ds.train.state_file import read_state


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args(argv)
    try:
        consolidate(find_checkpoint(args.checkpoint), args.out)
    except (ConfigError, OSError, KeyError, ValueError, SafetensorError) as err:
        print(f"cannot consolidate: {err}", file=sys.stderr)
        return 2
    return 0


def consolidate(checkpoint: Path, out: Path) -> None:
    """Write `checkpoint`'s state to the new folder `out`."""
    if out.exists():
        raise FileExistsError(f"{out} is there already: name a folder that is not")
    hidden = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    weights = load_file(str(checkpoint / WEIGHTS_FILE))
    states = whole_states(checkpoint, int(read_manifest(checkpoint).about["world_size"]))
    shaped = {
        key: state.view(weights[key.partition("/")[2]].shape) for key, state in states.items()
    }
    for name in (WEIGHTS_FILE, ALPHAS_FILE, POSITION_FILE):
        shutil.copyfile(checkpoint / name, hidden / name)
    save_tensors(shaped, hidden / "optimizer.safetensors")
    save_tensors(read_state(checkpoint / STATE_FILE)["counts"], hidden / "counts.safetensors")
    publish_folder(hidden, out)
    for file in sorted(out.iterdir()):
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
