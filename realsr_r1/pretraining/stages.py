"""The four trainings from one set of settings, each with a preview while it runs."""

import argparse
import filecmp
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as parquet
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from realsr_r1 import images, perceptual, photographs, sft
from realsr_r1.common import device_of, seed_of, write_text
from realsr_r1.corpus.folders import alone
from realsr_r1.evaluation import peers, sheets
from realsr_r1.evaluation.chains import chain_metrics
from realsr_r1.files.writable import claim
from realsr_r1.photographs import Pairs
from realsr_r1.pipeline import RealSR, find_weights, load_tokenizer
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.pretraining import ending, recipes
from realsr_r1.pretraining.loop import FitConfig, forget, goes_on
from realsr_r1.pretraining.recipes import Machine, PolicyLoss, Run, TokenizerLoss
from realsr_r1.pretraining.redraw import final_codes, redraw
from realsr_r1.sampling import sample
from realsr_r1.tokenizer import TokenizerConfig, VQModel

SHARES = {"tokenizer": 0.35, "policy": 0.45, "decoder": 0.1, "ending": 0.1}  # of "all"
RATES = {"tokenizer": 1.5e-3, "policy": 4e-3, "decoder": 4e-4, "ending": 2e-3}
ON_CPU = {"policy": 12}  # samples a step, else 8
ON_GPU = {"policy": 128}  # else 64
PREVIEW = 24  # validation photographs
ANYWHERE = ("device", "workers", "out")  # settings that change nothing in what is learnt


@dataclass(frozen=True)
class Settings:
    """What `realsr train` takes; see its help."""

    photographs: Path | None = None
    out: Path = Path("runs/nano")
    minutes: float = 60.0
    steps: int = 10**9
    init: Path | None = None
    batch: int | None = None
    lr: float | None = None
    workers: int | None = None
    device: str | None = None
    seed: int = 0
    reuse: int = 1
    vgg: str = ""
    teacher: str = "realesrgan-x4plus"

    @classmethod
    def of(cls, a: argparse.Namespace) -> "Settings":
        return cls(**{k: v for k, v in vars(a).items() if k in cls.__dataclass_fields__})

    def made(self, stage: str) -> bool:
        """Whether a stage was finished in `out` with these settings, wherever it ran."""
        kept = self.out / stage / "settings.json"
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        now = json.loads(json.dumps(asdict(self), default=str))
        return all(before.get(k, "") == v for k, v in now.items() if k not in ANYWHERE)

    def machine(self, stage: str) -> Machine:
        device = str(device_of(self.device))
        workers = self.workers
        if workers is None:
            workers = 0 if device == "cpu" else max(1, (os.cpu_count() or 2) - 1)
        usual = ON_CPU.get(stage, 8) if device == "cpu" else ON_GPU.get(stage, 64)
        batch = self.batch or usual
        few = device == "cpu" or stage == "ending"  # whose teacher works on the CPU
        return Machine(device, batch, workers, draws=48 if few else 1024)

    def fit(self, stage: str) -> FitConfig:
        lr = self.lr or RATES[stage]
        return FitConfig(self.minutes, self.steps, lr, seed=seed_of(stage, self.seed))

    def run(self, stage: str, preview: Callable[[nn.Module], dict]) -> Run:
        return Run(self.out / stage, self.machine(stage), self.fit(stage), preview)


