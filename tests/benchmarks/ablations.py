"""What each ingredient of DBMS and of DeltaMix is worth on a real fine-tune: with it, without it, else equal.

    ablations.py scalars  BASE FINETUNED --data TEST --texts TRAIN -o FILE [--codecs delta-come:0.25,…]
    ablations.py deltamix BASE FINETUNED --data TEST -o FILE [--budgets 1,0.25]

scalars    around each codec at its bits: as it is; γ alone, λ alone, both, one pair for the model and one a layer
deltamix   delta-come, and deltamix without either ingredient, with mixed widths alone, with the corrected target alone,
           with both: files of the same measured bytes within 2 %

One JSON line a variant is appended to FILE, which a later run goes on with; then the differences are printed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import make_codec
from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.base_shift import Numbers, Span, fit_scalars, rescaled
from deltaserve.deltas.calibration import load_texts
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.deltas.compress import make_manifest
from deltaserve.deltas.prepare import make_delta
from deltaserve.evaluation.bootstrap import bootstrap_difference
from deltaserve.evaluation.general import builtin_texts
from deltaserve.evaluation.judge import Judge
from deltaserve.evaluation.rows import load_rows

import common

FITS: list[tuple[Numbers, Span]] = [("gamma", "task"), ("shift", "task"), ("both", "task")]
FITS += [("gamma", "layer"), ("shift", "layer"), ("both", "layer")]
INGREDIENTS = {"neither": (False, False), "mixed": (True, False), "corrected": (False, True), "both": (True, True)}
TEXTS = 256
SAME = 0.02  # of the bytes


class Bench:
    """Judges variants and keeps what it saw."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.base, self.finetuned = Checkpoint.open(args.base), Checkpoint.open(args.finetuned)
        self.seen: list[dict[str, Any]] = []
        if args.output.exists():
            self.seen = [json.loads(line) for line in args.output.read_text().splitlines()]
        self._output = args.output
        manifest = make_manifest(self.base, self.finetuned, "none", {})
        self.judge = Judge(
            self.base,
            manifest,
            load_rows(args.data)[: args.limit],
            dtype=torch.bfloat16,
            general=builtin_texts(),
            general_tokens=4096,
        )
        self.texts = load_texts(args.texts, load_tokenizer(self.base.directory, manifest), limit=TEXTS)
        whole = self.judge.prepare(self.finetuned)
        if not any(line["variant"] == "fine-tune" for line in self.seen):
            self._keep("", "fine-tune", asdict(whole))

    def has(self, group: str, variant: str) -> bool:
        return any((line["group"], line["variant"]) == (group, variant) for line in self.seen)

    def measure(self, group: str, variant: str, artifact: Artifact, **more: float) -> None:
        figures = {"bits_per_parameter": artifact.bits_per_parameter, **more, **asdict(self.judge.judge(artifact))}
        self._keep(group, variant, figures)

    def make(self, codec: str, bits: float, out: Path, options: dict[str, Any] | None = None) -> Artifact:
        made = make_codec(codec, Budget(bits=bits), options or {})
        return make_delta(self.base, self.finetuned, made, out, base_shift="none")

    def _keep(self, group: str, variant: str, figures: dict[str, Any]) -> None:
        line = {"group": group, "variant": variant, **figures}
        self.seen.append(line)
        with self._output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        sys.stderr.write(f"{group} {variant}: {figures['exact_match']:.3f}\n")


def scalars(bench: Bench, args: argparse.Namespace, work: Path) -> None:
    for group in args.codecs.split(","):
        codec, bits = group.split(":")
        file = work / "plain.safetensors"
        artifact = bench.make(codec, float(bits), file)
        if not bench.has(group, "as it is"):
            bench.measure(group, "as it is", artifact)
        for numbers, span in FITS:
            variant = f"{numbers}, {span}"
            if not bench.has(group, variant):
                fit = fit_scalars(bench.base, bench.finetuned, artifact, bench.texts, span=span, numbers=numbers)
                copy = Path(shutil.copy(file, work / "fitted.safetensors"))
                changed = rescaled(bench.base, bench.finetuned, Artifact.open(copy), fit.scalars)
                bench.measure(group, variant, changed, held_out_before=fit.before, held_out_after=fit.after)


def deltamix(bench: Bench, args: argparse.Namespace, work: Path) -> None:
    for budget in map(float, args.budgets.split(",")):
        group, file = f"{budget:g} bits", work / "made.safetensors"
        artifact = bench.make("delta-come", budget, file)
        size = artifact.bits_per_parameter
        if not bench.has(group, "delta-come"):
            bench.measure(group, "delta-come", artifact)
        for variant, (mixed, corrected) in INGREDIENTS.items():
            if not bench.has(group, variant):
                options = {"mixed": mixed, "corrected": corrected}
                bench.measure(group, variant, _of_size(bench, size, budget, file, options))


def _of_size(bench: Bench, size: float, budget: float, file: Path, options: dict[str, Any]) -> Artifact:
    """A deltamix file of `size` bits per parameter, which is delta-come's."""
    asked = budget
    for _ in range(4):
        artifact = bench.make("deltamix", asked, file, options)
        if abs(artifact.bits_per_parameter / size - 1) <= SAME:
            return artifact
        asked *= size / artifact.bits_per_parameter
    raise SystemExit(f"deltamix {options}: no file within {SAME:.0%} of {size:.4f} bits")


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Exact match against the group's first line, in points, by paired bootstrap."""
    firsts: dict[str, dict[str, Any]] = {}
    yield "| | variant | bits | exact match | against the first, points | KL, task | KL, general |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for line in lines:
        first = firsts.setdefault(line["group"], line)
        mean, low, high = (100 * value for value in bootstrap_difference(line["hits"], first["hits"]))
        against = "" if line is first else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        kls = [f"{line[name]:.4f}" if line[name] is not None else "" for name in ("kl", "general_kl")]
        bits = f"{line['bits_per_parameter']:.4f}" if "bits_per_parameter" in line else "16"
        cells = [line["group"], line["variant"], bits, f"{100 * line['exact_match']:.1f}", against, *kls]
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scalars", "deltamix"))
    parser.add_argument("base", help="directory or .gguf file")
    parser.add_argument("finetuned", help="directory of the full fine-tune")
    parser.add_argument("--data", type=Path, required=True, help="rows that judge")
    parser.add_argument("--texts", default="builtin", help="rows that scalars are fitted to")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--codecs", default="delta-come:0.25,ultradelta:0.125,delta-dct:0.25,seeded-vq:0.0075")
    parser.add_argument("--budgets", default="1,0.25")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    bench = Bench(args)
    with tempfile.TemporaryDirectory() as work:
        (scalars if args.what == "scalars" else deltamix)(bench, args, Path(work))
    sys.stdout.write("\n".join(table(bench.seen)) + "\n" + json.dumps(common.machine()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
