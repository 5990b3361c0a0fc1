"""What training costs before it is tried: tokens, memory, time, money and storage, by model, chain,
group and sharding.

Everything is counted from the shapes: parameters and what autograd keeps are exact for
transformers' Llama-like blocks (Qwen3, Chameleon), as a test with saved-tensor hooks shows; peaks
add what lives beside them at that moment. Left out: the allocator's fragmentation, kernels'
workspaces, the CUDA context and Python itself (a share of each card stays free for them,
`HEADROOM`). `budget.measure` runs the real trainers and reads their peak, so that the count can be
compared. Seconds follow from operations, bytes and a stated utilization.
"""

from dataclasses import dataclass, field

import psutil

from realsr_r1.policy import PolicyConfig
from realsr_r1.vlcot import GRIDS, PATCH_TOKENS, TAGS, image_length

GB = 2**30
# Of a weight; mixed: float32 weights, bfloat16 autocast.
BYTES = {"float32": 4, "mixed": 4, "bfloat16": 2}
# Bytes that autograd keeps, a token and layer, for each element of (hidden, queries, keys, MLP):
# from the operations of transformers' blocks with fused attention. RMS norms always compute in
# float32, so bfloat16 keeps copies.
KEPT = {"float32": (24, 16, 16, 16), "bfloat16": (16, 10, 10, 8), "mixed": (26, 10, 10, 8)}
# With LoRA on all linear layers: frozen weights keep no inputs, float32 adapters keep float32
# copies of theirs.
KEPT_LORA = {"float32": (16, 12, 12, 16), "bfloat16": (28, 12, 8, 10)}
# Elements of optimizer state per trained element, in its precision. Muon's are those of matrices:
# the embeddings have AdamW's two moments.
STATES = {"adamw": 2.0, "muon": 1.0, "adamw8bit": 0.5, "sgd": 0.0}
HEADROOM = 0.08  # of a card: context, workspaces, fragmentation


def chain_tokens(words: int = 20) -> tuple[int, int]:
    """(prompt, completion) tokens of this project's chain whose four texts have `words` each: the
    eye's patches and the task; 14 tags, four texts, three images, the end."""
    images = sum(map(image_length, GRIDS))
    return PATCH_TOKENS + 1, 2 * len(TAGS) + 4 * words + images + 1


@dataclass(frozen=True)
class Shape:
    """A causal transformer. `qk` counts the parameters of one layer's query and key norms."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = True
    qk: int = 0

    @staticmethod
    def of(config) -> "Shape":
        """From a transformers configuration (Qwen3, Llama, Chameleon). ValueError for one of
        another kind: its layers hold other matrices."""
        c = config.get_text_config()
        if c.model_type not in ("qwen3", "llama", "chameleon"):
            raise ValueError(
                f"a {c.model_type} model is not counted here: use a Qwen3, Llama or Chameleon"
            )
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        kv = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        norms = {"qwen3": 2 * head, "chameleon": 2 * head * (c.num_attention_heads + kv)}
        return Shape(
            c.hidden_size,
            c.num_hidden_layers,
            c.num_attention_heads,
            kv,
            head,
            c.intermediate_size,
            c.vocab_size,
            c.tie_word_embeddings,
            norms.get(c.model_type, 0),
        )

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> int:
        """Parameters of one layer's seven matrices."""
        return 2 * self.hidden * (self.q + self.kv) + 3 * self.hidden * self.mlp

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def tables(self) -> int:
        """Parameters of input and output embeddings."""
        return self.embedding * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * (self.linear + 2 * self.hidden + self.qk) + self.hidden + self.tables

    def lora(self, rank: int) -> int:
        """Parameters of adapters of this rank on all seven matrices of every layer."""
        h, q, kv, m = self.hidden, self.q, self.kv, self.mlp
        return self.layers * rank * ((h + q) * 2 + (h + kv) * 2 + (h + m) * 3)


def nano() -> Shape:
    """The shipped policy's body and table; eye and positions, a quarter more, are left out."""
    return Shape.of(PolicyConfig().body)


def qwen3(vocabulary: int = 151_936) -> Shape:
    """Qwen3-0.6B as published (596 M parameters), or with another vocabulary."""
    return Shape(1024, 28, 16, 8, 128, 3072, vocabulary, True, 256)


def chameleon() -> Shape:
    """Chameleon 7B as published, with a vocabulary up to PURE's last image code (id 73,727)."""
    return Shape(4096, 32, 32, 32, 128, 11_008, 73_728, False, 2 * 128 * 64)