class Preview:
    """Figures and a sheet on fixed validation photographs while a training runs."""

    def __init__(self, settings: Settings, stage: str):
        photos = photographs.load("val", settings.photographs, PREVIEW)
        data = Pairs(photos, training=False)
        self.items = [data[i] for i in range(len(data))]
        machine = settings.machine(stage)
        self.machine, self.path = machine, settings.out / stage / "preview.png"
        stack = {k: torch.stack([x[k] for x in self.items]) for k in ("lr", "hr")}
        self.lr, self.hr = (stack[k].to(machine.device).float() / 255 for k in ("lr", "hr"))

    def lpips(self, y: Tensor) -> float:
        return round(float(perceptual.distance(y, self.hr).mean()), 4)

    @torch.no_grad()
    def decoder(self, policy: ChainPolicy) -> Callable[[VQModel], dict[str, float]]:
        policy = policy.to(self.machine.device).eval()
        drawn = sample(policy, self.lr, generator=torch.Generator().manual_seed(0)).codes

        @torch.no_grad()
        def preview(model: VQModel) -> dict[str, float]:
            return self.tokenizer(model) | {
                "lpips, chain": self.lpips(model.decode(drawn, self.lr))
            }

        return preview

    def sheet(self, columns: dict[str, Tensor]) -> None:
        rows = [[c[i].cpu() for c in columns.values()] for i in range(min(6, len(self.hr)))]
        sheets.grid(rows, list(columns)).save(self.path)

    @torch.no_grad()
    def tokenizer(self, model: VQModel) -> dict[str, float]:
        codes = model.encode(self.hr)
        made = {"codes": model.decode(codes), "LR": model.decode(lr=self.lr)}
        made["both"] = model.decode(codes, self.lr)
        self.sheet({"HR": self.hr, **made})
        return {f"lpips, {k}": self.lpips(y) for k, y in made.items()}

    @torch.no_grad()
    def policy(self, tokenizer: VQModel) -> Callable[[ChainPolicy], dict[str, float]]:
        steps = tokenizer.encode_steps(self.hr)
        alone = tokenizer.decode(lr=self.lr)

        @torch.no_grad()
        def preview(policy: ChainPolicy) -> dict[str, float]:
            batch = sft.collate(policy.vocabulary)(self.items)
            ids = sft.fill(policy, batch["ids"].to(self.machine.device), steps)
            out = {k: float(v.mean()) for k, v in chain_metrics(policy, ids, self.lr).items()}
            codes = final_codes(policy, redraw(policy, ids, self.lr, 0.8))
            drawn = tokenizer.decode(codes, self.lr)
            self.sheet({"HR": self.hr, "LR alone": alone, "drawn": drawn})
            out |= {"lpips, LR": self.lpips(alone), "lpips, drawn": self.lpips(drawn)}
            return {k: round(v, 4) for k, v in out.items()}

        return preview


def pictures(where: str | Path, name: str) -> list[SimpleNamespace]:
    """Pictures without annotation, at their own size, for crops of fine texture, from
    `name`-*.parquet of a folder; [] where there are none."""
    files = sorted(Path(where).glob(f"{name}-*.parquet"))
    rows = parquet.read_table(files, columns=["image"])["image"].to_pylist() if files else []
    return [SimpleNamespace(image=partial(images.open_photo, r)) for r in rows]


def _crops(s: Settings, what: str) -> recipes.Mixture:
    """Crops under all damage; for the ending, half of them under light damage."""
    photos = photographs.load("train", s.photographs)
    others = [pictures(s.photographs, n) if s.photographs else [] for n in ("general", "large")]
    presets = ("nano", "nano-light") if what == "ending" else ("nano",)
    return recipes.crops(photos, *others, seed_of(what, s.seed), presets)


def _tokenizer(s: Settings, start: VQModel | None) -> VQModel:
    torch.manual_seed(s.seed)
    model = start or VQModel(TokenizerConfig())
    run = s.run("tokenizer", Preview(s, "tokenizer").tokenizer)
    return recipes.train_tokenizer(
        model, _crops(s, "tokenizer"), run, TokenizerLoss(vgg_file=s.vgg)
    )


def _policy(s: Settings, tokenizer: VQModel, start: ChainPolicy | None) -> ChainPolicy:
    torch.manual_seed(s.seed)
    policy = start or ChainPolicy(PolicyConfig(codes=tokenizer.config.codes, dropout=0.1))
    if start is None:
        policy.start_from(tokenizer, s.seed)
    data = Pairs(photographs.load("train", s.photographs), seed=seed_of("policy", s.seed))
    tokenizer = tokenizer.to(s.machine("policy").device).eval()
    run = s.run("policy", Preview(s, "policy").policy(tokenizer))
    return recipes.train_policy(policy, tokenizer, data, run, PolicyLoss(reuse=s.reuse))


