"""Miniature methods, one for each hard demand on the contract; float64, a few hundred parameters.

Each is written as a method author would write it, and none has a line of its own in the engine.
`MINIATURES[name](seed, steps)` gives `(stages, settings)`: `seed` decides the players' initial
weights alone, so a resumed run built with another seed must take every weight from its checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from visiondistill.engine import Batch, Carry, Draw, Method, Optim, Stage, Terms, Turn, gather_across, mean_across
from visiondistill.engine.rng import key

ROWS, CLASSES, BATCH = 64, 3, 8
SETTINGS = {"batch_size": BATCH, "noise_block": 2, "ema_decay": 0.9}

Stages = tuple[list[Stage], dict[str, Any]]


class Table:
    """Tensors in memory as a `Stream`: epoch permutations laid end to end, cut into global batches."""

    def __init__(self, batch_size: int = BATCH, **columns: Tensor) -> None:
        self.batch_size = batch_size
        self.columns = columns

    def open(
        self, start: int, rows: Sequence[tuple[int, int]], seed: int, device: torch.device
    ) -> Iterator[list[Batch]]:
        for step in itertools.count(start):
            index = self._index(step, seed)
            yield [{name: column[index[low:high]] for name, column in self.columns.items()} for low, high in rows]

    def _index(self, step: int, seed: int) -> Tensor:
        length = len(next(iter(self.columns.values())))
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {
            epoch: torch.randperm(length, generator=torch.Generator().manual_seed(key(seed, epoch)))
            for epoch in {place // length for place in places}
        }
        return torch.stack([orders[place // length][place % length] for place in places])


def images(seed: int = 0, batch_size: int = BATCH) -> Table:
    """Labelled 4x4 images in [0, 1] whose classes differ in mean brightness."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(ROWS) % CLASSES
    noise = torch.rand(ROWS, 1, 4, 4, generator=generator, dtype=torch.float64)
    return Table(batch_size, image=(noise + label.view(-1, 1, 1, 1)) / CLASSES, label=label, index=torch.arange(ROWS))


def points(*names: str) -> Table:
    """Columns of 2-d points, each from a normal of its own centre."""
    generator = torch.Generator().manual_seed(0)
    return Table(
        **{
            name: torch.randn(ROWS, 2, generator=generator, dtype=torch.float64) * 0.3 + centre
            for centre, name in enumerate(names)
        }
    )


def built(seed: int, build: Callable[[], nn.Module]) -> Any:
    """`build()` in float64 with initial weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


class TinyNet(nn.Module):
    """Two convolutional stages and a linear head, with timm's `forward_intermediates`."""

    def __init__(self, width: int = 4, norm: str = "group", dropout: float = 0.0, outputs: int = CLASSES) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([_stage(1, width, norm), _stage(width, 2 * width, norm)])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, outputs)

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for stage in self.trunk:
            x = stage(x)
            features.append(x)
        return x, features

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(self.dropout(features.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_intermediates(x)[0])


def _stage(inputs: int, outputs: int, norm: str) -> nn.Sequential:
    norms = {"group": nn.GroupNorm(1, outputs), "batch": nn.BatchNorm2d(outputs)}
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), norms[norm], nn.SiLU())


