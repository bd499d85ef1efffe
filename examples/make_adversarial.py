"""Make adversarial versions of the example tiles, each against ONE member of a bundle alone.

    .venv/bin/python examples/make_adversarial.py [BUNDLE] [--member bayesian]

Needs the extra `train`. Every PNG of examples/tiles, named for its class, is attacked by margin-PGD within the bundle's
epsilon, rounded toward the clean pixels and written as PNG, losslessly, into examples/adversarial; so is a README.md
that says how. `make demo` shows what the ensemble makes of them.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.bundle import Bundle, InputSpec, read_bundle
from service.config import ServiceConfig
from service.demo import Attack, true_class
from training.attacks.pgd import Logits, margin, margin_pgd, to_uint8
from training.step import step_generator
from training.system import Members, load_networks

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent

README = """\
# Adversarial tiles

The tiles of `../tiles`, changed a little so that one member of the shipped bundle, asked alone, takes them for something else. They
show what the other members and the detectors make of that: `make demo`. An attack on one member is the easy case; `phalanx-train
attack` attacks the ensemble as a whole, and that is where its robustness is measured.

| | |
| --- | --- |
| attacked member | `{member}` ({strength}), with full knowledge of its weights{masks} |
| bundle | {name} `{version}` |
| perturbation | l-infinity, epsilon = {epsilon:g}/255; no pixel of these files differs by more than {distance} |
| attack | margin-PGD, {starts} starts of {steps} steps of {step:g}, until another class leads by {lead:g} nats; seed {seed} |
| `{member}` alone is wrong on | {fooled} of {tiles} as they lie here; on {wrong} of the clean ones |

The pixels are whole numbers, rounded toward the clean ones. PNG keeps them exactly; a JPEG of them would be another image. Each
file names its member, epsilon and bundle in its PNG text chunks, where the demo reads them. Made with

```
{command}
```

They derive from EuroSAT; attribution in `../tiles/README.md`, MIT licence in `LICENSE`.
"""


@dataclass(frozen=True)
class Made:
    name: str
    pixels: NDArray[np.uint8]  # (h, w, c)
    distance: int  # from the clean tile, the largest of any pixel
    clean_margin: float  # of the attacked member; above 0: it is wrong
    margin: float


@dataclass(frozen=True)
class Settings:
    epsilon: float  # pixel units
    steps: int
    starts: int
    lead: float  # nats by which another class must lead before the attack is content
    seed: int

    @property
    def step(self) -> float:
        """About epsilon/8, but whole: from the clean tile every iterate is then whole, and rounding takes nothing away."""
        return max(1.0, round(self.epsilon / 8))


def attack(logits: Logits, pixels: Tensor, label: int, settings: Settings, generator: torch.Generator) -> Tensor:
    """Pixels (h, w, c) uint8 -> adversarial ones, uint8, within epsilon.

    margin_pgd is content once the margin is above 0; an advantage of `lead` for the true class raises that bar, so that
    the tile still fools the member in another back end.
    """
    clean, y = pixels[None].float(), torch.tensor([label])

    def handicapped(x: Tensor) -> Tensor:
        found = logits(x)
        return found + settings.lead * F.one_hot(y, found.shape[1])

    found = margin_pgd(handicapped, clean, y, settings.epsilon, settings.steps, generator, settings.starts, step_size=settings.step)
    return to_uint8(found.pixels, clean)[0]


def make(path: Path, bundle: Bundle, logits: Logits, settings: Settings) -> Made:
    label = true_class(path, bundle.manifest.classes)
    clean = torch.from_numpy(read_pixels(path, bundle.manifest.input))
    found = attack(logits, clean, label, settings, step_generator(clean.device, settings.seed, path.stem))
    both = torch.stack([clean, found])
    with torch.inference_mode():
        before, after = margin(logits(both), torch.tensor([label, label])).tolist()
    return Made(path.stem, found.numpy(), int((found.short() - clean.short()).abs().max()), before, after)


def read_pixels(path: Path, spec: InputSpec) -> NDArray[np.uint8]:
    """(h, w, c), of the very size that the bundle takes: an attack must not pass through a resize."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("L" if spec.channels == 1 else "RGB")).reshape(image.height, image.width, spec.channels)
    if pixels.shape != spec.shape:
        raise SystemExit(f"{path}: expected height, width and channels {spec.shape}, got {pixels.shape}")
    return pixels