def _decoder(s: Settings, model: RealSR, what: str) -> VQModel:
    torch.manual_seed(s.seed)
    run = s.run(what, Preview(s, what).decoder(model.policy))
    if what == "ending":
        return ending.train_ending(model, _crops(s, what), run, peers.load(s.teacher))
    data = Pairs(photographs.load("train", s.photographs), seed=seed_of(what, s.seed))
    loss = TokenizerLoss(l1=3.0, adversary=0.02, see_lr=0.75, vgg_file=s.vgg)
    return recipes.train_decoder(model.tokenizer, model.policy, data, run, loss)


def finish(run: Path, part: nn.Module, weights: Path, settings: Settings) -> None:
    """Write the trained weights in half precision, and drop the checkpoint they came from. A second
    ending goes to a file of its own, beside the tokenizer's."""
    clean = weights / "clean.safetensors"
    if run.name == "ending":
        weights.mkdir(parents=True, exist_ok=True)
        state = {k: v for k, v in part.half().state_dict().items() if ".clean." in k}
        save_file({k: v.contiguous() for k, v in state.items()}, clean)
    else:
        part.half().save_pretrained(weights)
        if run.name in ("tokenizer", "decoder"):  # an ending belongs to the weights before
            clean.unlink(missing_ok=True)
    part.float()
    (weights / "README.md").unlink(missing_ok=True)  # the hub's empty card
    write_text(run / "settings.json", json.dumps(asdict(settings), default=str, indent=1))
    forget(run)


def run(what: str, settings: Settings) -> None:
    """Train `what`: a stage of SHARES or "all", which shares the minutes, starts the first stage
    alone from `init`, and passes over the first ones that were finished with the same settings;
    what builds on a stage that is trained anew begins anew, too. The ending is left out where its
    teacher is missing. Weights go to `out`, where
    `RealSR.from_pretrained(out)` finds them; the log and a preview to `out`/<stage>.

    Raises ValueError where a stage lacks what it builds on."""
    if what != "all":
        _stage(what, settings)
        return
    if lacks := peers.missing(settings.teacher):
        print(f"the ending will be left out, without its teacher: {lacks}", flush=True)
    anew = False
    for stage, share in SHARES.items():
        if stage == "ending" and lacks:
            break
        part = replace(settings, minutes=settings.minutes * share)
        part = part if stage == "tokenizer" else replace(part, init=None)
        if not anew and part.made(stage):
            print(f"{stage}: finished before with these settings, passed over", flush=True)
            continue
        anew = True
        _stage(stage, part)


def bring(home: Path, out: Path, *parts: str) -> None:
    """Copy weights from `home` to `out`, so that it can be used by itself. ValueError where `out`
    holds others: what is trained beside them would not fit."""
    for part in parts if home.resolve() != out.resolve() else ():
        source, place = home / part, out / part
        if not place.exists():
            shutil.copytree(source, place)
        files = {f.name for x in (source, place) for f in x.glob("*.safetensors")}
        if len(filecmp.cmpfiles(source, place, files, shallow=False)[0]) < len(files):
            raise ValueError(
                f"{out} holds another {part} than {home}: choose another --out, or start from there"
            )


def outdate(what: str, out: Path) -> None:
    """What builds on a stage that is being trained begins anew, however this training ends;
    policies that would be used although they belong to what was before are put aside."""
    put_aside = {"tokenizer": ("policy-sft", "policy-grpo"), "policy": ("policy-grpo",)}
    for name in put_aside.get(what, ()):
        if (out / name).exists():
            shutil.rmtree(out / f"{name}.before", ignore_errors=True)
            (out / name).rename(out / f"{name}.before")
    stages = list(SHARES)
    for later in stages[stages.index(what) + 1 :]:
        forget(out / later)
        (out / later / "settings.json").unlink(missing_ok=True)