class PointNet(nn.Module):
    """MLP from a 2-d point and a noise level or time `[B, 1]` to a point: `x + net(x, time)`."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.outer = nn.Linear(width, 2)

    def features(self, x: Tensor, time: Tensor) -> Tensor:
        return self.inner(torch.cat([x, time], dim=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.outer(self.features(x, time))


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) per row, of logits `[B, K]`."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)


# ---------------------------------------------------------------------------------------------------------------------


class Hint(Method):
    """KD with a feature hint (FitNets) through `forward_intermediates`, its weight rising from 0.

    The hint is for the first half of the global batch: one of two processes has no row for its projector.
    """

    def __init__(self, student: nn.Module, projector: nn.Module, teacher: nn.Module) -> None:
        super().__init__({"student": student, "projector": projector}, {"teacher": teacher}, {"train": images()})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student", "projector")),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        image = batch["train"]["image"]
        image = image + 0.1 * draw.normal("image", *image.shape[1:]).to(image)
        feature, _ = self.frozen["teacher"].forward_intermediates(image)
        ramp = torch.full((), min(draw.step / 10, 1.0), dtype=image.dtype, device=image.device)
        return batch | {
            "image": image,
            "teacher_feature": feature,
            "teacher_logits": self.frozen["teacher"].forward_head(feature),
            "hint_weight": 2 * ramp * (torch.arange(*draw.rows[""], device=image.device) < BATCH // 2),
        }

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        student = self.players["student"]
        feature, _ = student.forward_intermediates(batch["image"])
        logits = student.forward_head(feature)
        hint = (self.players["projector"](feature) - batch["teacher_feature"]).square().mean((1, 2, 3))
        return {
            "label/ce": F.cross_entropy(logits, batch["train"]["label"]),
            "teacher/kl": kl(logits, batch["teacher_logits"]).mean(),
            "teacher/hint": (batch["hint_weight"] * hint).mean(),
        }, {}


def hint(seed: int, steps: int = 20) -> Stages:
    method = Hint(
        student=built(seed, TinyNet),
        projector=built(seed + 1, lambda: nn.Conv2d(8, 12, 1)),
        teacher=built(1001, lambda: TinyNet(width=6)),
    )
    optim = {"student": Optim(lr=1e-2, clip=1.0, weight_decay=0.1), "projector": Optim("sgd", lr=0.1)}
    return [Stage(method, steps, optim)], SETTINGS


class DMD2(Method):
    """DMD2 with its GAN head on the fake score's features; student every fifth step, critic on every step."""

    def __init__(self, generator: nn.Module, fake: nn.Module, head: nn.Module, real: nn.Module) -> None:
        super().__init__({"generator": generator, "fake": fake, "head": head}, {"real": real}, {"train": points("x")})

    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("student", self.student_loss, moves=("generator",), every=5),
            Turn("critic", self.critic_loss, moves=("fake", "head")),
        )

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        x = batch["train"]["x"]
        for turn in ("student", "critic", "real"):
            batch = batch | {
                f"{turn}_sigma": (4 * draw.uniform(f"{turn} sigma", 1).to(x) - 2).exp(),
                f"{turn}_noise": draw.normal(f"{turn} noise", 2).to(x),
            }
        batch["latent"] = draw.normal("latent", 2).to(x)
        # Images of the student's turn come to the critic by the carry, from before the student's update.
        return batch if "student" in due else batch | {"images": self.generate(batch["latent"])}

    def generate(self, latent: Tensor) -> Tensor:
        return self.players["generator"](latent, torch.ones_like(latent[:, :1]))

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        x, sigma, fake = self.generate(batch["latent"]), batch["student_sigma"], self.players["fake"]
        noised = x + sigma * batch["student_noise"]
        with torch.no_grad():
            real_x0 = self.frozen["real"](noised, sigma.log())
            field = (fake(noised, sigma.log()) - real_x0) / (x - real_x0).abs().mean(1, keepdim=True)
        logit = self.players["head"](fake.features(noised, sigma.log()))
        return {
            "dmd": 0.5 * F.mse_loss(x, (x - field).detach()),
            "gan": 0.1 * F.softplus(-logit).mean(),
        }, {"images": x}

    def critic_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        x, sigma, fake = batch["images"], batch["critic_sigma"], self.players["fake"]
        noised = x + sigma * batch["critic_noise"]
        denoised = fake(noised, sigma.log())
        real = batch["train"]["x"] + batch["real_sigma"] * batch["real_noise"]
        head = self.players["head"]
        return {
            "denoise": ((1 + 1 / sigma**2) * (denoised - x) ** 2).mean(),
            "gan": F.softplus(head(fake.features(noised, sigma.log()))).mean()
            + F.softplus(-head(fake.features(real, batch["real_sigma"].log()))).mean(),
        }, {}