def write(folder: Path, made: Sequence[Made], origin: Attack, readme: str, licence: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    for tile in made:
        Image.fromarray(tile.pixels.squeeze()).save(folder / f"{tile.name}.png", pnginfo=origin.chunks(), optimize=True)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    if licence.is_file():
        shutil.copyfile(licence, folder / "LICENSE")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle = read_bundle(args.bundle)
    names = [member.name for member in bundle.manifest.members]
    if args.member not in names:
        raise SystemExit(f"no member {args.member!r} in {args.bundle}; expected one of {', '.join(names)}")
    members = Members(load_networks(bundle, torch.device("cpu")), bundle.manifest.masks.seed)
    settings = Settings(bundle.manifest.provenance.epsilon, args.steps, args.starts, args.lead, args.seed)
    paths = sorted(args.tiles.glob("*.png"))
    if not paths:
        raise SystemExit(f"no PNG in {args.tiles}")
    made = []
    for path in paths:
        tile = make(path, bundle, lambda x: members.logits(args.member, x), settings)
        outcome = "fooled" if tile.margin > 0 else "not fooled"
        say(f"{tile.name:<26} margin {tile.clean_margin:7.2f} -> {tile.margin:6.2f}  {outcome}")
        made.append(tile)
    origin = Attack(args.member, settings.epsilon, bundle.manifest.version)
    write(args.output, made, origin, describe(bundle, args, settings, made), args.tiles / "LICENSE")
    say(f"{args.member} is wrong on {sum(t.margin > 0 for t in made)} of {len(made)}; written to {args.output}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=ServiceConfig().bundle_path, help="the bundle (default: the one that ships)"
    )
    parser.add_argument("--member", default="bayesian", help="the member to attack (default: %(default)s)")
    parser.add_argument("--tiles", type=Path, default=HERE / "tiles", help="PNGs named for their class (default: examples/tiles)")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "adversarial", help="(default: examples/adversarial)")
    parser.add_argument("--steps", type=int, default=20, help="of each start (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=5, help="the clean tile, then random ones (default: %(default)s)")
    parser.add_argument("--lead", type=float, default=2.0, help="nats by which a wrong class must lead (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random starts (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    return parser.parse_args(arguments)


def describe(bundle: Bundle, args: argparse.Namespace, settings: Settings, made: Sequence[Made]) -> str:
    manifest, member = bundle.manifest, bundle.manifest.member(args.member)
    return README.format(
        member=args.member,
        strength=member.strength,
        masks=" and of the dropout masks it is served with" if member.stochastic else "",
        name=manifest.name,
        version=manifest.version,
        **vars(settings),
        step=settings.step,
        distance=max(tile.distance for tile in made),
        tiles=len(made),
        fooled=sum(tile.margin > 0 for tile in made),
        wrong=sum(tile.clean_margin > 0 for tile in made),
        command=command(args),
    )


def command(args: argparse.Namespace) -> str:
    """The command that makes the same again, from the repository's root; only what is not the default."""
    defaults = vars(parse([]))
    words = [".venv/bin/python", "examples/make_adversarial.py"]
    for name, value in vars(args).items():
        if value == defaults[name] or name in ("threads", "output"):
            continue
        if isinstance(value, Path):
            inside = value.resolve().is_relative_to(REPOSITORY)
            value = value.resolve().relative_to(REPOSITORY) if inside else value.name
        words += [str(value)] if name == "bundle" else [f"--{name}", str(value)]
    return shlex.join(words)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