def _begin(what: str, s: Settings) -> None:
    """See `goes_on`; then what builds on this stage is outdated."""
    longer = (*ANYWHERE, "minutes", "steps")
    goes_on(s.out / what, {k: v for k, v in asdict(s).items() if k not in longer})
    outdate(what, s.out)


def _stage(what: str, s: Settings) -> None:
    home = s.init or s.out
    if (s.init or what != "tokenizer") and not (home / "tokenizer/model.safetensors").exists():
        raise ValueError(f"{home} holds no tokenizer: train one first (realsr train tokenizer)")
    if what not in ("tokenizer", "policy") and not (home / "policy-sft").exists():
        raise ValueError(f"{home} holds no policy: train one first (realsr train policy)")
    for split in ("train", "val"):  # what is missing is told before anything is put aside
        photographs.load(split, s.photographs, 1)
    if s.vgg and not Path(s.vgg).exists():
        raise ValueError(f"{s.vgg} does not exist: check --vgg")
    if what == "ending":
        peers.load(s.teacher)
    s.out.mkdir(parents=True, exist_ok=True)
    with alone(s.out, "training"):  # one stage builds on another, and outdates it
        _train(what, s, home)


def _train(what: str, s: Settings, home: Path) -> None:
    device = s.machine(what).device
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    if what == "tokenizer":
        start = load_tokenizer(home / what) if s.init else None
        _begin(what, s)
        finish(s.out / what, _tokenizer(s, start), s.out / what, s)
        return
    if what == "policy":
        bring(home, s.out, "tokenizer")
        known = s.init and (home / "policy-sft").exists()
        start = RealSR.from_pretrained(home, device, "policy-sft").policy if known else None
        _begin(what, s)
        policy = _policy(s, load_tokenizer(home / "tokenizer"), start)
        finish(s.out / what, policy, s.out / "policy-sft", s)
        return
    bring(home, s.out, "tokenizer", "policy-sft")
    start = RealSR.from_pretrained(home, device, "policy-sft")
    _begin(what, s)
    finish(s.out / what, _decoder(s, start, what), s.out / "tokenizer", s)


def reinforce(
    model: str,
    folder: Path | None,
    names: list[str],
    out: Path,
    settings,
    device: str | None = None,
) -> None:
    """GRPO from `model` on photographs of the train split, rewards by name (see `realsr train grpo
    --help`); the policy goes to `out`/policy-grpo beside a copy of the tokenizer."""
    from realsr_r1 import grpo, rewards
    from realsr_r1.ablations import rewards as variants
    from realsr_r1.evaluation.experts import load_expert
    from realsr_r1.pretraining.placed import PlacedTrainer
    from realsr_r1.pretraining.sharded import ShardedTrainer

    start = RealSR.from_pretrained(model, device, "policy-sft")
    known = {
        "format": lambda: rewards.format_reward,
        "degradation": lambda: rewards.degradation_reward,
        "understanding": lambda: rewards.understanding_reward,
        "generation": lambda: rewards.GenerationReward(load_expert(), start.tokenizer),
        "reference": lambda: variants.ReferenceReward(start.tokenizer),
    }
    photos, place = photographs.load("train", folder), out / "policy-grpo"
    fixed = {"model": model, "photographs": folder, "rewards": names} | asdict(settings)
    fixed.pop("steps")  # a run may well be made longer
    first = os.environ.get("RANK", "0") == "0"  # of several processes
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, "training") if first else nullcontext():  # as a stage: it may put this aside
        if first:
            bring(find_weights(model), out, "tokenizer")
            claim(place / "settings.json", fixed)
        seed = seed_of("grpo", settings.seed)
        data = grpo.prompts(photos, settings.steps * settings.prompts, seed=seed)
        if names == ["place"]:
            trainer = PlacedTrainer(start, data, place, settings, device)
        else:
            chosen = [known[n]() for n in names]
            trainer = ShardedTrainer(start.policy, data, chosen, place, settings, device)
        grpo.finish(trainer)