def dmd2(seed: int, steps: int = 20) -> Stages:
    method = DMD2(
        generator=built(seed, PointNet),
        fake=built(seed + 1, PointNet),
        head=built(seed + 2, lambda: nn.Linear(12, 1)),
        real=built(1001, PointNet),
    )
    optim = {"generator": Optim(lr=1e-2, options={"betas": [0.0, 0.99]}), "default": Optim(lr=1e-2, clip=10.0)}
    return [Stage(method, steps, optim)], SETTINGS


class Mutual(Method):
    """Deep mutual learning: two players in one turn, with different optimisers and schedules."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__({"left": left, "right": right}, streams={"train": images()})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("both", self.loss, moves=("left", "right")),)

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        image, label = batch["train"]["image"], batch["train"]["label"]
        left, right = self.players["left"](image), self.players["right"](image)
        return {
            "left/ce": F.cross_entropy(left, label),
            "left/kl": kl(left, right.detach()).mean(),
            "right/ce": F.cross_entropy(right, label),
            "right/kl": kl(right, left.detach()).mean(),
        }, {}


def mutual(seed: int, steps: int = 20) -> Stages:
    method = Mutual(left=built(seed, TinyNet), right=built(seed + 1, lambda: TinyNet(width=6)))
    optim = {
        "left": Optim("sgd", lr=0.1, clip=0.5, options={"momentum": 0.9}),
        "right": Optim(lr=1e-2, schedule="cosine", warmup=3),
    }
    return [Stage(method, steps, optim)], SETTINGS


class Projected(Method):
    """DHKD's alignment: where the groups' gradients conflict, the teacher's loses its part along the label's."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__({"student": student}, {"teacher": teacher}, {"train": images()})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",), combine=project),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        return batch | {"teacher_logits": self.frozen["teacher"](batch["train"]["image"])}

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        label, teacher = self.players["student"](batch["train"]["image"]).split(CLASSES, dim=1)
        return {
            "label/ce": F.cross_entropy(label, batch["train"]["label"]),
            "teacher/kl": 0.5 * kl(teacher, batch["teacher_logits"]).mean(),
            "teacher/mse": 0.5 * F.mse_loss(teacher, batch["teacher_logits"]),
        }, {}