@dataclass(frozen=True)
class Run:
    """One training run. Lengths are tokens; `batch` is sequences a forward and backward pass and
    device."""

    phase: str = "sft"  # or grpo
    prompt: int = PATCH_TOKENS + 1
    completion: int = chain_tokens()[1]
    batch: int = 1
    accumulate: int = 1
    prompts: int = 1  # GRPO: groups a step, over all devices
    group: int = 8  # GRPO: chains a group
    precision: str = "float32"
    optimizer: str = "adamw"
    checkpointing: bool = False
    lora: int = 0  # rank; 0: all weights
    reference: bool = True  # GRPO: a frozen copy for the KL (LoRA switches its adapters off)
    fused: bool = True  # GRPO: TRL's fused head and padded batches; ours keeps all logits instead
    average: bool = False  # SFT: a running average of the weights is kept beside them
    devices: int = 1
    sharded: bool = False  # FSDP2 or ZeRO-3; otherwise every device holds everything
    offload: bool = False  # ZeRO-3: weights and optimizer states in the host's memory

    def __post_init__(self):
        if (
            self.phase not in ("sft", "grpo")
            or self.precision not in BYTES
            or self.optimizer not in STATES
        ):
            raise ValueError(
                f"phase is sft or grpo, precision one of {', '.join(BYTES)}, optimizer one of "
                f"{', '.join(STATES)}"
            )
        if self.lora and self.precision == "mixed":
            raise ValueError(
                "LoRA is counted with float32 or bfloat16 weights: choose one of them as precision"
            )
        if self.offload and not self.sharded:
            raise ValueError("offload belongs to ZeRO-3: set sharded, too")

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def chains(self) -> int:
        """Chains that one device samples together."""
        return -(-self.prompts * self.group // self.devices) if self.phase == "grpo" else 0


@dataclass
class Memory:
    """Bytes of a device: parts at each moment, the peak over the moments, and what lies in the
    host's memory."""

    moments: dict[str, dict[str, float]]
    host: float = 0.0
    peak: float = field(init=False)
    when: str = field(init=False)

    def __post_init__(self):
        totals = {k: sum(v.values()) for k, v in self.moments.items()}
        self.when = max(totals, key=totals.get)
        self.peak = totals[self.when]

    @property
    def parts(self) -> dict[str, float]:
        return self.moments[self.when]


def layer_activations(shape: Shape, run: Run) -> float:
    """Bytes that autograd keeps of one layer for one token."""
    per = (KEPT_LORA if run.lora else KEPT)[run.precision]
    # Inverse deviations, log-sum-exp, adapters' middle.
    small = 4 * (2 + 2 * shape.heads + shape.kv_heads + 7 * run.lora)
    width = BYTES["bfloat16" if run.precision == "mixed" else run.precision]
    masked = width * 2 * (shape.q - shape.kv) if run.phase == "grpo" else 0
    return (
        sum(n * x for n, x in zip(per, (shape.hidden, shape.q, shape.kv, shape.mlp), strict=True))
        + small
        + masked
    )


def activations(shape: Shape, run: Run) -> float:
    """Bytes kept for the backward pass of one micro-batch: all layers, or with checkpointing each
    layer's input. A padded batch (GRPO) has a mask, of which each layer keeps its own copy in the
    precision of the scores."""
    tokens, width = run.batch * run.length, BYTES[run.precision]
    layer = width * shape.hidden if run.checkpointing else layer_activations(shape, run)
    ends = (2 * width + 4) * shape.hidden  # the last norm and the head's input
    copies = 1 if run.checkpointing else shape.layers
    mask = (
        run.batch * run.length**2 * (1 + copies * width) if run.phase == "grpo" and run.fused else 0
    )
    return tokens * (shape.layers * layer + ends) + mask


def head(shape: Shape, run: Run) -> float:
    """Bytes of the loss at its peak: logits of the completion, a copy, the log-softmax and its
    gradient, in float32. TRL's fused head keeps no logits, but float32 gradients of the hidden
    states and of the whole output table, and a tile of 4,096 tokens by 32,768 of the vocabulary."""
    if run.phase == "sft" or not run.fused:
        width = 12 if run.precision == "bfloat16" else 16
        return run.batch * (run.completion + 1) * shape.vocab * width
    tile = min(run.batch * run.completion, 4096) * min(shape.vocab, 32_768)
    hidden = run.batch * run.length * shape.hidden * 8
    return hidden + 4 * shape.embedding + tile * BYTES[run.precision]


def cache(shape: Shape, run: Run) -> float:
    """Bytes of the keys and values of the chains that are sampled together."""
    return (
        run.chains
        * run.length
        * 2
        * shape.layers
        * shape.kv
        * (2 if run.precision == "bfloat16" else 4)
    )


def optimizer_states(shape: Shape, run: Run, trained: int) -> float:
    """Bytes of the optimizer's states for `trained` weights, all devices together."""
    states = STATES[run.optimizer] * trained
    if run.optimizer == "muon" and not run.lora:
        states += shape.embedding
    if run.sharded and run.precision == "bfloat16" and not run.lora:
        return 4.0 * (trained + states)  # FSDP and DeepSpeed keep float32 weights beside them
    return states * (4 if run.lora else BYTES[run.precision])


def held(shape: Shape, run: Run) -> dict[str, float]:
    """Bytes that lie on a device all the time, part by part."""
    n = run.devices if run.sharded else 1
    full = shape.parameters * BYTES[run.precision] / n
    trained = shape.lora(run.lora) if run.lora else shape.parameters
    out = {"weights": full, "optimizer": optimizer_states(shape, run, trained) / n}
    out["average"] = full * run.average
    if run.lora:
        out["adapters"] = trained * 4 / n
    if run.phase == "grpo" and run.reference and not run.lora:
        out["reference"] = full
    return out


def gradients(shape: Shape, run: Run) -> tuple[float, float]:
    """Bytes of all gradients, and of those that are there before the backward pass has ended."""
    n, width = run.devices if run.sharded else 1, 4 if run.lora else BYTES[run.precision]
    whole = (shape.lora(run.lora) if run.lora else shape.parameters) * width / n
    early = whole if run.accumulate > 1 or (run.devices > 1 and not run.sharded) else 0.0
    if not run.lora and run.phase == "sft":  # the output table's gradient comes first
        early = max(early, shape.embedding * width / n)
    return whole, early


def memory(shape: Shape, run: Run) -> Memory:
    """Peak memory of a device, part by part, at four moments: sampling (GRPO), the loss, the
    backward pass (with checkpointing at its last layer, where every gradient is there), the update.
    """
    always, (whole, early) = held(shape, run), gradients(shape, run)
    host = 0.0
    if run.offload:
        host, always = sum(always.values()) * run.devices, {}
    compute = 2 if run.precision != "float32" else 4
    block = 2 * (shape.linear + 2 * shape.hidden) + shape.tables
    busy = always | {"activations": activations(shape, run)}
    busy |= {"gathered": float(block * compute * run.sharded)}
    if run.precision == "mixed":  # bfloat16 copies of the weights, until the loss is known
        busy["autocast"] = 2.0 * shape.parameters
    moments = {
        "loss": busy | {"head": head(shape, run), "gradients": early},
        "backward": busy | {"gradients": whole if run.checkpointing else early},
        "update": always | {"gradients": whole},
    }
    if run.checkpointing:
        again = run.batch * run.length * layer_activations(shape, run)
        moments["backward"]["one layer again"] = again
    if run.phase == "grpo":
        moments["sampling"] = always | {
            "gathered": float(shape.parameters * compute * run.sharded),
            "cache": cache(shape, run),
            "logits": 6.0 * 4 * run.chains * shape.vocab,
        }
    return Memory(moments, host)


@dataclass(frozen=True)
class Card:
    """An accelerator: memory in bytes as its driver reports it, and its vendor's dense 16-bit
    operations and bytes a second."""

    name: str
    bytes: float
    flops: float
    bandwidth: float
    devices: int = 1


CARDS = (
    Card("T4", 15_360 * 2**20, 65e12, 320e9),
    Card("L4", 23_034 * 2**20, 121e12, 300e9),
    Card("A100-40", 40_960 * 2**20, 312e12, 1555e9),
    Card("A100-80", 81_920 * 2**20, 312e12, 2039e9),
    Card("8×H100", 81_559 * 2**20, 989e12, 3350e9, 8),
)


def forward_flops(shape: Shape, sequences: float, length: int, scored: int) -> float:
    """Operations of a forward pass: two a weight and token, causal attention, and the head on
    `scored` tokens a sequence."""
    attention = 2 * shape.q * length
    return sequences * (
        length * shape.layers * (2 * shape.linear + attention) + 2 * scored * shape.embedding
    )


def seconds(
    shape: Shape,
    run: Run,
    card: Card,
    utilization: float = 0.35,
    bandwidth: float = 0.6,
    call: float = 5e-4,
) -> dict[str, float]:
    """Seconds of one optimizer step. Passes: operations over `utilization` of the card's peak; a
    backward pass costs two forward passes (one with LoRA), checkpointing one more, the KL one more.
    A sampled token costs the slowest of its operations, of reading weights and cache at `bandwidth`
    of the card's, and of `call` seconds a layer (eager transformers)."""
    chains = run.chains or run.batch * run.accumulate
    once = forward_flops(shape, chains, run.length, run.completion) / (card.flops * utilization)
    kl = run.phase == "grpo" and run.reference
    out = {"passes": once * (1 + (1 if run.lora else 2) + run.checkpointing + kl)}
    if run.phase == "grpo":
        compute = 2 * shape.parameters * chains / (card.flops * utilization)
        read = (
            shape.parameters * (2 if run.precision != "float32" else 4) + cache(shape, run) / 2
        ) / (card.bandwidth * bandwidth)
        out["sampling"] = run.completion * max(compute, read, call * shape.layers)
    return out


def free_bytes(device) -> float:
    """Free memory of a torch.device, in bytes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return float(psutil.virtual_memory().available)


def require(need: float, device, what: str) -> None:
    """Raise RuntimeError with one sentence if `device` (torch.device) has less than `need` bytes
    free."""
    free = free_bytes(device)
    if need > free:
        raise RuntimeError(
            f"{what} needs about {need / GB:.1f} GB and {device} has {free / GB:.1f} GB free: "
            "lower batch or length, or take a larger device (realsr cost --help)"
        )