def project(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    label, teacher = groups["label"], groups["teacher"]
    along = sum((label[name] * teacher[name]).sum() for name in label)
    square = sum(gradient.square().sum() for gradient in label.values())
    conflict = (along / square).clamp(max=0.0)
    return {name: label[name] + teacher[name] - conflict * label[name] for name in label}


def projected(seed: int, steps: int = 20) -> Stages:
    method = Projected(
        student=built(seed, lambda: TinyNet(outputs=2 * CLASSES)),
        teacher=built(1001, lambda: TinyNet(width=6)),
    )
    return [Stage(method, steps, {"student": Optim(lr=1e-2, clip=0.5)})], SETTINGS


class Bilevel(Method):
    """TGeo-KD: a weighting net learns from the validation loss after one virtual step of the student."""

    VIRTUAL_RATE = 0.5

    def __init__(self, student: nn.Module, weighting: nn.Module, teacher: nn.Module) -> None:
        streams = {"train": images(), "valid": images(seed=1, batch_size=2 * BATCH)}
        super().__init__({"student": student, "weighting": weighting}, {"teacher": teacher}, streams)

    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("weighting", self.weighting_loss, moves=("weighting",), every=2, accumulate=False),
            Turn("student", self.student_loss, moves=("student",)),
        )

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        image = batch["valid"]["image"]
        return batch | {
            "teacher_logits": self.frozen["teacher"](batch["train"]["image"]),
            "valid_image": image + 0.1 * draw.of("valid").normal("image", *image.shape[1:]).to(image),
        }

    def weights(self, logits: Tensor, batch: Batch) -> Tensor:
        """The teacher's share `[B]` in each row's loss."""
        truth = F.one_hot(batch["train"]["label"], CLASSES).to(logits)
        views = [logits.detach().softmax(1), batch["teacher_logits"].softmax(1), truth]
        return self.players["weighting"](torch.cat(views, dim=1)).sigmoid().squeeze(1)

    def fused(self, logits: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        label = F.cross_entropy(logits, batch["train"]["label"], reduction="none")
        return (weights * kl(logits, batch["teacher_logits"]) + (1 - weights) * label).mean()

    def weighting_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        student, image = self.players["student"], batch["train"]["image"]
        parameters = dict(student.named_parameters())
        weights = self.weights(student(image), batch)

        def inner(parameters: dict[str, Tensor]) -> Tensor:
            return self.fused(functional_call(student, parameters, (image,)), weights, batch)

        step = {name: mean_across(gradient) for name, gradient in grad(inner)(parameters).items()}
        virtual = {name: value - self.VIRTUAL_RATE * step[name] for name, value in parameters.items()}
        logits = functional_call(student, virtual, (batch["valid_image"],))
        return {"valid": F.cross_entropy(logits, batch["valid"]["label"])}, {}

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        logits = self.players["student"](batch["train"]["image"])
        return {"fused": self.fused(logits, self.weights(logits, batch).detach(), batch)}, {}


def bilevel(seed: int, steps: int = 20) -> Stages:
    method = Bilevel(
        student=built(seed, TinyNet),
        weighting=built(
            seed + 1, lambda: nn.Sequential(nn.Linear(3 * CLASSES, 8), nn.LeakyReLU(0.01), nn.Linear(8, 1))
        ),
        teacher=built(1001, lambda: TinyNet(width=6)),
    )
    return [Stage(method, steps, {"default": Optim(lr=1e-2), "weighting": Optim(lr=5e-2)})], SETTINGS


class Adversarial(Method):
    """HARD: an augmentor maximises the disagreement of teacher and student, and declines where it is large already."""

    def __init__(self, student: nn.Module, augmentor: nn.Module, teacher: nn.Module, limit: float) -> None:
        super().__init__({"student": student, "augmentor": augmentor}, {"teacher": teacher}, {"train": images()})
        self.limit = limit

    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("augmentor", self.augmentor_loss, moves=("augmentor",)),
            Turn("student", self.student_loss, moves=("student",)),
        )

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        image = batch["train"]["image"]
        return batch | {
            "noise": draw.normal("noise", *image.shape[1:]).to(image),
            "teacher_logits": self.frozen["teacher"](image),
        }

    def augmentor_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        image, teacher = batch["train"]["image"], self.frozen["teacher"]
        hard = image + 0.5 * self.players["augmentor"](torch.cat([image, batch["noise"]], dim=1)).tanh()
        answer = teacher(hard)
        disagreement = kl(self.players["student"](hard), answer).mean()
        return {
            "disagreement": -disagreement,
            "stay": 0.5 * kl(answer, batch["teacher_logits"]).mean(),
        }, {"hard": hard, "hard_logits": answer, "skip": disagreement - self.limit}

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        student = self.players["student"]
        return {
            "clean": kl(student(batch["train"]["image"]), batch["teacher_logits"]).mean(),
            "hard": kl(student(batch["hard"]), batch["hard_logits"]).mean(),
        }, {}


def adversarial(seed: int, steps: int = 20, limit: float = 0.005, norm: str = "group", dropout: float = 0.0) -> Stages:
    method = Adversarial(
        student=built(seed, lambda: TinyNet(norm=norm, dropout=dropout)),
        augmentor=built(seed + 1, lambda: nn.Conv2d(2, 1, 3, padding=1)),
        teacher=built(1001, lambda: TinyNet(width=6)),
        limit=limit,
    )
    return [Stage(method, steps, {"student": Optim(lr=1e-2), "augmentor": Optim(lr=5e-2)})], SETTINGS


class Images(nn.Module):
    """Learned images in [0, 1], two per class."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Parameter(torch.rand(2 * CLASSES, 1, 4, 4))
        self.register_buffer("labels", torch.arange(2 * CLASSES) % CLASSES)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.pixels * 1.0, self.labels


class GradientMatching(Method):
    """Data-set condensation: images whose training gradient points as the real one does, on a fresh net each step."""

    def __init__(self, synthetic: nn.Module, net: nn.Module) -> None:
        super().__init__({"images": synthetic}, {"net": net}, {"train": images()})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("images", self.loss, moves=("images",), accumulate=False),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        weights = {
            name: draw.shared.normal(name, *value.shape).to(value) * 0.3
            for name, value in self.frozen["net"].named_parameters()
        }
        return batch | {"weights": weights}

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        pixels, labels = self.players["images"]()
        real = self.gradient(batch["weights"], batch["train"]["image"], batch["train"]["label"])
        ours = self.gradient(batch["weights"], pixels, labels)
        angles = [1 - F.cosine_similarity(ours[name].flatten(), mean_across(real[name].flatten()), 0) for name in ours]
        return {"match": torch.stack(angles).sum()}, {}

    def gradient(self, weights: dict[str, Tensor], image: Tensor, label: Tensor) -> dict[str, Tensor]:
        net = self.frozen["net"]
        return grad(lambda weights: F.cross_entropy(functional_call(net, weights, (image,)), label))(weights)

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        return {"players.images.pixels": self.players["images"].pixels.clamp(0, 1)}


def matching(seed: int, steps: int = 20) -> Stages:
    method = GradientMatching(built(seed, Images), built(1001, TinyNet))
    return [Stage(method, steps, {"images": Optim(lr=0.1)})], SETTINGS


class Bank(Method):
    """Instance discrimination against a memory bank, whose decay is a schedule kept as state."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__({"student": student}, streams={"train": images()})
        bank = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("bank", F.normalize(bank, dim=1))
        self.register_buffer("decay", torch.tensor(0.1, dtype=torch.float64))

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",)),)

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        embedding = F.normalize(self.players["student"](batch["train"]["image"]), dim=1)
        index = batch["train"]["index"]
        loss = F.cross_entropy(embedding @ self.bank.T / 0.2, index)
        return {"instance": loss}, {"index": index, "embedding": embedding}

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        rows, values = gather_across(carry["index"]), gather_across(carry["embedding"])
        mixed = F.normalize(self.decay * self.bank[rows] + (1 - self.decay) * values, dim=1)
        return {"bank": (rows, mixed), "decay": 0.9 * self.decay + 0.1 * 0.5}


def bank(seed: int, steps: int = 20) -> Stages:
    return [Stage(Bank(built(seed, lambda: TinyNet(outputs=4))), steps, {"student": Optim(lr=1e-2)})], SETTINGS


class FlowMap(Method):
    """FreeFlow's prediction objective: no data, the teacher is asked along the student's own path."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__({"student": student}, {"teacher": teacher})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",)),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        like = next(self.parameters())
        return batch | {"z": draw.normal("z", 2).to(like), "elapsed": draw.uniform("elapsed", 1).to(like)}

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        z, elapsed, student = batch["z"], batch["elapsed"], self.players["student"]
        average, slope = jvp(lambda elapsed: student(z, elapsed), (elapsed,), (torch.ones_like(elapsed),))
        velocity = self.frozen["teacher"](z + elapsed * average, 1 - elapsed)
        return {"prediction": F.mse_loss(average, (velocity - elapsed * slope).detach())}, {}


def flow_map(seed: int, steps: int = 20) -> Stages:
    method = FlowMap(built(seed, PointNet), built(1001, PointNet))
    return [Stage(method, steps, {"student": Optim(lr=1e-2)})], SETTINGS


class Preference(Method):
    """Diffusion-DPO of a LoRA denoiser; its reference is the adapter switched off. A judge reads its features."""

    BETA = 20.0

    def __init__(self, policy: nn.Module, judge: nn.Module) -> None:
        super().__init__({"policy": policy, "judge": judge}, streams={"pairs": points("loser", "winner")})

    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("policy", self.policy_loss, moves=("policy",), every=2),
            Turn("judge", self.judge_loss, moves=("judge",)),
        )

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        like = batch["pairs"]["winner"]
        batch = batch | {"time": draw.uniform("time", 1).to(like), "noise": draw.normal("noise", 2).to(like)}
        with self.players["policy"].disable_adapter():
            reference = {side: self.error(side, batch) for side in ("winner", "loser")}
        return batch | {"reference": reference}

    def noised(self, side: str, batch: Batch) -> Tensor:
        return (1 - batch["time"]) * batch["pairs"][side] + batch["time"] * batch["noise"]

    def error(self, side: str, batch: Batch) -> Tensor:
        predicted = self.players["policy"](self.noised(side, batch), batch["time"])
        return (predicted - batch["noise"]).square().mean(1)

    def policy_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        margin = {side: self.error(side, batch) - batch["reference"][side] for side in ("winner", "loser")}
        return {"dpo": -F.logsigmoid(-0.5 * self.BETA * (margin["winner"] - margin["loser"])).mean()}, {}

    def judge_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        # The policy's features keep their graph: only the engine's flags keep this turn from training the policy.
        policy, judge = self.players["policy"], self.players["judge"]
        score = {s: judge(policy.features(self.noised(s, batch), batch["time"])) for s in ("winner", "loser")}
        return {"rank": F.softplus(score["loser"] - score["winner"]).mean()}, {}


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = built(1001, PointNet)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["inner.2", "outer"]))


def preference(seed: int, steps: int = 20) -> Stages:
    method = Preference(built(seed, adapted), built(seed + 1, lambda: nn.Linear(12, 1, bias=False)))
    return [Stage(method, steps, {"default": Optim(lr=2e-2)})], SETTINGS


class Relational(Method):
    """RKD's distances: a loss of the whole global batch, on gathered embeddings."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__({"student": student}, {"teacher": teacher}, {"train": images()})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",), accumulate=False),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        return batch | {"teacher_logits": self.frozen["teacher"](batch["train"]["image"])}

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        logits = self.players["student"](batch["train"]["image"])
        ours, theirs = distances(gather_across(logits)), distances(gather_across(batch["teacher_logits"]))
        return {
            "label/ce": F.cross_entropy(logits, batch["train"]["label"]),
            "teacher/distance": F.smooth_l1_loss(ours, theirs),
        }, {}


def distances(x: Tensor) -> Tensor:
    """Distances of all pairs, `[B * (B - 1) / 2]`, in units of their mean."""
    pairs = F.pdist(x)
    return pairs / pairs.mean()


def relational(seed: int, steps: int = 20) -> Stages:
    method = Relational(built(seed, TinyNet), built(1001, lambda: TinyNet(width=6)))
    return [Stage(method, steps, {"student": Optim(lr=1e-2)})], SETTINGS


class Probe(Method):
    """A turn that is played whole after one that is not, on what the student said before it was moved."""

    def __init__(self, student: nn.Module, probe: nn.Module) -> None:
        super().__init__({"student": student, "probe": probe}, streams={"train": images()})

    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("student", self.student_loss, moves=("student",)),
            Turn("probe", self.probe_loss, moves=("probe",), accumulate=False),
        )

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        return batch | {"before": self.players["student"](batch["train"]["image"])}

    def student_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        logits = self.players["student"](batch["train"]["image"])
        return {"label/ce": F.cross_entropy(logits, batch["train"]["label"])}, {"logits": logits}

    def probe_loss(self, batch: Batch) -> tuple[Terms, Carry]:
        found = gather_across(self.players["probe"](batch["before"]))
        return {"distance": F.smooth_l1_loss(distances(found), distances(gather_across(batch["logits"] ** 2)))}, {}


def probe(seed: int, steps: int = 20) -> Stages:
    method = Probe(built(seed, TinyNet), built(seed + 1, lambda: nn.Linear(CLASSES, 4, bias=False)))
    return [Stage(method, steps, {"default": Optim(lr=5e-2)})], SETTINGS


class Labels(Method):
    """Cross-entropy alone."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__({"student": student}, streams={"train": images()})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",)),)

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        logits = self.players["student"](batch["train"]["image"])
        return {"label/ce": F.cross_entropy(logits, batch["train"]["label"])}, {}


class Distil(Method):
    """KD from a teacher that an earlier stage made; hands both networks on."""

    def __init__(self, student: nn.Module, teacher: nn.Module, label: bool) -> None:
        super().__init__({"student": student}, {"teacher": teacher}, {"train": images()})
        self.label = label

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",)),)

    def prepare(self, batch: Batch, draw: Draw, due: frozenset[str]) -> Batch:
        return batch | {"teacher_logits": self.frozen["teacher"](batch["train"]["image"])}

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        logits = self.players["student"](batch["train"]["image"])
        terms = {"teacher/kl": kl(logits, batch["teacher_logits"]).mean()}
        if self.label:
            terms["label/ce"] = F.cross_entropy(logits, batch["train"]["label"])
        return terms, {}

    def handover(self) -> tuple[nn.Module, nn.Module]:
        return self.players["student"], self.frozen["teacher"]


def stages(seed: int, steps: int = 20, norm: str = "group", dropout: float = 0.0) -> Stages:
    """Train a teacher, distil it, then drop the label term: the last stage keeps the student and its optimiser."""
    student = built(seed + 1, lambda: TinyNet(norm=norm, dropout=dropout))
    optim = {"student": Optim(lr=1e-2)}
    length = steps // 3
    return [
        Stage(Labels(built(seed, lambda: TinyNet(width=6, norm=norm, dropout=dropout))), length, optim, name="teacher"),
        Stage(lambda teacher: Distil(student, teacher, label=True), length, optim, name="distil"),
        Stage(lambda both: Distil(*both, label=False), steps - 2 * length, optim, name="finish"),
    ], SETTINGS


def batch_norm(seed: int, steps: int = 20) -> Stages:
    """`Adversarial` with BatchNorm and dropout; the augmentor's turn reads the student's running statistics."""
    return adversarial(seed, steps, norm="batch", dropout=0.2)


def batch_norm_stages(seed: int, steps: int = 20) -> Stages:
    return stages(seed, steps, norm="batch", dropout=0.2)


class Masks(Method):
    """Keeps what dropout let through, in the order of the rows; has no `prepare`."""

    def __init__(self) -> None:
        super().__init__({"student": built(0, lambda: nn.Linear(16, 1))}, streams={"train": images()})
        self.register_buffer("kept", torch.zeros(BATCH, 16, dtype=torch.float64))

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",)),)

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        student = self.players["student"]
        kept = F.dropout(torch.ones(len(batch["train"]["index"]), 16).double(), training=student.training)
        return {"fit": student(kept).square().mean()}, {"kept": kept}

    def after(self, turn: str, carry: Carry) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        return {"kept": gather_across(carry["kept"])}


def masks(seed: int, steps: int = 20) -> Stages:
    return [Stage(Masks(), steps)], SETTINGS


class Offset(Method):
    """A term may be NaN while all gradients are finite: the data only shift it."""

    def __init__(self, student: nn.Module) -> None:
        zeros = torch.zeros(ROWS, dtype=torch.float64)
        super().__init__({"student": student}, streams={"train": Table(offset=zeros)})

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, moves=("student",)),)

    def loss(self, batch: Batch) -> tuple[Terms, Carry]:
        weight = self.players["student"].weight
        return {"fit": (weight - 1).square().mean() + batch["train"]["offset"].mean()}, {}


def offset(seed: int, steps: int = 20) -> Stages:
    return [Stage(Offset(built(seed, lambda: nn.Linear(3, 3, bias=False))), steps)], SETTINGS


SPLITTABLE: dict[str, Callable[..., Stages]] = {
    "hint": hint,
    "dmd2": dmd2,
    "mutual": mutual,
    "projected": projected,
    "bilevel": bilevel,
    "adversarial": adversarial,
    "matching": matching,
    "bank": bank,
    "flow_map": flow_map,
    "preference": preference,
    "relational": relational,
    "probe": probe,
    "stages": stages,
}
"""Equal at every split of the batch over processes and micro-batches."""

MINIATURES = SPLITTABLE | {"batch_norm": batch_norm, "batch_norm_stages": batch_norm_stages}
"""Those with BatchNorm and dropout depend on the split by construction."""

EXTRA = {"masks": masks, "offset": offset}
"""For one question each."""
